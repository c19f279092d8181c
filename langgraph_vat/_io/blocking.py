"""The backend verbs over blocking clients. No method here ever suspends."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import psycopg
import redis

from langgraph_vat._io.addresses import all_clients
from langgraph_vat._io.forks import made_once
from langgraph_vat._io.mapping import (
    LOST,
    answers,
    every_primary,
    is_repeatable,
    map_postgres,
    map_redis,
    run_ids,
)
from langgraph_vat._io.pool import BlockingPool
from langgraph_vat._io.protocols import Arg, Embedder, Params, Query, Row, Script, Session

T = TypeVar("T")
Connection = psycopg.Connection[Row]


class BlockingSession:
    """A transaction on a blocking connection."""

    def __init__(self, connection: Connection, pipeline: psycopg.Pipeline | None = None) -> None:
        self._connection = connection
        self._pipeline = pipeline

    async def fetch(
        self, query: Query, params: Params = None, *, plan_anew: bool = False
    ) -> list[Row]:
        prepare = False if plan_anew else None
        cursor = self._connection.execute(query, params, binary=True, prepare=prepare)
        if self._pipeline is not None:
            self._pipeline.sync()  # the server's idle timeout runs only from here
        return cursor.fetchall()

    async def execute(self, query: Query, params: Params = None) -> None:
        self._connection.execute(query, params)

    async def run(self, work: Callable[[], T]) -> T:
        return work()


class BlockingDurable:
    """Postgres through a pool of blocking connections, shared by all threads."""

    def __init__(self, pool: BlockingPool) -> None:
        self._pool = pool

    async def transact(self, body: Callable[[Session], Awaitable[T]]) -> T:
        async def attempt(connection: Connection) -> T:
            with connection.pipeline() as pipeline, connection.transaction():
                session = BlockingSession(connection, pipeline)
                await session.execute(self._pool.address.transaction)
                return await body(session)

        return await self._twice(attempt)

    async def fetch(
        self, query: Query, params: Params = None, *, plan_anew: bool = False
    ) -> list[Row]:
        if self._pool.address.is_path_lost:
            return await self.transact(lambda s: s.fetch(query, params, plan_anew=plan_anew))

        async def attempt(connection: Connection) -> list[Row]:
            return await BlockingSession(connection).fetch(query, params, plan_anew=plan_anew)

        return await self._twice(attempt)

    async def _twice(self, attempt: Callable[[Connection], Awaitable[T]]) -> T:
        with map_postgres():
            try:
                with self._pool.connection() as connection:
                    return await attempt(connection)
            except LOST as error:
                if not is_repeatable(error):
                    raise
            # One connection died, so the others probably did: have the pool
            # replace them before the second and last attempt.
            self._pool.check()
            with self._pool.connection() as connection:
                return await attempt(connection)


class BlockingHot:
    """
    Redis through a blocking client.

    Args:
        connect: Makes the client; called in need only, for a cluster's must find the cluster.
    """

    def __init__(self, connect: "Callable[[], redis.Redis | redis.RedisCluster]") -> None:
        self._connect = connect

    @made_once
    def _client(self) -> Any:
        return self._connect()

    def close(self) -> None:
        """Close the connections, if there are any."""
        for client in all_clients(self._client) if "_client" in vars(self) else ():
            client.close()

    async def script(self, script: Script, keys: Sequence[bytes], args: Sequence[Arg]) -> Any:
        with map_redis():
            try:
                return self._client.evalsha(script.sha1, len(keys), *keys, *args)
            except redis.exceptions.NoScriptError:
                return self._client.eval(script.source, len(keys), *keys, *args)

    async def run_ids(self) -> str:
        with map_redis():
            return run_ids(self._client.info("server", **every_primary(self._client)))

    async def read_each(self, command: str, keys: Sequence[bytes], *args: Arg) -> list[Any]:
        with map_redis():
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.execute_command(command, key, *args)
            return answers(pipeline.execute(raise_on_error=False))

    async def set_each(self, entries: Mapping[bytes, bytes], ttl_s: int) -> None:
        with map_redis():
            pipeline = self._client.pipeline(transaction=False)
            for key, value in entries.items():
                pipeline.set(key, value, ex=ttl_s)
            pipeline.execute()


class BlockingBackend:
    """Both tiers for blocking callers."""

    def __init__(
        self,
        durable: BlockingDurable,
        hot: BlockingHot | None,
        cache: BlockingHot | None,
    ) -> None:
        self.durable = durable
        self.hot = hot
        self.cache = cache

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - the blocking colour of this verb

    async def run(self, work: Callable[[], T]) -> T:
        return work()

    async def embed(
        self, embedder: Embedder, texts: Sequence[str], *, timeout_s: float, alone: bool = False
    ) -> Any:
        return embedder.blocking(texts, timeout_s, alone=alone)
