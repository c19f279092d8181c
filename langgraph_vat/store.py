"""LangGraph's store on Postgres and pgvector: each method pair is one operation."""

import asyncio
import copy
from collections.abc import Iterable, Sequence
from typing import Any, Self, Unpack

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.store.base import (
    BaseStore,
    IndexConfig,
    Op,
    Result,
    SearchItem,
    TTLConfig,
)

from langgraph_vat._durable import lexical
from langgraph_vat._durable.items import TABLES, VECTOR_TABLES
from langgraph_vat._hot.keys import Keys
from langgraph_vat._io.addresses import PostgresSource, RedisSource
from langgraph_vat._io.connections import Connections
from langgraph_vat._io.driver import drive
from langgraph_vat._io.embedding import documents, queries
from langgraph_vat._io.managed import Managed
from langgraph_vat._io.protocols import Backend
from langgraph_vat._io.tenant import TenantConnections
from langgraph_vat._lifecycle import Indexer
from langgraph_vat._ops import items, namespaces
from langgraph_vat._ops.address import Space, check
from langgraph_vat._ops.embedding import Embedding
from langgraph_vat._ops.embedding_cache import EmbeddingCache, model_of
from langgraph_vat._ops.fields import Fields
from langgraph_vat._ops.indexing import count_pending, index_pending
from langgraph_vat._ops.ranking import RankedSearchOp, SearchOptions
from langgraph_vat._ops.reseal import check_age
from langgraph_vat._ops.reseal_items import reseal_roots, shred_root
from langgraph_vat._ops.rotate import rotate_roots
from langgraph_vat._ops.schema import prepare
from langgraph_vat._ops.seal_items import seal_roots
from langgraph_vat._ops.search import VectorIndex
from langgraph_vat._ops.store_schema import (
    check_items,
    ddl,
    has_row_security,
    secure,
    setup_items,
)
from langgraph_vat._ops.texts import TextIndex, check_texts, index_texts, setup_texts
from langgraph_vat._records import Pending, Resealed, Rotated, Sealed
from langgraph_vat._seal.strict import StrictSerializer
from langgraph_vat.errors import ConfigurationError, InvalidInputError
from langgraph_vat.keyring import KeyWrapper
from langgraph_vat.serde import sealing
from langgraph_vat.settings import Settings


class SemanticStore(Managed, BaseStore):
    """
    A store: items by namespace and key, filtered by field, found by meaning.

    One object serves sync and async, from any thread and any event loop, and
    may be made anywhere; it connects when it is first used. A batch is one
    transaction; a read in it sees the writes before it. An item whose texts cannot
    be embedded now is stored, and waits for its vectors: see `pending`.

    Args:
        connections: The address of Postgres; and of a Redis that keeps vectors of texts.
        index: What is embedded, as LangGraph's stores take it, with
            PostgresStore's ``distance_type`` and ``ann_index_config``. Scores
            are 1 - distance for cosine, else the negative distance. ``model``
            names what embeds, for Redis: else it is the provider string, or the
            class of a LangChain embedder and its ``model``. A function has no name.
        ttl: When items expire, in minutes, fractions allowed.
        keyring: Seals values; fields are then filtered after opening, but for
            `Settings.filterable_fields`. Ids and embeddings stay readable.
        serde: Serializer of what JSON cannot hold.
        settings: Of a store, `Settings.filterable_fields`, `Settings.accept_plaintext`,
            `Settings.text_search`, `Settings.ranking`, `Settings.ef_search` and
            `Settings.max_scan_tuples`.

    Raises:
        ConfigurationError: The index, the TTL or how to search cannot work.
    """

    supports_ttl = True

    def __init__(
        self,
        connections: Connections,
        *,
        index: IndexConfig | None = None,
        ttl: TTLConfig | None = None,
        keyring: KeyWrapper | None = None,
        serde: SerializerProtocol | None = None,
        settings: Settings | None = None,
    ) -> None:
        keyring = sealing(keyring, serde)
        settings = settings or Settings()
        for name, config in (("index", index), ("ttl", ttl)):
            if config is not None and not isinstance(config, dict):
                msg = f"{name} must be a dict, as LangGraph's stores take it"
                raise ConfigurationError(msg)
        if ttl is not None and not items.is_ttl(ttl.get("default_ttl")):
            raise ConfigurationError(f"default_{items.TTL_RULE}")
        self.ttl_config = ttl
        self.index_config = index
        self._connections: Connections | TenantConnections = connections
        self._space = Space(None)
        vectors = VectorIndex(index) if index is not None else None
        texts = _texts(settings, vectors, keyring)
        self._needs = frozenset(TABLES if index is None else VECTOR_TABLES)
        if texts is not None:
            self._needs |= lexical.TABLES.keys()
        filterable = settings.filterable_fields if keyring is not None else ()
        embedding = None
        if vectors is not None:
            embedders = documents(vectors.embeddings), queries(vectors.embeddings)
            cache = self._cache(connections, vectors, keyring, settings)
            embedding = Embedding(vectors, *embedders, settings.embed_timeout_s, cache)
        self._items = items.Items(
            vectors, keyring, serde or StrictSerializer(), filterable, settings, embedding, texts
        )
        self._indexer = Indexer(connections, self._items)

    @classmethod
    def from_conn_string(
        cls,
        postgres: PostgresSource,
        *,
        redis: RedisSource | None = None,
        schema: str | None = None,
        index: IndexConfig | None = None,
        ttl: TTLConfig | None = None,
        keyring: KeyWrapper | None = None,
        serde: SerializerProtocol | None = None,
        **settings: Any,
    ) -> Self:
        """
        Return a store that connects by itself.

        With `redis`, texts that were embedded before are not embedded again, if it is
        known which model embeds.

        Use it in ``with`` or ``async with``, which set up the schema and close
        it, or call `setup` and `close`.
        """
        tuned = Settings.of(settings)
        connections = Connections(postgres, redis, tuned, schema)
        return cls(connections, index=index, ttl=ttl, keyring=keyring, serde=serde, settings=tuned)

    def _cache(
        self,
        connections: Connections,
        index: VectorIndex,
        keyring: KeyWrapper | None,
        settings: Settings,
    ) -> EmbeddingCache | None:
        model = model_of(self.index_config or {}, index.embeddings)
        if model is None or not connections.is_hot:
            return None
        most_bytes = settings.embedding_cache_bytes
        return EmbeddingCache(model, index, keyring, Keys(settings.key_prefix), most_bytes)

    def setup(self, *, create_extension: bool = True, row_security: bool = False) -> None:
        """
        Create or migrate the tables. Safe in many processes at once, and again.

        Args:
            create_extension: Whether to create the extension ``vector`` where it is
                missing; many hosts leave that to somebody else.
            row_security: Whether Postgres itself is to show a tenant's view its own rows
                alone, and others none; see docs/operations.md. Once there, it stays.

        Raises:
            SchemaError: They cannot be brought up to date; pgvector is missing.
            ConfigurationError: The table's vectors have other dimensions, or its texts were
                read in another language.
        """
        backend = self._connections.blocking()
        drive(self._setup(backend, create_extension=create_extension, row_security=row_security))

    async def asetup(self, *, create_extension: bool = True, row_security: bool = False) -> None:
        """Like `setup`."""
        backend = await self._connections.asyncio()
        await self._setup(backend, create_extension=create_extension, row_security=row_security)

    async def _setup(self, backend: Backend, *, create_extension: bool, row_security: bool) -> None:
        await prepare(backend, self._connections.schema)
        known = self._items
        await setup_items(backend, known.index, known.filterable, create_extension=create_extension)
        if known.texts is not None:
            await setup_texts(known.texts, backend, known.serde)
        if row_security or await has_row_security(backend):
            await items.open_tokens(known, backend)  # while their key can be made: no tenant may
            await secure(backend)

    def ddl(self, *, create_extension: bool = True, row_security: bool = False) -> str:
        """Return the SQL that `setup` runs; see `HybridSaver.ddl`."""
        schema, known = self._connections.schema, self._items
        return ddl(
            schema,
            known.index,
            known.filterable,
            known.texts,
            create_extension=create_extension,
            row_security=row_security,
        )

    def check(self) -> Sequence[str]:
        """Return what the tables or the role lack; see `HybridSaver.check`."""
        return drive(self._check(self._connections.blocking()))

    async def acheck(self) -> Sequence[str]:
        """Like `check`."""
        return await self._check(await self._connections.asyncio())

    async def _check(self, backend: Backend) -> Sequence[str]:
        schema, known = self._connections.schema, self._items
        found = await check_items(backend, schema, known.index, known.filterable)
        return found + (await check_texts(known.texts, backend) if known.texts is not None else [])

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """
        Run operations in one transaction and return their results in order.

        Raises:
            InvalidInputError: One of them could not be answered; none was run.
            SealError: A value was changed, moved, or is not sealed.
            UnavailableError: All of it was written, or none.
        """
        backend = self._connections.blocking(self._needs)
        self._indexer.start()
        return drive(items.batch(self._items, backend, self._space, ops))

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Like `batch`."""
        backend = await self._connections.asyncio(self._needs)
        self._indexer.start()
        return await items.batch(self._items, backend, self._space, ops)

    def search(
        self,
        namespace_prefix: tuple[str, ...],
        /,
        *,
        query: str | None = None,
        filter: dict[str, Any] | None = None,
        limit: int = 10,
        offset: int = 0,
        refresh_ttl: bool | None = None,
        **options: Unpack[SearchOptions],
    ) -> list[SearchItem]:
        """
        Search for items within a namespace prefix.

        Without a query the items that were updated last come first. With one, those that
        have a score come first, the greatest before the others; all other items follow.

        Args:
            namespace_prefix: Where; () for everywhere.
            query: What to look for, in anybody's words.
            filter: What the items' values must be like.
            limit: Most items on the page.
            offset: Items on the pages before it.
            refresh_ttl: Whether the items that are returned live on; None for the TTL's default.
            **options: ``ranking``: what counts, ``vector`` for meaning, scored as the class
                says; ``lexical`` for words, any of them, scored by BM25; ``hybrid`` for both,
                scored by the sum of 1 / (60 + rank) over the two, 0.033 at most; None for
                `Settings.ranking`. ``min_score``: leaves out items with a smaller score, and
                those without one, from all pages alike. ``ef_search``, ``max_scan_tuples``:
                instead of those of `Settings`.

        Raises:
            InvalidInputError: An argument cannot be answered, or needs what the store
                was made without. Nothing was searched.
        """
        fields = namespace_prefix, filter, limit, offset, query
        op = self._search_op(*fields, refresh_ttl=refresh_ttl, options=options)
        return self.batch([op])[0]  # type: ignore[return-value]

    async def asearch(
        self,
        namespace_prefix: tuple[str, ...],
        /,
        *,
        query: str | None = None,
        filter: dict[str, Any] | None = None,
        limit: int = 10,
        offset: int = 0,
        refresh_ttl: bool | None = None,
        **options: Unpack[SearchOptions],
    ) -> list[SearchItem]:
        """Like `search`."""
        fields = namespace_prefix, filter, limit, offset, query
        op = self._search_op(*fields, refresh_ttl=refresh_ttl, options=options)
        return (await self.abatch([op]))[0]  # type: ignore[return-value]

    def _search_op(
        self, *fields: Any, refresh_ttl: bool | None, options: SearchOptions
    ) -> RankedSearchOp:
        if refresh_ttl is None:
            refresh_ttl = (self.ttl_config or {}).get("refresh_on_read", True)
        return RankedSearchOp(*fields, refresh_ttl, options=options)

    def index_texts(self) -> int:
        """
        Have the items found by words that are not yet; return how many these were.

        `setup` does it once, for what was there before `Settings.text_search`. It is needed
        again for what was put without that since, such as by PostgresStore. It goes by the
        fields of the index: what ``put(index=)`` said of an item is not known any more.

        Raises:
            ConfigurationError: There is no `text_search`.
        """
        return drive(self._index_texts(self._connections.blocking(self._needs)))

    async def aindex_texts(self) -> int:
        """Like `index_texts`."""
        return await self._index_texts(await self._connections.asyncio(self._needs))

    async def _index_texts(self, backend: Backend) -> int:
        known = self._items
        if known.texts is None:
            raise ConfigurationError("there is nothing to find by words; pass text_search=")
        return await index_texts(known.texts, backend, known.serde, self._space.root)

    def rotate(self) -> Rotated:
        """Wrap the data keys of roots by the keyring's primary key; see `Threads.rotate`."""
        return drive(self._rotate(self._connections.blocking(self._needs)))

    async def arotate(self) -> Rotated:
        """Like `rotate`."""
        return await self._rotate(await self._connections.asyncio(self._needs))

    async def _rotate(self, backend: Backend) -> Rotated:
        if self._items.keyring is None:
            raise ConfigurationError("there is no keyring to rotate to; pass keyring=")
        return await rotate_roots(backend.durable, self._items.keyring, self._space.root)

    def reseal(self, *, max_age_s: float = 0.0) -> Resealed:
        """Seal values anew, under new data keys; see `Threads.reseal`."""
        return drive(self._reseal(self._connections.blocking(self._needs), max_age_s))

    async def areseal(self, *, max_age_s: float = 0.0) -> Resealed:
        """Like `reseal`."""
        return await self._reseal(await self._connections.asyncio(self._needs), max_age_s)

    async def _reseal(self, backend: Backend, max_age_s: float) -> Resealed:
        check_age(self._items.keyring, max_age_s)
        return await reseal_roots(self._items, backend, max_age_s, self._space.root)

    def seal_existing(self) -> Sealed:
        """
        Seal the items under first labels that have no data key; see `Threads.seal_existing`.

        All under one first label are sealed in one transaction; whoever puts an item there
        waits for it.
        """
        backend = self._connections.blocking(self._needs)
        return drive(seal_roots(self._items, backend, self._space.root))

    async def aseal_existing(self) -> Sealed:
        """Like `seal_existing`."""
        backend = await self._connections.asyncio(self._needs)
        return await seal_roots(self._items, backend, self._space.root)

    def shred(self, root: str) -> None:
        """
        Destroy the data key of all namespaces that begin with the label `root`.

        Nobody can read what they hold any more, here and on replicas. Getting or putting an
        item there raises `ShreddedError`, in other processes within a minute; a search passes
        over it. Embeddings stay: delete the items, and the label can be used again. Of backups,
        see `Threads.shred`.

        Raises:
            InvalidInputError: Nothing sealed was put there, or this is a tenant's view:
                see `shred_all`.
        """
        drive(self._shred(self._connections.blocking(self._needs), root))

    async def ashred(self, root: str) -> None:
        """Like `shred`."""
        await self._shred(await self._connections.asyncio(self._needs), root)

    async def _shred(self, backend: Backend, root: str) -> None:
        if self._space.root:
            raise InvalidInputError(
                "a tenant has one data key for all namespaces, and no other; nothing was changed."
                " shred_all() destroys it"
            )
        await shred_root(self._items, backend, *self._space.stored((root,)))

    def shred_all(self) -> int:
        """
        Shred all that a tenant has; return how many data keys that were: one, or none.

        See `shred`. After `delete_all` the tenant's name can be used again.

        Raises:
            InvalidInputError: This is not a tenant's view; see `scoped`.
        """
        backend = self._connections.blocking(self._needs)
        return drive(namespaces.shred_tenant(self._items, backend, self._space))

    async def ashred_all(self) -> int:
        """Like `shred_all`."""
        backend = await self._connections.asyncio(self._needs)
        return await namespaces.shred_tenant(self._items, backend, self._space)

    def count(
        self, namespace_prefix: tuple[str, ...] = (), *, filter: dict[str, Any] | None = None
    ) -> int:
        """
        Return how many items a search would find.

        Postgres counts them; sealed items are opened for a filter, each, as a search does.

        Args:
            namespace_prefix: Where; () for everywhere.
            filter: What their values must be like; see `search`.

        Raises:
            InvalidInputError: The filter could not be answered.
        """
        backend = self._connections.blocking(self._needs)
        return drive(namespaces.count(self._items, backend, self._space, namespace_prefix, filter))

    async def acount(
        self, namespace_prefix: tuple[str, ...] = (), *, filter: dict[str, Any] | None = None
    ) -> int:
        """Like `count`."""
        backend = await self._connections.asyncio(self._needs)
        return await namespaces.count(self._items, backend, self._space, namespace_prefix, filter)

    def delete_namespace(self, namespace_prefix: tuple[str, ...]) -> int:
        """
        Delete a namespace and all below it, with their vectors; return how many items there were.

        Not in one transaction but in steps of a thousand items, so that nobody waits for long.
        Stopped, it can be run again, and deletes what is left. Items that others put meanwhile
        may stay. A label's data key stays, too; see `shred`.

        Args:
            namespace_prefix: The namespace. ``*`` is a label like any other.

        Raises:
            InvalidInputError: It is empty.
            UnavailableError: Postgres does not answer. What was deleted by then is.
        """
        backend = self._connections.blocking(self._needs)
        return drive(namespaces.delete_below(backend, self._space, namespace_prefix))

    async def adelete_namespace(self, namespace_prefix: tuple[str, ...]) -> int:
        """Like `delete_namespace`."""
        backend = await self._connections.asyncio(self._needs)
        return await namespaces.delete_below(backend, self._space, namespace_prefix)

    def delete_all(self) -> int:
        """
        Delete all items of a tenant; return how many there were. See `delete_namespace`.

        Raises:
            InvalidInputError: This is not a tenant's view; see `scoped`.
        """
        backend = self._connections.blocking(self._needs)
        return drive(namespaces.delete_tenant(backend, self._space))

    async def adelete_all(self) -> int:
        """Like `delete_all`."""
        backend = await self._connections.asyncio(self._needs)
        return await namespaces.delete_tenant(backend, self._space)

    def pending(self) -> Pending:
        """
        Return what waits for its vectors, because the embedder failed when it was put.

        Some process with an index takes it up in the background.

        Raises:
            ConfigurationError: This store has no index.
            InvalidInputError: This is a tenant's view: the queue is for all.
        """
        return drive(self._pending(self._connections.blocking(self._needs)))

    async def apending(self) -> Pending:
        """Like `pending`."""
        return await self._pending(await self._connections.asyncio(self._needs))

    async def _pending(self, backend: Backend) -> Pending:
        self._refuse_view()
        return await count_pending(self._items, backend)

    def index_pending(self) -> int:
        """
        Index what waits for its vectors, now; return how many items it was.

        Each is tried once, those that were tried a moment ago included; it stops when the
        embedder fails for all. What another process is at is left to it.

        Raises:
            ConfigurationError: This store has no index.
            InvalidInputError: This is a tenant's view: the queue is for all.
        """
        return drive(self._index_pending(self._connections.blocking(self._needs)))

    async def aindex_pending(self) -> int:
        """Like `index_pending`."""
        return await self._index_pending(await self._connections.asyncio(self._needs))

    async def _index_pending(self, backend: Backend) -> int:
        self._refuse_view()
        return (await index_pending(self._items, backend, is_all_due=True))[0]

    def _refuse_view(self) -> None:
        if self._space.root:
            raise InvalidInputError(
                "one queue is for all tenants, and this is a tenant's view; ask the store itself"
            )

    def sweep_ttl(self) -> int:
        """Delete what has expired; return how many items. They were invisible already."""
        return drive(items.sweep(self._connections.blocking(self._needs), self._space.root))

    async def asweep_ttl(self) -> int:
        """Like `sweep_ttl`."""
        backend = await self._connections.asyncio(self._needs)
        return await items.sweep(backend, self._space.root)

    def scoped(self, tenant: str) -> Self:
        """
        Return a view that can neither get, search, list, put nor delete outside `tenant`.

        Namespaces of one tenant are no others' and not those of this store, whatever their
        labels are. Sealed, a tenant has one data key. The view shares connections and everything
        else with this store, which is the one to close.

        Raises:
            InvalidInputError: The tenant's name cannot be stored, or this is a
                tenant's view already.
        """
        if isinstance(self._connections, TenantConnections):
            raise InvalidInputError("this is a tenant's view already; take another from the store")
        view = copy.copy(self)
        view._space = Space(check("tenant", tenant))  # noqa: SLF001 - a copy of this very object
        view._connections = TenantConnections(self._connections, tenant)  # noqa: SLF001
        return view

    def close(self) -> None:
        """
        Close the connections. May be called again.

        Nobody waits for the embedder any longer: what does is stored, and queued. A
        tenant's view closes nothing: others use the same connections.
        """
        if isinstance(self._connections, Connections):
            self._indexer.stop()
            self._connections.close()

    async def aclose(self) -> None:
        """Like `close`, with the connections of the running event loop."""
        if isinstance(self._connections, Connections):
            await asyncio.to_thread(self._indexer.stop)
            await self._connections.aclose()


def _texts(
    settings: Settings, vectors: VectorIndex | None, keyring: KeyWrapper | None
) -> TextIndex | None:
    if settings.text_search is None:
        return None
    if keyring is not None:
        raise ConfigurationError(
            "text_search keeps the words of items where they can be read, and keyring= seals items:"
            " leave one of them out. Nothing was written."
        )
    fields = vectors.fields if vectors is not None else Fields(None)
    return TextIndex(settings.text_search, fields)
