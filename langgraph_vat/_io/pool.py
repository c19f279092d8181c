"""
Connections to Postgres, kept to be used again: of all threads, or of one event loop.

Whoever needs a connection opens it; nothing runs in the background. psycopg's
own pools open connections in workers, and two things follow that we cannot
have. After an outage the workers' growing pauses go on when the server is
long back. And an asyncio worker that is cancelled while it connects takes
that for a failure and goes on: `asyncio.run` then waits for it for ever.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus


class PoolTimeoutError(psycopg.OperationalError):
    """All connections were in use for as long as a caller may wait."""


class BlockingPool:
    """
    At most `size` connections, shared by all threads.

    Args:
        postgres: Connection string.
        kwargs: Further arguments of each connection.
        size: Most connections at once.
        timeout_s: Seconds that a caller may wait for one.
    """

    def __init__(self, postgres: str, kwargs: dict[str, Any], size: int, timeout_s: float) -> None:
        self._postgres = postgres
        self._kwargs = kwargs
        self._timeout_s = timeout_s
        self._free = threading.Semaphore(size)
        self._idle: list[psycopg.Connection[Any]] = []
        self._is_closed = False

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """
        Lend a connection.

        Raises:
            PoolTimeoutError: None became free in time.
            OperationalError: A new one could not be opened.
        """
        if not self._free.acquire(timeout=self._timeout_s):
            raise PoolTimeoutError(f"no free connection within {self._timeout_s} s")
        try:
            connection = self._reuse() or psycopg.connect(self._postgres, **self._kwargs)
            try:
                yield connection
            finally:
                self._take_back(connection)
        finally:
            self._free.release()

    def check(self) -> None:
        """Close the idle connections: one has died, so they probably did."""
        while connection := self._reuse():
            connection.close()

    def close(self) -> None:
        """Close the idle connections now, and those that are lent when they come back."""
        self._is_closed = True
        self.check()

    def _reuse(self) -> psycopg.Connection[Any] | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _take_back(self, connection: psycopg.Connection[Any]) -> None:
        is_usable = connection.info.transaction_status == TransactionStatus.IDLE
        if is_usable and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.close()


class AsyncioPool:
    """Like `BlockingPool`, for the tasks of one event loop."""

    def __init__(self, postgres: str, kwargs: dict[str, Any], size: int, timeout_s: float) -> None:
        self._postgres = postgres
        self._kwargs = kwargs
        self._timeout_s = timeout_s
        self._free = asyncio.Semaphore(size)
        self._idle: list[psycopg.AsyncConnection[Any]] = []
        self._is_closed = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Lend a connection."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise PoolTimeoutError(f"no free connection within {self._timeout_s} s") from None
        try:
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                yield connection
            finally:
                await self._take_back(connection)
        finally:
            self._free.release()

    async def check(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await self._idle.pop().close()

    async def close(self) -> None:
        """Close the idle connections now, and those that are lent when they come back."""
        self._is_closed = True
        await self.check()

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(self._postgres, **self._kwargs)

    async def _take_back(self, connection: psycopg.AsyncConnection[Any]) -> None:
        is_usable = connection.info.transaction_status == TransactionStatus.IDLE
        if is_usable and not self._is_closed:
            self._idle.append(connection)
        else:
            await connection.close()
