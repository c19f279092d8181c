"""
Who owns sockets: one blocking backend a process, one asyncio backend an event loop.

Nothing is opened before it is first needed, so an object that holds this can
be made at import time, inside or outside a loop. An asyncio socket dies with
its loop; an async generator that the loop closes when it shuts down
(`asyncio.run` does) is how we learn of that, and close the sockets in time.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, LiteralString

import psycopg
import redis
import redis.asyncio

from langgraph_vat._io.addresses import (
    PostgresAddress,
    PostgresSource,
    RedisAddress,
    RedisSource,
)
from langgraph_vat._io.asyncio import AsyncioBackend, AsyncioDurable, AsyncioHot
from langgraph_vat._io.blocking import BlockingBackend, BlockingDurable, BlockingHot
from langgraph_vat._io.driver import drive
from langgraph_vat._io.forks import renew_after_fork
from langgraph_vat._io.pool import AsyncioPool, BlockingPool
from langgraph_vat._io.protocols import Backend
from langgraph_vat.errors import ConfigurationError, SchemaError, UnavailableError
from langgraph_vat.settings import Settings

# Seconds that a Redis may take for what can be had without it.
_CACHE_S = 0.25
SELECT_PID = "SELECT pg_backend_pid()"
Tables = AbstractSet[str]
LACKS_TABLES: LiteralString = """
SELECT t.name FROM unnest(%(tables)s::text[]) AS t (name) WHERE NOT EXISTS (
    SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %(schema)s AND c.relname = t.name
    AND has_schema_privilege(n.oid, 'USAGE')
)
"""
# Kept alive in a forked child: to close one would say goodbye on its parent's socket.
_inherited: list[Any] = []


class Connections:
    """
    The two tiers' addresses, and the backends made from them.

    Args:
        postgres: A connection string, a function that returns one, or a psycopg_pool.
        redis_source: A URL or a client of redis-py; None for Postgres alone.
        settings: Pool size and time limits.
        schema: Postgres schema of the tables; None for the role's default.
    """

    def __init__(
        self,
        postgres: PostgresSource,
        redis_source: RedisSource | None,
        settings: Settings,
        schema: str | None = None,
    ) -> None:
        self._postgres = PostgresAddress(
            postgres, settings, schema, is_hot=redis_source is not None
        )
        self._redis = RedisAddress(redis_source, settings) if redis_source is not None else None
        self._settings = settings
        self._closed = False
        self._found: set[str] = set()
        self._begin()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin without any connection, and leave those that a parent has to it."""
        _inherited.append((self._blocking, self._asyncio))
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._blocking: tuple[BlockingBackend, BlockingPool] | None = None
        self._asyncio: dict[
            asyncio.AbstractEventLoop,
            asyncio.Future[tuple[AsyncioBackend, AsyncGenerator[None], AsyncioPool]],
        ] = {}

    @property
    def is_hot(self) -> bool:
        """Whether there is a Redis."""
        return self._redis is not None

    @property
    def is_closed(self) -> bool:
        """Whether they were closed for good."""
        return self._closed

    @property
    def schema(self) -> str | None:
        """The Postgres schema of the tables; None for the role's default."""
        return self._postgres.schema

    @property
    def redis_address(self) -> str:
        """Where Redis is, without credentials."""
        return str(self._redis)

    def blocking(self, needs: Tables = frozenset()) -> BlockingBackend:
        """
        The backend for blocking callers, connected on first use.

        Args:
            needs: Tables that must be in the schema: those of the same names in
                another schema of the search path are somebody else's.

        Raises:
            SchemaError: They are not there.
            UnavailableError: Postgres does not answer.
        """
        opened = self._blocking
        if opened is None:
            with self._lock:
                if self._closed:
                    raise closed()
                opened = self._blocking = self._blocking or self._open_blocking()
        drive(self._require(opened[0], needs))
        return opened[0]

    async def asyncio(self, needs: Tables = frozenset()) -> AsyncioBackend:
        """The backend of the running event loop, likewise."""
        if self._closed:
            raise closed()
        loop = asyncio.get_running_loop()
        opening = self._asyncio.get(loop)
        if opening is None:
            # No await since the look: of several tasks of this loop, one opens.
            opening = asyncio.ensure_future(self._open_asyncio())
            self._leave_closed_loops()
            with self._lock:
                self._asyncio[loop] = opening
        try:
            # Whoever gives up waiting must not take the others' connections away.
            backend = (await asyncio.shield(opening))[0]
        except BaseException:
            if opening.done() and self._asyncio.get(loop) is opening:
                del self._asyncio[loop]  # it failed; the next caller tries anew
            raise
        await self._require(backend, needs)
        return backend

    async def _require(self, backend: Backend, needs: Tables) -> None:
        if self.schema is None or needs <= self._found:
            return
        params = {"schema": self.schema, "tables": sorted(needs)}
        if rows := await backend.durable.fetch(LACKS_TABLES, params):
            raise SchemaError(
                f"schema {self.schema} has no table {rows[0][0]}, or the role may not use it."
                " Nothing was read or written. Run setup() once; check() says what is missing."
            )
        self._found |= needs

    def _leave_closed_loops(self) -> None:
        """Let go of what belongs to loops that ended without their async generators' end."""
        with self._lock:
            ended = [loop for loop in self._asyncio if loop.is_closed()]
            left = [self._asyncio.pop(loop) for loop in ended]
        for opening in left:
            if opening.done() and not opening.cancelled() and not opening.exception():
                opening.result()[2].abandon()

    def close(self) -> None:
        """Close the blocking connections; an event loop's close with `aclose` or with it."""
        self._leave_closed_loops()
        with self._lock:
            self._closed = True
            opened, self._blocking = self._blocking, None
        if opened is not None:
            opened[1].close()
            for hot in (opened[0].hot, opened[0].cache):
                if hot is not None:
                    hot.close()

    async def aclose(self) -> None:
        """Close the connections of the running loop, and the blocking ones."""
        opening = self._asyncio.pop(asyncio.get_running_loop(), None)
        try:
            if opening is not None:
                await (await opening)[1].aclose()
        finally:
            self.close()

    def _open_blocking(self) -> tuple[BlockingBackend, BlockingPool]:
        address, settings = self._postgres, self._settings
        failure = None
        try:
            with psycopg.connect(**address.parameters()) as connection:
                (pid,) = connection.execute(SELECT_PID).fetchone() or (0,)
                address.note_backend(connection.info.backend_pid, pid)
        except psycopg.OperationalError as error:
            failure = self._failure(error)
        if failure is not None:
            raise failure  # outside the handler: see there
        pool = BlockingPool(address, settings.pool_size, settings.timeout_s)
        hot = cache = None
        if self._redis is not None:
            hot = BlockingHot(partial(self._redis.client, redis))
            cache = BlockingHot(partial(self._redis.client, redis, self._cache_s))
        return BlockingBackend(BlockingDurable(pool), hot, cache), pool

    async def _open_asyncio(self) -> tuple[AsyncioBackend, AsyncGenerator[None], AsyncioPool]:
        address, settings = self._postgres, self._settings
        failure = None
        try:
            connecting = psycopg.AsyncConnection.connect(**await address.aparameters())
            async with await connecting as connection:
                (pid,) = await (await connection.execute(SELECT_PID)).fetchone() or (0,)
                address.note_backend(connection.info.backend_pid, pid)
        except psycopg.OperationalError as error:
            failure = self._failure(error)
        if failure is not None:
            raise failure  # outside the handler: see there
        pool = AsyncioPool(address, settings.pool_size, settings.timeout_s)
        hot = cache = None
        if self._redis is not None:
            hot = AsyncioHot(self._redis.client(redis.asyncio))
            cache = AsyncioHot(self._redis.client(redis.asyncio, self._cache_s))
        lifetime = _until_loop_ends(pool, hot, cache)
        await anext(lifetime)
        return AsyncioBackend(AsyncioDurable(pool), hot, cache), lifetime, pool

    @property
    def _cache_s(self) -> float:
        return min(_CACHE_S, self._settings.timeout_s)

    def _failure(self, error: psycopg.Error) -> UnavailableError:
        """
        Return what a first connection's error means, to be raised outside its handler.

        libpq's error is its cause, except where a part of the password may be in it.
        """
        if not (where := str(self._postgres)):
            return UnavailableError(
                "no connection to Postgres: its URL was read otherwise than it was meant. Nothing"
                " was written. Write characters such as / @ : % in a password as %2F %40 %3A %25."
            )
        failure = UnavailableError(
            f"no connection to Postgres at {where}. Nothing was written."
            " Check the address, the credentials and that the server runs."
        )
        failure.__cause__ = error
        return failure


def closed() -> ConfigurationError:
    """Return the error of who goes on using what was closed."""
    return ConfigurationError(
        "this saver or store was closed; make a new one, or use it inside its `with` block"
    )


async def _until_loop_ends(pool: AsyncioPool, *every: AsyncioHot | None) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await pool.close()
        for hot in every:
            if hot is not None:
                await hot.close()
