"""The backend verbs over asyncio clients, which belong to one event loop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import psycopg
import redis
import redis.asyncio

from langgraph_vat._io.addresses import all_clients
from langgraph_vat._io.mapping import (
    LOST,
    answers,
    every_primary,
    is_repeatable,
    map_postgres,
    map_redis,
    run_ids,
)
from langgraph_vat._io.pool import AsyncioPool
from langgraph_vat._io.protocols import Arg, Embedder, Params, Query, Row, Script, Session

T = TypeVar("T")
Connection = psycopg.AsyncConnection[Row]


class AsyncioSession:
    """A transaction on an asyncio connection."""

    def __init__(
        self, connection: Connection, pipeline: psycopg.AsyncPipeline | None = None
    ) -> None:
        self._connection = connection
        self._pipeline = pipeline

    async def fetch(
        self, query: Query, params: Params = None, *, plan_anew: bool = False
    ) -> list[Row]:
        prepare = False if plan_anew else None
        cursor = await self._connection.execute(query, params, binary=True, prepare=prepare)
        if self._pipeline is not None:
            await self._pipeline.sync()  # the server's idle timeout runs only from here
        return await cursor.fetchall()

    async def execute(self, query: Query, params: Params = None) -> None:
        await self._connection.execute(query, params)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(work)


class AsyncioDurable:
    """Postgres through a pool of asyncio connections."""

    def __init__(self, pool: AsyncioPool) -> None:
        self._pool = pool

    async def transact(self, body: Callable[[Session], Awaitable[T]]) -> T:
        async def attempt(connection: Connection) -> T:
            async with connection.pipeline() as pipeline, connection.transaction():
                session = AsyncioSession(connection, pipeline)
                await session.execute(self._pool.address.transaction)
                return await body(session)

        return await self._twice(attempt)

    async def fetch(
        self, query: Query, params: Params = None, *, plan_anew: bool = False
    ) -> list[Row]:
        if self._pool.address.is_path_lost:
            return await self.transact(lambda s: s.fetch(query, params, plan_anew=plan_anew))

        async def attempt(connection: Connection) -> list[Row]:
            return await AsyncioSession(connection).fetch(query, params, plan_anew=plan_anew)

        return await self._twice(attempt)

    async def _twice(self, attempt: Callable[[Connection], Awaitable[T]]) -> T:
        with map_postgres():
            try:
                async with self._pool.connection() as connection:
                    return await attempt(connection)
            except LOST as error:
                if not is_repeatable(error):
                    raise
            # One connection died, so the others probably did: have the pool
            # replace them before the second and last attempt.
            await self._pool.check()
            async with self._pool.connection() as connection:
                return await attempt(connection)


class AsyncioHot:
    """
    Redis through an asyncio client.

    What is under way when it is closed may still open a connection; the last
    of those calls closes it.
    """

    def __init__(self, client: "redis.asyncio.Redis | redis.asyncio.RedisCluster") -> None:
        self._client: Any = client
        self._under_way = 0
        self._is_closed = False

    async def close(self) -> None:
        """Close the connections: now, or as soon as nobody uses them."""
        self._is_closed = True
        if not self._under_way:
            for client in all_clients(self._client):
                await client.aclose()

    @asynccontextmanager
    async def _using(self) -> AsyncIterator[Any]:
        self._under_way += 1
        try:
            with map_redis():
                yield self._client
        finally:
            self._under_way -= 1
            if self._is_closed:
                await self.close()

    async def script(self, script: Script, keys: Sequence[bytes], args: Sequence[Arg]) -> Any:
        async with self._using() as client:
            try:
                return await client.evalsha(script.sha1, len(keys), *keys, *args)
            except redis.exceptions.NoScriptError:
                return await client.eval(script.source, len(keys), *keys, *args)

    async def run_ids(self) -> str:
        async with self._using() as client:
            return run_ids(await client.info("server", **every_primary(client)))

    async def read_each(self, command: str, keys: Sequence[bytes], *args: Arg) -> list[Any]:
        async with self._using() as client:
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.execute_command(command, key, *args)
            return answers(await pipeline.execute(raise_on_error=False))

    async def set_each(self, entries: Mapping[bytes, bytes], ttl_s: int) -> None:
        async with self._using() as client:
            pipeline = client.pipeline(transaction=False)
            for key, value in entries.items():
                pipeline.set(key, value, ex=ttl_s)
            await pipeline.execute()


class AsyncioBackend:
    """Both tiers for the callers on one event loop."""

    def __init__(
        self,
        durable: AsyncioDurable,
        hot: AsyncioHot | None,
        cache: AsyncioHot | None,
    ) -> None:
        self.durable = durable
        self.hot = hot
        self.cache = cache

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(work)

    async def embed(
        self, embedder: Embedder, texts: Sequence[str], *, timeout_s: float, alone: bool = False
    ) -> Any:
        return await embedder.asyncio(texts, timeout_s, alone=alone)
