"""
Asyncio connections to Postgres, kept for the event loop they belong to.

psycopg_pool's pool for asyncio opens connections in tasks of its own. If the
loop shuts down while one of them connects, the task takes the cancellation
for a failure to connect and goes on, and `asyncio.run` waits for it for ever.
Here whoever needs a connection opens it, and nothing runs in the background.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import PoolTimeout

Connection = psycopg.AsyncConnection[Any]


class AsyncioPool:
    """
    At most `size` connections of one event loop.

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
        self._free = asyncio.Semaphore(size)
        self._idle: list[Connection] = []
        self._is_closed = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """
        Lend a connection.

        Raises:
            PoolTimeout: None became free in time.
            OperationalError: A new one could not be opened.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise PoolTimeout(f"no free connection within {self._timeout_s} s") from None
        try:
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                yield connection
            finally:
                await self._take_back(connection)
        finally:
            self._free.release()

    async def check(self) -> None:
        """Close the idle connections: one has died, so they probably did."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.close()

    async def close(self) -> None:
        """Close the idle connections now, and those that are lent when they come back."""
        self._is_closed = True
        await self.check()

    async def _connect(self) -> Connection:
        return await psycopg.AsyncConnection.connect(self._postgres, **self._kwargs)

    async def _take_back(self, connection: Connection) -> None:
        is_usable = connection.info.transaction_status == TransactionStatus.IDLE
        if is_usable and not self._is_closed:
            self._idle.append(connection)
        else:
            await connection.close()
