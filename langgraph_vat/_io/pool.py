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
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import IsolationLevel
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGconn
from psycopg.waiting import Ready, Wait

from langgraph_vat._io.addresses import PostgresAddress

T = TypeVar("T")
# An answer may take so many times what a connection may.
_ANSWER = 3


class PoolTimeoutError(psycopg.OperationalError):
    """All connections were in use for as long as a caller may wait."""


class AnswerTimeoutError(psycopg.OperationalError):
    """Postgres took the request, and then nothing more was heard of it."""


def _bounded(steps: Generator[Any, Any, T], seconds: float) -> Generator[Any, Any, T]:
    """
    Drive psycopg's own generator; give up when nothing moves for so long.

    A server that is frozen, or behind a connection that is half open, neither
    answers nor closes.
    """
    moved_at = time.monotonic()
    try:
        wanted = next(steps)
        while True:
            ready = yield wanted
            if ready:
                moved_at = time.monotonic()
            elif time.monotonic() - moved_at > seconds:
                raise AnswerTimeoutError(f"no answer from Postgres within {seconds:.0f} s")
            wanted = steps.send(ready)
    except StopIteration as done:
        result: T = done.value
        return result


def _sending(steps: Generator[Any, Any, T], pgconn: PGconn) -> Generator[Any, Any, T]:
    """
    Drive psycopg's own generator; go on sending while it waits for an answer.

    In pipeline mode it may wait with a part of the last statement unsent, which the
    server waits for: as much as the socket does not take at once.
    """
    try:
        wanted = next(steps)
        while True:
            is_more = wanted == Wait.R and _has_more(pgconn)
            ready = yield Wait.RW if is_more else wanted
            if not is_more:
                wanted = steps.send(ready)
            elif ready != Ready.W:  # an answer, or nothing for a while
                wanted = steps.send(ready & Ready.R)
    except StopIteration as done:
        result: T = done.value
        return result


def _has_more(pgconn: PGconn) -> bool:
    """Send what can be; whether there is more. Of what is broken, whoever waits will hear."""
    try:
        return pgconn.flush() == 1
    except psycopg.OperationalError:
        return False


class BlockingConnection(psycopg.Connection[Any]):
    """A connection that does not wait for ever."""

    answer_s: float = float("inf")

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """Wait for what was asked; after a timeout the connection is of no use."""
        try:
            steps = _bounded(_sending(gen, self.pgconn), self.answer_s)
            return super().wait(steps, *args, **kwargs)
        except AnswerTimeoutError:
            self.pgconn.finish()
            raise


class AsyncioConnection(psycopg.AsyncConnection[Any]):
    """Likewise."""

    answer_s: float = float("inf")

    async def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """Wait for what was asked; after a timeout the connection is of no use."""
        try:
            steps = _bounded(_sending(gen, self.pgconn), self.answer_s)
            return await super().wait(steps, *args, **kwargs)
        except AnswerTimeoutError:
            self.pgconn.finish()
            raise


class BlockingPool:
    """
    At most `size` connections, shared by all threads.

    Args:
        address: Where to connect.
        size: Most connections at once.
        timeout_s: Seconds that a caller may wait for one.
    """

    def __init__(self, address: PostgresAddress, size: int, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._free = threading.Semaphore(size)
        self._idle: list[BlockingConnection] = []
        self._is_closed = False

    @contextmanager
    def connection(self) -> Iterator[BlockingConnection]:
        """
        Lend a connection.

        Raises:
            PoolTimeoutError: None became free in time.
            OperationalError: A new one could not be opened.
        """
        if not self._free.acquire(timeout=self._timeout_s):
            raise PoolTimeoutError(f"no free connection within {self._timeout_s} s")
        try:
            connection = self._reuse() or self._connect()
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

    def _connect(self) -> BlockingConnection:
        connection = BlockingConnection.connect(**self.address.parameters())
        connection.isolation_level = IsolationLevel.READ_COMMITTED
        connection.answer_s = _ANSWER * self._timeout_s
        return connection

    def _reuse(self) -> BlockingConnection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _take_back(self, connection: BlockingConnection) -> None:
        is_usable = connection.info.transaction_status == TransactionStatus.IDLE
        if is_usable and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.close()


class AsyncioPool:
    """Like `BlockingPool`, for the tasks of one event loop."""

    def __init__(self, address: PostgresAddress, size: int, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._free = asyncio.Semaphore(size)
        self._idle: list[AsyncioConnection] = []
        self._is_closed = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncioConnection]:
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

    async def _connect(self) -> AsyncioConnection:
        connection = await AsyncioConnection.connect(**await self.address.aparameters())
        await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
        connection.answer_s = _ANSWER * self._timeout_s
        return connection

    async def _take_back(self, connection: AsyncioConnection) -> None:
        is_usable = connection.info.transaction_status == TransactionStatus.IDLE
        if is_usable and not self._is_closed:
            self._idle.append(connection)
        else:
            await connection.close()

    def abandon(self) -> None:
        """Close the idle connections of a loop that is closed, and cannot do it any more."""
        while self._idle:
            self._idle.pop().pgconn.finish()
