"""LangGraph's checkpoint saver over the two tiers: each method pair is one operation."""

import asyncio
import copy
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from typing import Any, Self

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    get_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_vat._io.addresses import PostgresSource, RedisSource
from langgraph_vat._io.connections import Connections
from langgraph_vat._io.driver import drive
from langgraph_vat._io.managed import Managed
from langgraph_vat._io.protocols import Backend
from langgraph_vat._lifecycle import Lifecycle
from langgraph_vat._ops import history, hot, retention
from langgraph_vat._ops.address import (
    View,
    check,
    check_before,
    check_channels,
    check_checkpoint,
    check_config,
    check_ids,
    check_limit,
    check_mapping,
    check_run_ids,
    check_writes,
)
from langgraph_vat._ops.flush import flush, overdue
from langgraph_vat._ops.schema import (
    check_checkpoints,
    ddl,
    prepare,
    setup_checkpoints,
    warn_of_sealed,
)
from langgraph_vat._ops.shared import Counters
from langgraph_vat._ops.tiers import enable_hot, refresh, require_hot
from langgraph_vat._ops.values import address, next_version, to_tuple
from langgraph_vat._seal.strict import StrictSerializer
from langgraph_vat.errors import InvalidInputError
from langgraph_vat.keyring import KeyWrapper
from langgraph_vat.serde import EncryptedSerializer, sealing
from langgraph_vat.settings import Settings
from langgraph_vat.threads import Threads


class HybridSaver(Managed, BaseCheckpointSaver[str]):
    """
    A checkpointer: hot in Redis, durable in Postgres.

    One object serves ``invoke`` and ``ainvoke``, from any thread and any
    event loop, and may be made anywhere; it connects when it is first used.

    What is acknowledged is kept. With ``flush_every=1`` it is committed in
    Postgres when `put` returns. With ``flush_every=N`` it is in Redis and in
    this process, so that either may be lost, and in Postgres after N
    super-steps or ``flush_after`` seconds. Without Redis every write is
    committed when it returns.

    Args:
        connections: The addresses of the two tiers.
        settings: Limits and times.
        keyring: Seals every channel value, write and metadata with
            AES-256-GCM; None leaves them as LangGraph's serializer writes them.
        serde: Serializer of values. An `EncryptedSerializer` brings its keyring.
        is_first: No other process uses the tiers yet. If Redis was restarted
            since, there is then nobody to wait for.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        settings: Settings | None = None,
        keyring: KeyWrapper | None = None,
        serde: SerializerProtocol | None = None,
        is_first: bool = False,
    ) -> None:
        keyring = sealing(keyring, serde)
        super().__init__(serde=serde or StrictSerializer())
        self._life = Lifecycle(connections, settings or Settings(), keyring)
        self._shared = self._life.shared
        self._shared.is_first = is_first
        self._shared.serde = self.serde
        self._view = View(None)

    @classmethod
    def from_conn_string(
        cls,
        postgres: PostgresSource,
        *,
        redis: RedisSource | None = None,
        schema: str | None = None,
        keyring: KeyWrapper | None = None,
        serde: SerializerProtocol | None = None,
        **settings: Any,
    ) -> Self:
        """
        Return a saver that connects by itself.

        Use it in ``with`` or ``async with``, which set up the schema and close
        it, or call `setup` and `close`.

        Args:
            postgres: Connection string; a function that returns one, called
                for each connection, for passwords that expire; or a
                psycopg_pool, whose address and arguments are taken over.
            redis: URL, or a client of redis-py (`redis.Redis`, `RedisCluster`,
                that of a Sentinel, or their asyncio kinds), whose address,
                credentials and TLS are taken over; None for Postgres alone.
            schema: Postgres schema of the tables.
            keyring: Seals everything a user typed.
            serde: Serializer of values.
            **settings: Fields of `Settings`, such as ``flush_every``.

        Raises:
            ConfigurationError: An argument cannot work.
        """
        tuned = Settings.of(settings)
        connections = Connections(postgres, redis, tuned, schema)
        return cls(connections, settings=tuned, keyring=keyring, serde=serde)

    # --- lifecycle -------------------------------------------------------

    def setup(self) -> None:
        """
        Create or migrate the tables, and check that the tiers belong together.

        Safe to call in many processes at once, and again.

        Raises:
            SchemaError: The schema cannot be brought up to date.
            ConfigurationError: Redis and Postgres belong to different pairs.
            UnavailableError: A tier does not answer.
        """
        drive(self._setup(self._life.connections.blocking()))

    async def asetup(self) -> None:
        """Like `setup`."""
        await self._setup(await self._life.connections.asyncio())

    async def _setup(self, backend: Backend) -> None:
        await require_hot(self._shared, backend, self._life.connections.redis_address)
        await prepare(backend, self._life.connections.schema)
        await setup_checkpoints(backend, self._shared.filterable)
        if self._shared.keyring is None:
            await warn_of_sealed(backend)
        await refresh(self._shared, backend, may_try=True)

    def enable_hot(self) -> None:
        """
        Put Redis before a database that was written without it, by others or with ``redis=None``.

        Before, end the processes that write it so: the first thing they write
        afterwards is refused, with the reason, by a trigger on the tables. On a new
        database there is nothing to call; Redis is in place from the start.

        Raises:
            ConfigurationError: There is no Redis, or it belongs to another database.
            SchemaError: Somebody's transaction did not let go of the tables.
            UnavailableError: A tier does not answer.
        """
        drive(self._enable_hot(self._life.connections.blocking()))

    async def aenable_hot(self) -> None:
        """Like `enable_hot`."""
        await self._enable_hot(await self._life.connections.asyncio())

    async def _enable_hot(self, backend: Backend) -> None:
        await prepare(backend, self._life.connections.schema)
        await setup_checkpoints(backend, self._shared.filterable)
        await enable_hot(self._shared, backend)

    def ddl(self, *, concurrently: bool = False) -> str:
        """
        Return the SQL that `setup` runs, for whoever may change the schema.

        A script of one transaction (``psql -v ON_ERROR_STOP=1``), for a new database or
        an older one; it may be run again. Then `setup` finds nothing to do: the role
        that runs the graphs needs USAGE on the schema, and SELECT, INSERT, UPDATE and
        DELETE on its tables.

        Args:
            concurrently: Whether to make the indexes of a large table at the end, and
                while others write. One that fails has to be dropped, and made again.
        """
        filterable = self._shared.filterable
        return ddl(self._life.connections.schema, filterable, concurrently=concurrently)

    def check(self) -> Sequence[str]:
        """
        Return what the tables or the role lack, a line each; nothing if all is there.

        Raises:
            SchemaError: The schema is newer than this package.
            UnavailableError: Postgres does not answer.
        """
        return drive(self._check(self._life.connections.blocking()))

    async def acheck(self) -> Sequence[str]:
        """Like `check`."""
        return await self._check(await self._life.connections.asyncio())

    async def _check(self, backend: Backend) -> Sequence[str]:
        schema = self._life.connections.schema
        return await check_checkpoints(backend, schema, self._shared.filterable)

    def flush(self) -> None:
        """Move every dirty thread's journal to Postgres, other processes' too."""
        drive(self._flush(self._life.blocking()))

    async def aflush(self) -> None:
        """Like `flush`."""
        await self._flush(await self._life.asyncio())

    async def _flush(self, backend: Backend) -> None:
        await flush(self._shared, backend, await overdue(self._shared, backend, own_s=0, any_s=0))

    def close(self) -> None:
        """
        Flush what this process holds and close its connections. May be called again.

        A tenant's view closes nothing: others use the same connections.
        """
        if not self._view.is_scoped:
            self._life.close()
            self._life.connections.close()

    async def aclose(self) -> None:
        """Like `close`, with the connections of the running event loop."""
        if not self._view.is_scoped:
            await asyncio.to_thread(self._life.close)
            await self._life.connections.aclose()

    # --- views -----------------------------------------------------------

    @property
    def stats(self) -> Counters:
        """How the tiers were used by this process so far."""
        return self._shared.counters

    @property
    def threads(self) -> Threads:
        """Which threads there are, and for how long they are kept."""
        return Threads(self._life, self._view, self.serde)

    def scoped(self, tenant: str) -> Self:
        """
        Return a view that can neither read, list, write nor delete outside `tenant`.

        It shares connections and everything else with this saver, which is the one
        to close.

        Raises:
            InvalidInputError: The tenant's name cannot be stored, or this is a
                tenant's view already.
        """
        if self._view.is_scoped:
            raise InvalidInputError("this is a tenant's view already; take another from the saver")
        view = copy.copy(self)
        # Not None: that is the view of all that belongs to no tenant.
        view._view = View(check("tenant", tenant))  # noqa: SLF001 - a copy of this very object
        return view

    def with_allowlist(
        self, extra_allowlist: Collection[tuple[str, ...]]
    ) -> BaseCheckpointSaver[str]:
        """Return a clone whose serializer admits more types; it shares all state."""
        if not isinstance(self.serde, EncryptedSerializer):
            return super().with_allowlist(extra_allowlist)
        serde = self.serde.with_msgpack_allowlist(extra_allowlist)
        if serde is self.serde:
            return self
        clone = copy.copy(self)
        clone.serde = serde
        return clone

    # --- put -------------------------------------------------------------

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """
        Store a checkpoint; `new_versions` names the channels whose value is new.

        Raises:
            InvalidInputError: An id cannot be stored; nothing was.
            ThreadDeletedError: Its parent belongs to a deleted thread.
            UnavailableError: It may be stored or not; repeat it.
        """
        return drive(self._put(self._life.blocking(), config, checkpoint, metadata, new_versions))

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Like `put`."""
        backend = await self._life.asyncio()
        return await self._put(backend, config, checkpoint, metadata, new_versions)

    async def _put(
        self,
        backend: Backend,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        stored, namespace, parent_id = self._where(config)
        check_checkpoint(checkpoint)
        check_channels("new_versions", new_versions)
        check_mapping("metadata", metadata)
        known = get_checkpoint_metadata(config, metadata)
        check("run_id", str(known.get("run_id", "")), may_be_empty=True)
        new = hot.Put(
            thread_id=stored,
            checkpoint_ns=namespace,
            parent_id=parent_id,
            checkpoint=checkpoint,
            metadata=known,
            new_versions=new_versions,
        )
        await hot.put(self._shared, backend, self.serde, new)
        return address(self._view.shown(stored), namespace, checkpoint["id"])

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """
        Store a task's writes of a checkpoint.

        Raises:
            InvalidInputError: An id cannot be stored; nothing was.
            ThreadDeletedError: The thread was deleted since this process used it.
            UnavailableError: They may be stored or not; repeat it.
        """
        drive(self._put_writes(self._life.blocking(), config, writes, task_id, task_path))

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Like `put_writes`."""
        backend = await self._life.asyncio()
        await self._put_writes(backend, config, writes, task_id, task_path)

    async def _put_writes(
        self,
        backend: Backend,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> None:
        stored, namespace, checkpoint_id = self._where(config)
        check("checkpoint_id", checkpoint_id or None, within=_CONFIGURABLE)
        pairs = check_writes(writes)
        new = hot.PutWrites(
            thread_id=stored,
            checkpoint_ns=namespace,
            checkpoint_id=checkpoint_id,
            run_id=check("run_id", _run_id(config), may_be_empty=True),
            writes=pairs,
            task_id=check("task_id", task_id),
            task_path=check("task_path", task_path, may_be_empty=True),
        )
        if pairs:
            await hot.put_writes(self._shared, backend, self.serde, new)

    # --- get -------------------------------------------------------------

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """
        Return the checkpoint that `config` names, or the newest of its namespace.

        Raises:
            InvalidInputError: An id could never have been stored.
            SealError: It was changed, moved, or sealed under a key not here.
            UnavailableError: The newest is not known for sure without Postgres.
        """
        return drive(self._get_tuple(self._life.blocking(), config))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Like `get_tuple`."""
        return await self._get_tuple(await self._life.asyncio(), config)

    async def _get_tuple(self, backend: Backend, config: RunnableConfig) -> CheckpointTuple | None:
        stored, namespace, checkpoint_id = self._where(config)
        if checkpoint_id:
            found = await history.get_one(self._shared, backend, stored, namespace, checkpoint_id)
        else:
            found = await hot.get_latest(self._shared, backend, self.serde, stored, namespace)
        if found is None:
            return None
        retention = self._shared.settings.retention
        if retention is not None and retention.refresh_on_read and not checkpoint_id:
            self._shared.read.add(stored)
        snapshot, known = found
        return to_tuple(snapshot, known.codec(self.serde, stored), self._view.shown(stored))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
        values: bool = True,
    ) -> Iterator[CheckpointTuple]:
        """
        Return checkpoints, newest first across threads and namespaces.

        Pages are read as they are needed; no connection is held in between.

        Args:
            config: Thread, namespace and id to list; None for all threads.
            filter: Metadata that must be equal, key by key.
            before: Only checkpoints with a smaller id than this one's.
            limit: Most checkpoints to return.
            values: Whether to read channel values and pending writes, too. Without
                them a list of large states is much faster.

        Raises:
            InvalidInputError: An argument cannot be listed by.
        """
        listing = self._listing(config, filter, before, limit, has_values=values)
        cursor, left = None, limit
        while left is None or left > 0:
            page = history.page(
                self._shared, self._life.blocking(), self.serde, listing, cursor, left
            )
            found, cursor = drive(page)
            shown = [self._shown(*pair) for pair in found[:left]]
            yield from shown
            left = None if left is None else left - len(shown)
            if cursor is None:
                return

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
        values: bool = True,
    ) -> AsyncIterator[CheckpointTuple]:
        """Like `list`."""
        listing = self._listing(config, filter, before, limit, has_values=values)
        cursor, left = None, limit
        while left is None or left > 0:
            backend = await self._life.asyncio()
            page = history.page(self._shared, backend, self.serde, listing, cursor, left)
            found, cursor = await page
            shown = [self._shown(*pair) for pair in found[:left]]
            for one in shown:
                yield one
            left = None if left is None else left - len(shown)
            if cursor is None:
                return

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Return each channel's writes since its nearest stored value, and that as its seed."""
        return drive(self._delta_history(self._life.blocking(), config, channels))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Like `get_delta_channel_history`."""
        return await self._delta_history(await self._life.asyncio(), config, channels)

    async def _delta_history(
        self, backend: Backend, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        if not channels:
            return {}
        stored, namespace, checkpoint_id = self._where(config)
        if not checkpoint_id:
            latest = await hot.get_latest(self._shared, backend, self.serde, stored, namespace)
            if latest is None:
                return {channel: {"writes": []} for channel in channels}
            checkpoint_id = latest[0].checkpoint_id
        return await history.delta_history(
            self._shared, backend, self.serde, stored, namespace, checkpoint_id, channels
        )

    # --- retention -------------------------------------------------------

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread. When this returns nothing brings it back, in either tier."""
        drive(self._delete_thread(self._life.blocking(), thread_id))

    async def adelete_thread(self, thread_id: str) -> None:
        """Like `delete_thread`."""
        await self._delete_thread(await self._life.asyncio(), thread_id)

    async def _delete_thread(self, backend: Backend, thread_id: str) -> None:
        await retention.delete_thread(self._shared, backend, self._view.stored(thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints and writes of runs, wherever they are."""
        drive(self._delete_for_runs(self._life.blocking(), run_ids))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Like `delete_for_runs`."""
        await self._delete_for_runs(await self._life.asyncio(), run_ids)

    async def _delete_for_runs(self, backend: Backend, run_ids: Sequence[str]) -> None:
        checked = check_run_ids(run_ids)
        if checked:
            view = self._view
            await retention.delete_for_runs(
                self._shared, backend, checked, prefix=view.prefix, is_scoped=view.is_scoped
            )

    def copy_thread(
        self, source_thread_id: str, target_thread_id: str, *, checkpoint_id: str | None = None
    ) -> None:
        """
        Copy a thread with its whole history, or with that of one checkpoint.

        Args:
            source_thread_id: The thread.
            target_thread_id: One that has no checkpoints.
            checkpoint_id: A checkpoint of the root namespace, which becomes the
                newest of the copy; None for all.

        Raises:
            InvalidInputError: There is no such source, or the target is not empty.
        """
        ids = source_thread_id, target_thread_id
        drive(self._copy_thread(self._life.blocking(), *ids, checkpoint_id))

    async def acopy_thread(
        self, source_thread_id: str, target_thread_id: str, *, checkpoint_id: str | None = None
    ) -> None:
        """Like `copy_thread`."""
        ids = source_thread_id, target_thread_id
        await self._copy_thread(await self._life.asyncio(), *ids, checkpoint_id)

    async def _copy_thread(
        self, backend: Backend, source: str, target: str, checkpoint_id: str | None
    ) -> None:
        ids = self._view.stored(source), self._view.stored(target)
        if checkpoint_id is not None:
            check("checkpoint_id", checkpoint_id)
        await retention.copy_thread(self._shared, backend, self.serde, *ids, checkpoint_id)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """
        Prune threads.

        Args:
            thread_ids: The threads; those that do not exist are passed over.
            strategy: ``keep_latest`` keeps each namespace's newest checkpoint,
                and the ancestors from which a DeltaChannel is rebuilt;
                ``delete`` keeps nothing.

        Raises:
            InvalidInputError: There is no such strategy.
        """
        drive(self._prune(self._life.blocking(), thread_ids, strategy))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Like `prune`."""
        await self._prune(await self._life.asyncio(), thread_ids, strategy)

    async def _prune(self, backend: Backend, thread_ids: Sequence[str], strategy: str) -> None:
        strategies = {"keep_latest": retention.keep_latest, "delete": retention.delete_thread}
        if strategy not in strategies:
            msg = f"strategy must be one of {sorted(strategies)}; nothing was pruned"
            raise InvalidInputError(msg)
        ids = check_ids("thread_ids", thread_ids)
        for stored in [self._view.stored(one, within="thread_ids") for one in ids]:
            await strategies[strategy](self._shared, backend, stored)

    # --- the rest --------------------------------------------------------

    def get_next_version(self, current: str | int | None, channel: None = None) -> str:  # noqa: ARG002 - LangGraph still passes it
        """
        Return a version greater than `current`, unlike any other process's.

        The form is langgraph-checkpoint-postgres's. The suffix comes from the
        system's randomness: `random` would repeat itself after a fork.
        """
        return next_version(current)

    def _where(self, config: RunnableConfig) -> tuple[str, str, str]:
        """Return stored thread id, namespace and checkpoint id ('' for none) of a config."""
        found = check_config(config)
        if config.get("metadata") is not None:
            check_mapping("config['metadata']", config["metadata"], has_names=True)
        named = {name: found.get(name) for name in ("checkpoint_ns", "checkpoint_id")}
        namespace, checkpoint_id = (
            check(name, "" if value is None else value, may_be_empty=True)
            for name, value in named.items()
        )
        stored = self._view.stored(found.get("thread_id"), within=_CONFIGURABLE)
        return stored, namespace, checkpoint_id

    def _listing(
        self,
        config: RunnableConfig | None,
        filter: Mapping[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
        *,
        has_values: bool,
    ) -> history.Listing:
        check_limit(limit)
        if filter is not None:
            check_mapping("filter", filter, has_names=True)
        stored, namespace, checkpoint_id = self._where(config) if config else (None, None, "")
        found = config["configurable"] if config else {}
        return history.Listing(
            thread_id=stored,
            checkpoint_ns=namespace if found.get("checkpoint_ns") is not None else None,
            checkpoint_id=checkpoint_id or None,
            before_id=check_before(before),
            filter=filter or {},
            prefix=self._view.prefix,
            is_scoped=self._view.is_scoped,
            has_values=has_values,
        )

    def _shown(self, stored: str, found: CheckpointTuple) -> CheckpointTuple:
        """Name the thread as the caller does."""
        for config in (found.config, found.parent_config):
            if config:
                config["configurable"]["thread_id"] = self._view.shown(stored)
        return found


# Where the ids of a config are.
_CONFIGURABLE = "config['configurable']"


def _run_id(config: RunnableConfig) -> str:
    metadata, configurable = config.get("metadata") or {}, config["configurable"]
    return str(metadata.get("run_id") or configurable.get("run_id") or "")
