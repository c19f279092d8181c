"""
Who owns sockets: one blocking backend a process, one asyncio backend an event loop.

Nothing is opened before it is first needed, so an object that holds this can
be made at import time, inside or outside a loop. An asyncio socket dies with
its loop; an async generator that the loop closes when it shuts down
(`asyncio.run` does) is how we learn of that, and close the sockets in time.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
import redis
import redis.asyncio
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from redis.backoff import NoBackoff

from langgraph_vat._io.asyncio import AsyncioBackend, AsyncioDurable, AsyncioHot
from langgraph_vat._io.blocking import BlockingBackend, BlockingDurable, BlockingHot
from langgraph_vat._io.forks import renew_after_fork
from langgraph_vat._io.pool import AsyncioPool, BlockingPool
from langgraph_vat.errors import ConfigurationError, SchemaError, UnavailableError
from langgraph_vat.settings import Settings

_CLUSTER = "+cluster"
# Kept alive in a forked child: to close one would say goodbye on its parent's socket.
_inherited: list[Any] = []


class Connections:
    """
    The two tiers' addresses, and the backends made from them.

    Args:
        postgres: A libpq connection string or URL.
        redis_url: ``redis://``, ``rediss://``, ``unix://``, or
            ``redis+cluster://`` for a cluster; None for Postgres alone.
        settings: Pool size and time limits.
        schema: Postgres schema of the tables; None for the role's default.
    """

    def __init__(
        self, postgres: str, redis_url: str | None, settings: Settings, schema: str | None = None
    ) -> None:
        self._postgres = postgres
        self._redis = redis_url
        if redis_url is not None:
            _check_redis_url(redis_url)
        self._settings = settings
        self._kwargs = _connection_kwargs(postgres, settings, schema)
        self._create_schema = _create_schema(schema)
        # Whoever holds locks and is frozen must not hold them for ever.
        idle_ms = int(settings.timeout_s * 3000)
        self._limit = sql.SQL("SET LOCAL idle_in_transaction_session_timeout = {}").format(idle_ms)
        self._closed = False
        self._begin()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin without any connection, and leave those that a parent has to it."""
        _inherited.append((self._blocking, self._asyncio))
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._blocking: tuple[BlockingBackend, BlockingPool] | None = None
        self._asyncio: WeakKeyDictionary[
            asyncio.AbstractEventLoop,
            asyncio.Future[tuple[AsyncioBackend, AsyncGenerator[None]]],
        ] = WeakKeyDictionary()

    @property
    def is_hot(self) -> bool:
        """Whether there is a Redis."""
        return self._redis is not None

    @property
    def redis_address(self) -> str:
        """Where Redis is, without credentials."""
        scheme, _, rest = (self._redis or "").partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    def blocking(self) -> BlockingBackend:
        """
        The backend for blocking callers, connected on first use.

        Raises:
            UnavailableError: Postgres does not answer.
        """
        opened = self._blocking
        if opened is None:
            with self._lock:
                self._refuse_closed()
                opened = self._blocking = self._blocking or self._open_blocking()
        return opened[0]

    async def asyncio(self) -> AsyncioBackend:
        """The backend of the running event loop, likewise."""
        loop = asyncio.get_running_loop()
        opening = self._asyncio.get(loop)
        if opening is None:
            self._refuse_closed()
            # No await since the look: of several tasks of this loop, one opens.
            opening = asyncio.ensure_future(self._open_asyncio())
            with self._lock:
                self._asyncio[loop] = opening
        try:
            # Whoever gives up waiting must not take the others' connections away.
            return (await asyncio.shield(opening))[0]
        except UnavailableError:
            self._asyncio.pop(loop, None)
            raise

    def close(self) -> None:
        """Close the blocking connections; an event loop's close with `aclose` or with it."""
        with self._lock:
            self._closed = True
            opened, self._blocking = self._blocking, None
        if opened is not None:
            opened[1].close()
            if opened[0].hot is not None:
                opened[0].hot.close()

    async def aclose(self) -> None:
        """Close the connections of the running loop, and the blocking ones."""
        opening = self._asyncio.pop(asyncio.get_running_loop(), None)
        if opening is not None:
            await (await opening)[1].aclose()
        self.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            msg = (
                "this saver or store was closed; make a new one, or use it inside its `with` block"
            )
            raise ConfigurationError(msg)

    def _open_blocking(self) -> tuple[BlockingBackend, BlockingPool]:
        with self._connecting():
            connection = psycopg.connect(self._postgres, **self._kwargs)
            with connection:
                connection.execute(self._create_schema)
        settings = self._settings
        pool = BlockingPool(self._postgres, self._kwargs, settings.pool_size, settings.timeout_s)
        hot = None
        if self._redis is not None:
            url, is_cluster = _redis_url(self._redis)
            kind: Any = redis.RedisCluster if is_cluster else redis.Redis
            retry = redis.retry.Retry(NoBackoff(), 1)
            hot = BlockingHot(partial(kind.from_url, url, retry=retry, **_redis_kwargs(settings)))
        return BlockingBackend(BlockingDurable(pool, self._limit), hot), pool

    async def _open_asyncio(self) -> tuple[AsyncioBackend, AsyncGenerator[None]]:
        with self._connecting():
            connection = await psycopg.AsyncConnection.connect(self._postgres, **self._kwargs)
            async with connection:
                await connection.execute(self._create_schema)
        settings = self._settings
        pool = AsyncioPool(self._postgres, self._kwargs, settings.pool_size, settings.timeout_s)
        client = None
        if self._redis is not None:
            url, is_cluster = _redis_url(self._redis)
            kind: Any = redis.asyncio.RedisCluster if is_cluster else redis.asyncio.Redis
            retry = redis.asyncio.retry.Retry(NoBackoff(), 1)
            client = kind.from_url(url, retry=retry, **_redis_kwargs(self._settings))
        hot = AsyncioHot(client) if client is not None else None
        lifetime = _until_loop_ends(pool, client)
        await anext(lifetime)
        return AsyncioBackend(AsyncioDurable(pool, self._limit), hot), lifetime

    @contextmanager
    def _connecting(self) -> Iterator[None]:
        try:
            yield
        except psycopg.errors.InsufficientPrivilege as error:
            msg = (
                f"the Postgres role may not create the schema ({error.diag.message_primary})."
                " Nothing was written. Have it created once, or leave out schema=."
            )
            raise SchemaError(msg) from error
        except psycopg.OperationalError as error:
            raise self._no_postgres() from error

    def _no_postgres(self) -> UnavailableError:
        parts = conninfo_to_dict(self._postgres)
        port = str(parts.get("port", 5432))
        if not port.replace(",", "").isdigit():
            # A password with a slash ends the host too early, and shows in what follows.
            return UnavailableError(
                "no connection to Postgres: the port in its URL is no number. Nothing was written."
                " Write characters such as / @ : % in a password as %2F %40 %3A %25."
            )
        return UnavailableError(
            f"no connection to Postgres at host {parts.get('host', 'localhost')!r}, port"
            f" {port}, database {parts.get('dbname', parts.get('user'))!r}."
            " Nothing was written. Check the address, the credentials and that the server runs."
        )


async def _until_loop_ends(pool: AsyncioPool, client: Any) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await pool.close()
        if client is not None:
            await client.aclose()


def _connection_kwargs(postgres: str, settings: Settings, schema: str | None) -> dict[str, Any]:
    try:
        given = conninfo_to_dict(postgres) if isinstance(postgres, str) and postgres else None
    except psycopg.ProgrammingError:
        given = None
    if given is None:
        # Outside the handler: libpq's message quotes the string, password included.
        msg = (
            "the Postgres connection string cannot be read; write postgresql://user@host:port/name,"
            " without an SQLAlchemy driver name, and characters such as / @ : % in a password as"
            " %2F %40 %3A %25"
        )
        raise ConfigurationError(msg)
    kwargs: dict[str, Any] = {
        "autocommit": True,
        "connect_timeout": max(2, int(settings.timeout_s)),
        "application_name": given.get("application_name", "langgraph-vat"),
    }
    if schema is not None:
        if not schema.isidentifier():
            msg = "schema must be a plain identifier: letters, digits and underscores"
            raise ConfigurationError(msg)
        # The extension's types usually live in public.
        path = f'-c search_path="{schema}",public'
        kwargs["options"] = f"{given.get('options', '')} {path}".strip()
    return kwargs


def _create_schema(schema: str | None) -> sql.Composed:
    """Return a statement after which the schema is there, whoever creates it at the same time."""
    if schema is None:
        return sql.Composed([sql.SQL("SELECT")])
    return sql.SQL("""
DO $$ BEGIN
    IF to_regnamespace({text}) IS NULL THEN CREATE SCHEMA {name}; END IF;
EXCEPTION WHEN duplicate_schema OR unique_violation THEN NULL;
END $$""").format(text=sql.Literal(f'"{schema}"'), name=sql.Identifier(schema))


def _redis_kwargs(settings: Settings) -> dict[str, Any]:
    return {
        "socket_timeout": settings.timeout_s,
        "socket_connect_timeout": settings.timeout_s,
        "protocol": 2,
    }


def _check_redis_url(url: str) -> None:
    address, _ = _redis_url(url)
    try:
        redis.ConnectionPool.from_url(address).make_connection()
    except (ValueError, TypeError):
        is_readable = False
    else:
        is_readable = True
    if not is_readable:
        # Outside the handler: the driver's message quotes the URL, password included.
        msg = (
            "the Redis URL cannot be read; write redis://user:password@host:port/0, and characters"
            " such as / @ : % in a password as %2F %40 %3A %25"
        )
        raise ConfigurationError(msg)


def _redis_url(url: str) -> tuple[str, bool]:
    scheme, separator, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    if not separator or scheme.removesuffix(_CLUSTER) not in ("redis", "rediss", "unix"):
        msg = "the Redis URL must start with redis://, rediss://, unix:// or redis+cluster://"
        raise ConfigurationError(msg)
    return f"{scheme.removesuffix(_CLUSTER)}://{rest}", scheme.endswith(_CLUSTER)
