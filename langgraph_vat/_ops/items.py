"""
The store's operations, a batch at a time.

1. Everything that can be refused is refused before anything is written.
2. What is to be embedded is embedded before a transaction is open, each text once. An
   item whose texts cannot be embedded now is stored, and queued for it.
3. What is put is sealed by the data key that its root has at the commit, or in the clear if it
   has none: under a lock, by which nobody gives or destroys one meanwhile, Postgres compares it
   with the one that was used. If it is another one the batch begins again.
4. The batch runs in one transaction, in runs of writes and of reads. A read
   sees the writes before it in the batch; of several writes of one key in a
   run the last one counts. A run of gets is one statement, so is a run's puts.
5. Rows are locked in one order by all statements, and what was read is refreshed by the last one
   of a batch: two batches do not wait for each other, nor does whoever seals.
6. An item's vectors are replaced with it: no vector outlives its text.
"""

import itertools
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import orjson
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.store.base import (
    GetOp,
    InvalidNamespaceError,
    Item,
    ListNamespacesOp,
    MatchCondition,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    validate_op_namespace,
)
from psycopg import sql as composing

from langgraph_vat._durable import embedding as queue
from langgraph_vat._durable import items as sql
from langgraph_vat._durable import namespaces
from langgraph_vat._durable.filters import check_filter, matches
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Backend, ChangedError, Durable, Row, Runner, Session
from langgraph_vat._ops import ranking, search
from langgraph_vat._ops.address import Space
from langgraph_vat._ops.embedding import Embedded, Embedding, embed_documents, embed_queries
from langgraph_vat._ops.fields import is_paths
from langgraph_vat._ops.keys import OpenedKeys, open_index_key, unwrap_key, wrap_key
from langgraph_vat._ops.ranking import RankedSearchOp, Rankings
from langgraph_vat._ops.search import VectorIndex
from langgraph_vat._ops.shared import SHREDDED, now
from langgraph_vat._ops.texts import TextIndex, put_texts
from langgraph_vat._plain import is_plain, is_text
from langgraph_vat._seal.associated_data import associated_data
from langgraph_vat._seal.blind_index import BLIND, IndexKey
from langgraph_vat._seal.codec import Codec, is_sealed
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.errors import (
    InvalidInputError,
    SealError,
    ShreddedError,
    UnavailableError,
    VatError,
)
from langgraph_vat.keyring import KeyWrapper
from langgraph_vat.serde import codec_for
from langgraph_vat.settings import Settings

_Paged = TypeVar("_Paged", SearchOp, ListNamespacesOp)
_MOST_BYTES = 2_000
# Seconds for which a root's data key is used before it is asked for again: by then a
# process knows that it was replaced, or destroyed.
_KEY_S = 60.0
# More are remembered only while they may be in use: for longer than any batch takes.
_MOST_KEYS, _IN_USE_S = 10_000, 600.0
# The column's type is int; so many minutes are 4,083 years.
_MOST_TTL = 2**31 - 1
# Within so many somebody who puts an item finds the data keys as they were a moment ago.
_MOST_ROUNDS = 8
# More than any table has, and less than Postgres counts to, whatever a search multiplies it by.
_MOST_ITEMS = 2**48
# As `sql.ITEM` has them; a search adds a distance.
_ITEM_COLUMNS = 8
# Stands in the readable value for a field that JSON cannot hold: equal to nothing, but there.
_HIDDEN = {"__vat__": "exact"}


class RootKey(NamedTuple):
    """The data key of a root, as it is stored and as it is used: empty, and None, if shredded."""

    wrapped: bytes
    data_key: DataKey | None


# Those of some roots, as one operation goes by them from beginning to end: meanwhile another
# one may learn of a key that the rows of this one are from before.
_Keys: TypeAlias = Mapping[str, RootKey]


@dataclass(slots=True)
class Items:
    """What all operations of one store share in a process."""

    index: VectorIndex | None
    keyring: KeyWrapper | None
    serde: SerializerProtocol
    filterable: Sequence[str] = ()
    """Fields that have tokens."""
    settings: Settings = field(default_factory=Settings)
    embedding: Embedding | None = None
    """What embeds for the index, if there is one."""
    texts: TextIndex | None = None
    """What is found by words."""
    data_keys: dict[str, RootKey] = field(default_factory=dict)
    """Of roots that have one."""
    opened_at: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """When each of them was asked for, the latest last."""
    opened: OpenedKeys = field(default_factory=OpenedKeys)
    index_key: IndexKey | None = None
    """The key of the tokens, once it was needed."""
    rankings: Rankings = field(init=False)

    def __post_init__(self) -> None:
        self.rankings = Rankings(self.index, self.settings)

    @property
    def may_be_plain(self) -> bool:
        """Whether roots without a data key are read, as of now."""
        return self.keyring is None or self.settings.is_plaintext_accepted


@dataclass(slots=True)
class _Plan:
    """A batch, with all that had to be fetched before its transaction."""

    ops: list[Op]
    embedded: Embedded
    """Texts of documents."""
    queries: dict[str, str]
    roots: list[str]
    """Those that something is put into."""
    keys: _Keys = field(default_factory=dict)
    """Their data keys; none of those that it is put into in the clear."""
    read: set[tuple[str, str]] = field(default_factory=set)
    """Items that live longer because they were read."""


async def batch(items: Items, backend: Backend, space: Space, ops: Iterable[Op]) -> list[Result]:
    """
    Run operations and return their results in order.

    Raises:
        InvalidInputError, InvalidNamespaceError: An operation could not be
            answered. Nothing was written.
        UnavailableError: Postgres does not answer; or the embedder fails, and there is
            a query to embed. Nothing was written, or all of it.
    """
    listed = [_ranked(items, placed(space, op)) for op in ops]
    plan = await _prepare(items, backend, listed)

    async def body(session: Session) -> list[Result]:
        if plan.roots:
            await session.execute(sql.GUARD_ROOTS, {"roots": plan.roots})
        plan.read.clear()  # of a run that was rolled back
        results: list[Result] = [None] * len(listed)
        runs = itertools.groupby(enumerate(listed), key=lambda pair: _kind(pair[1]))
        for kind, run in runs:
            pairs = list(run)
            if kind is PutOp:
                await _put(items, session, plan, [op for _, op in pairs])  # type: ignore[misc]
            else:
                found = await _read(items, session, space, plan, kind, [op for _, op in pairs])
                for (position, _), result in zip(pairs, found, strict=True):
                    results[position] = result
        if plan.read:
            await session.execute(sql.REFRESH, columns([*plan.read], "prefixes", "keys"))
        return results

    return _shown(space, await _transact(items, backend, plan, body))


async def _transact(
    items: Items,
    backend: Backend,
    plan: _Plan,
    body: Callable[[Session], Awaitable[list[Result]]],
) -> list[Result]:
    """Run a batch with the data keys that its roots have when it commits."""
    for _ in range(_MOST_ROUNDS):
        if items.keyring is not None:
            plan.keys = await _add_keys(items, backend, set(plan.roots))
        try:
            return await backend.durable.transact(body)
        except ChangedError:
            if items.keyring is None:
                await _refuse_sealed(backend, plan.roots)
    raise UnavailableError(
        "the data keys of what is to be put are replaced again and again; nothing was written."
        " Repeat it."
    )


async def _refuse_sealed(backend: Backend, roots: Sequence[str]) -> None:
    for root, _ in await backend.durable.fetch(sql.FIND_KEYS, {"roots": roots}):
        raise SealError(
            f"namespaces that begin with {root!r} are sealed and this store has no keyring, so"
            " nothing is put beside what they hold; nothing was written. Pass keyring=."
        )


def _kind(op: Op) -> type[Op]:
    return SearchOp if isinstance(op, SearchOp) else type(op)


def _shown(space: Space, results: list[Result]) -> list[Result]:
    """Name the namespaces of items as the caller does."""
    for result in results:
        for item in result if isinstance(result, list) else [result]:
            if isinstance(item, Item):
                item.namespace = space.shown(item.namespace)
    return results


async def sweep(backend: Backend, only: str = "") -> int:
    """
    Delete what has expired, in small steps that pass over what others hold; return how many.

    Of `only` one root, or "" for all.
    """
    swept = 0
    while deleted := len(await backend.durable.fetch(sql.SWEEP, {"only": only})):
        swept += deleted
    return swept


# --- before the transaction ---------------------------------------------------


def placed(space: Space, op: Op) -> Op:
    """Return an operation whose namespaces are as they are stored, or refuse it."""
    op = _checked(op)
    if isinstance(op, ListNamespacesOp):
        for condition in op.match_conditions or ():
            if condition.match_type == "prefix":
                space.stored(condition.path)
        return op
    if isinstance(op, SearchOp):
        op = op._replace(namespace_prefix=space.stored(op.namespace_prefix))
        _check_length(op.namespace_prefix, "")
    elif isinstance(op, GetOp | PutOp):
        op = op._replace(namespace=space.stored(op.namespace))
        _check_length(op.namespace, op.key)
    return op


def _checked(op: Op) -> Op:
    """Return an operation whose namespaces are tuples, or refuse it."""
    if isinstance(op, ListNamespacesOp):
        conditions = tuple(
            MatchCondition(c.match_type, _labels(c.path)) for c in op.match_conditions or ()
        )
        op = _paged(op._replace(match_conditions=conditions))
        _check_depth(op.max_depth)
        for condition in conditions:
            _check_condition(condition)
    elif isinstance(op, SearchOp):
        op = _paged(op._replace(namespace_prefix=_labels(op.namespace_prefix)))
        _check_search(op)
        _check_length(op.namespace_prefix, "")
    elif isinstance(op, GetOp | PutOp):
        op = op._replace(namespace=_labels(op.namespace))
        _check_length(op.namespace, op.key)
    else:
        raise InvalidInputError(f"a store has no operation {type(op).__name__}; nothing was done")
    validate_op_namespace(op)
    if isinstance(op, PutOp):
        _check_put(op)
    return op


def _ranked(items: Items, op: Op) -> Op:
    return items.rankings.completed(op) if isinstance(op, SearchOp) else op


def _check_put(op: PutOp) -> None:
    if not op.namespace:
        raise InvalidNamespaceError("a namespace must not be empty; nothing was written")
    if op.value is not None and not isinstance(op.value, Mapping):
        raise InvalidInputError(
            f"a value must be a mapping, not {type(op.value).__name__}; nothing was written"
        )
    if not is_ttl(op.ttl):
        raise InvalidInputError(f"{TTL_RULE}; nothing was written")
    if not (op.index is None or op.index is False or is_paths(op.index)):
        raise InvalidInputError(
            "index must be None, False, or a list of paths such as ['text']; nothing was written"
        )


def is_ttl(ttl: Any) -> bool:
    """Whether something can be kept for so many minutes; None is for ever."""
    is_number = isinstance(ttl, int | float) and not isinstance(ttl, bool)
    return ttl is None or (is_number and 0 < ttl <= _MOST_TTL)


TTL_RULE = f"ttl must be a number of minutes, more than 0 and at most {_MOST_TTL}"


def _paged(op: _Paged) -> _Paged:
    """Return an operation that skips and takes no more than there can be."""
    if any(type(number) is not int or number < 0 for number in (op.limit, op.offset)):
        raise InvalidInputError(
            "limit and offset must be whole numbers that are not negative; nothing was searched"
        )
    return op._replace(limit=min(op.limit, _MOST_ITEMS), offset=min(op.offset, _MOST_ITEMS))


def _check_depth(depth: Any) -> None:
    if depth is not None and (type(depth) is not int or depth < 0):
        raise InvalidInputError(
            "max_depth must be a whole number that is not negative, or None; nothing was listed"
        )


def _check_search(op: SearchOp) -> None:
    if op.query is not None and not isinstance(op.query, str):
        raise InvalidInputError(
            f"query must be a string, not {type(op.query).__name__}; nothing was searched"
        )
    if op.filter is not None and not isinstance(op.filter, Mapping):
        raise InvalidInputError(
            f"filter must be a mapping, not {type(op.filter).__name__}; nothing was searched"
        )
    check_filter(op.filter or {})


def _labels(namespace: Any) -> tuple[str, ...]:
    if isinstance(namespace, str | bytes) or not isinstance(namespace, Iterable):
        what = "one string" if isinstance(namespace, str) else type(namespace).__name__
        raise InvalidInputError(f"a namespace must be a tuple of labels, not {what}")
    return tuple(namespace)


def _check_condition(condition: MatchCondition) -> None:
    if condition.match_type not in ("prefix", "suffix"):
        raise InvalidInputError("match_type must be prefix or suffix; nothing was listed")
    _check_length(condition.path, "")


def _check_length(namespace: Sequence[str], key: str) -> None:
    if not isinstance(key, str):
        raise InvalidInputError(
            f"a key must be a string, not {type(key).__name__}; nothing was done. Pass str(...)"
        )

    if not is_text(key) or not all(is_text(label) for label in namespace if isinstance(label, str)):
        raise InvalidInputError(
            "a namespace or key has a NUL or a lone surrogate, which Postgres cannot hold; nothing"
            " was written"
        )
    size = len(".".join(map(str, namespace)).encode()) + len(key.encode())
    if size > _MOST_BYTES:
        raise InvalidInputError(
            f"namespace and key have {size} bytes together and may have {_MOST_BYTES}; nothing was"
            " written"
        )


async def _prepare(items: Items, backend: Backend, ops: list[Op]) -> _Plan:
    kept = (op for op in ops if isinstance(op, PutOp) and op.value is not None)
    plan = _Plan(ops, Embedded(), {}, sorted({op.namespace[0] for op in kept}))
    if items.embedding is not None:
        await _embed(items.embedding, backend, plan)
    await open_tokens(items, backend)
    return plan


async def open_tokens(items: Items, backend: Backend) -> None:
    """Have the key of the tokens, if there are any."""
    if items.keyring is not None and items.filterable and items.index_key is None:
        statements = sql.SELECT_INDEX_KEY, sql.ADD_INDEX_KEY
        items.index_key = await open_index_key(
            backend, items.keyring, statements, associated_data("index key", "store")
        )


def tokens(items: Items, root: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands in the readable part of a sealed item: its tokens, if it has any."""
    if items.index_key is None:
        return {}
    return {BLIND: items.index_key.tokens(value, items.filterable, "item", root)}


def key_place(root: str) -> bytes:
    """Return what a root's data key is bound to."""
    return associated_data("data key", "store", root)


async def _add_keys(items: Items, backend: Backend, roots: set[str]) -> _Keys:
    """
    Return the data keys of roots to write to.

    They are asked for each time: another process may have destroyed one a moment ago. Some
    have none, because they have items in the clear, and may.

    Raises:
        SealError: They have such items, and may not.
    """
    await _open_keys(items, backend.durable, backend, roots, roots)
    keys = _known(items, roots)
    missing = sorted(root for root in roots if root not in keys or keys[root].data_key is None)
    found = await backend.durable.fetch(sql.PLAIN_ROOTS, {"roots": missing}) if missing else ()
    plain = {root for (root,) in found}
    for root in missing:
        added = None if root in plain else await _add_key(items, backend, root)
        if added is not None:
            keys[root] = added
        else:
            plain.add(root)
    if plain and not items.may_be_plain:
        raise SealError(
            f"items under the first label {min(plain)!r} were written without encryption, or their"
            " data key was taken away, and this store has a keyring, so nothing is written beside"
            " them; nothing was changed. Set accept_plaintext= and have seal_existing() seal them,"
            " or delete them."
        )
    return keys


async def _add_key(items: Items, backend: Backend, root: str) -> RootKey | None:
    """
    Give a root a data key, committed before it is used.

    Returns:
        The one that it has; none if somebody put an item there in the clear just now.
    """
    assert items.keyring is not None
    data_key = DataKey.generate(items.keyring.cipher)
    wrapped = await wrap_key(backend, items.keyring, data_key, key_place(root))

    async def body(session: Session) -> list[Row]:
        await session.execute(sql.GUARD_ROOT_ALONE, {"root": root})
        await session.execute(sql.SWEEP_ROOT, {"root": root})
        if await session.fetch(sql.PLAIN_ROOTS, {"roots": [root]}):
            return []
        return await session.fetch(sql.ADD_KEY, {"root": root, "data_key": wrapped})

    found = await backend.durable.transact(body)
    return await _remember(items, backend, root, found[0][0]) if found else None


async def _opened(items: Items, session: Session, rows: Sequence[Row]) -> tuple[list[Row], _Keys]:
    """
    Return items, and the data keys of their roots as far as they have any.

    Those that were read in the clear, just before their root was sealed, are read again.
    """
    keys = await _open_rows(items, session, rows)
    torn = [row[:2] for row in rows if _is_torn(keys, row)]
    if not torn:
        return list(rows), keys
    found = await session.fetch(sql.GET, columns(torn, "prefixes", "keys"))
    again = {(row[0], row[1]): row for row in found}
    latest = [
        (*again[row[:2]], *row[_ITEM_COLUMNS:]) if row[:2] in again else row
        for row in rows
        if row[:2] in again or not _is_torn(keys, row)
    ]
    return latest, {**keys, **await _open_rows(items, session, found)}


def _is_torn(keys: _Keys, row: Row) -> bool:
    known = keys.get(_root(row[0]))
    return known is not None and known.data_key is not None and not is_sealed(row[3] or "")


async def _open_rows(items: Items, session: Session, rows: Sequence[Row]) -> _Keys:
    """Open the data keys of items; once more of those that were sealed by one not known yet."""
    roots = {_root(row[0]) for row in rows}
    keys, other = _known(items, roots), set()
    for prefix, _, _, type_, exact, *_ in rows:
        known = keys.get(_root(prefix))
        data_key = known.data_key if known is not None else None
        if type_ is not None and data_key is not None and not data_key.can_open(exact):
            other.add(_root(prefix))
    await _open_keys(items, session, session, roots, other)
    return _known(items, roots)


def _known(items: Items, roots: Iterable[str]) -> dict[str, RootKey]:
    found = {root: items.data_keys.get(root) for root in roots}
    return {root: known for root, known in found.items() if known is not None}


async def _open_keys(
    items: Items,
    source: Session | Durable,
    runner: Runner,
    roots: Iterable[str],
    other: Collection[str] = (),
) -> None:
    """
    Open the data keys of roots, as far as there are any, unless they were just now.

    Those and no others: what is wrong with one root stops nobody else.

    Args:
        items: What the store knows.
        source: Where to ask.
        runner: Where to wait for whoever wraps keys.
        roots: First labels.
        other: Those that are asked for in any case.
    """
    since = now() - _KEY_S
    wanted = {root for root in roots if items.opened_at.get(root, since) <= since} | {*other}
    if items.keyring is None or not wanted:
        return
    rows = await source.fetch(sql.FIND_KEYS, {"roots": sorted(wanted)})
    for root in wanted - {row[0] for row in rows}:  # what it seals nobody else could open
        _forget(items, root)
    for root, wrapped in rows:
        await _remember(items, runner, root, wrapped)


async def _remember(items: Items, runner: Runner, root: str, wrapped: bytes) -> RootKey:
    assert items.keyring is not None
    key = None
    if wrapped != SHREDDED:
        place = key_place(root)
        key = await unwrap_key(runner, items.keyring, items.opened, wrapped, place)
    known = items.data_keys[root] = RootKey(wrapped, key)
    items.opened_at[root] = now()
    items.opened_at.move_to_end(root)
    while len(items.opened_at) > _MOST_KEYS:
        oldest, asked_at = next(iter(items.opened_at.items()))
        if asked_at > now() - _IN_USE_S:
            break
        _forget(items, oldest)
    return known


def _forget(items: Items, root: str) -> None:
    items.data_keys.pop(root, None)
    items.opened_at.pop(root, None)


async def _embed(embedding: Embedding, backend: Backend, plan: _Plan) -> None:
    texts: dict[str, None] = {}
    for op in plan.ops:
        if isinstance(op, PutOp) and op.value is not None and op.index is not False:
            texts.update(dict.fromkeys(embedding.index.texts(op.value, op.index).values()))
    ranked = (op for op in plan.ops if isinstance(op, RankedSearchOp) and op.is_by_meaning)
    queries = {op.query for op in ranked if op.query}
    plan.queries = await embed_queries(embedding, backend, sorted(queries))
    plan.embedded = await embed_documents(embedding, backend, texts)


# --- writes ---------------------------------------------------------------------


async def _put(items: Items, session: Session, plan: _Plan, ops: list[PutOp]) -> None:
    last = {(".".join(op.namespace), op.key): op for op in ops}
    kept = {place: op for place, op in last.items() if op.value is not None}
    gone = [place for place in last if place not in kept]
    if gone:
        await session.execute(sql.DELETE, columns(gone, "prefixes", "keys"))
    if not kept:
        return
    rows = [(*place, *_encode(items, plan.keys, place, op), op.ttl) for place, op in kept.items()]
    names = ("prefixes", "keys", "values", "types", "exacts", "ttls")
    wrapped = [plan.keys[root].wrapped if root in plan.keys else None for root in plan.roots]
    expected = {"roots": plan.roots, "data_keys": wrapped}
    await session.execute(sql.PUT, columns(rows, *names) | expected)
    if items.index is not None:
        await _put_vectors(items.index, session, plan, kept)
    if items.texts is not None:
        await put_texts(items.texts, session, kept)


async def _put_vectors(
    index: VectorIndex, session: Session, plan: _Plan, kept: Mapping[tuple[str, str], PutOp]
) -> None:
    vectors, rows, waiting = plan.embedded.vectors, [], []
    for place, op in kept.items():
        texts = index.texts(op.value or {}, op.index) if op.index is not False else {}
        if all(text in vectors for text in texts.values()):
            rows += [(*place, name, vectors[text]) for name, text in texts.items()]
        else:
            paths = None if op.index is None else orjson.dumps(op.index).decode()
            waiting.append((*place, paths, plan.embedded.failure))
    await session.execute(queue.FORGET, columns(list(kept), "prefixes", "keys"))
    if waiting:
        await session.execute(queue.ADD, columns(waiting, "prefixes", "keys", "paths", "errors"))
    await replace_vectors(index, session, list(kept), rows)


async def replace_vectors(
    index: VectorIndex,
    session: Session,
    places: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, str, str, str]],
) -> None:
    """Have items at these places these vectors: place, name of the text and literal of each."""
    await session.execute(sql.DELETE_VECTORS, columns(places, "prefixes", "keys"))
    if rows:
        kind = composing.SQL(index.type)
        statement = composing.SQL(sql.INSERT_VECTORS).format(type=kind)
        names = ("prefixes", "keys", "fields", "embeddings")
        await session.execute(statement, columns(rows, *names))


def _encode(
    items: Items, keys: _Keys, place: tuple[str, str], op: PutOp
) -> tuple[str, str | None, bytes | None]:
    """Return the readable value, and type and bytes of the exact one if they differ."""
    value = dict(op.value or {})
    root = _root(place[0])
    if not _is_clear(items, keys, root):
        shown = tokens(items, root, value)
    elif is_plain(value):
        return orjson.dumps(value).decode(), None, None
    else:
        shown = {k: v if is_plain(v) else _HIDDEN for k, v in value.items() if is_plain(k)}
        shown = {k: v for k, v in shown.items() if isinstance(k, str)}
    type_, exact = _codec(items, keys, place[0]).dump(value, *place)
    return orjson.dumps(shown).decode(), type_, exact


def _is_clear(items: Items, keys: _Keys, root: str) -> bool:
    """Whether what a root has is in the clear, and may be."""
    return root not in keys and items.may_be_plain


def _codec(items: Items, keys: _Keys, prefix: str) -> Codec:
    root = _root(prefix)
    if _is_clear(items, keys, root):
        return codec_for(items.serde, None)
    if root not in keys:
        raise SealError(
            "an item that must be sealed is not: its namespace has no key. It was not used. Write"
            " it again through this store, or read it with an unsealed one."
        )
    if keys[root].data_key is None:
        raise ShreddedError(
            f"namespaces that begin with {root!r} were shredded: their data key is destroyed and"
            " nobody can read what they hold. Delete the items, and it can be used again."
        )
    return codec_for(items.serde, keys[root].data_key, "item", root)


def _root(prefix: str) -> str:
    return prefix.partition(".")[0]


# --- reads ----------------------------------------------------------------------


async def _read(
    items: Items, session: Session, space: Space, plan: _Plan, kind: type, ops: Sequence[Any]
) -> list[Result]:
    if kind is GetOp:
        return await _get(items, session, plan, ops)
    if kind is SearchOp:
        return [await _search(items, session, plan, op) for op in ops]
    return [await _list_namespaces(session, space, op) for op in ops]


async def _get(items: Items, session: Session, plan: _Plan, ops: Sequence[GetOp]) -> list[Result]:
    places = [(".".join(op.namespace), op.key) for op in ops]
    rows = await session.fetch(sql.GET, columns(list(set(places)), "prefixes", "keys"))
    rows, keys = await _opened(items, session, rows)
    found = {(row[0], row[1]): row for row in rows}
    wanted = [p for p, op in zip(places, ops, strict=True) if op.refresh_ttl]
    _note_read(plan, [found[place] for place in wanted if place in found])
    return [Item(**_decode(items, keys, found[p])) if p in found else None for p in places]


def query_for(items: Items, session: Session, op: SearchOp, vector: str | None) -> search.Query:
    """Plan a search, by meaning if there is a vector, of values that may have to be opened."""

    async def matching(rows: list[Row]) -> list[Row]:
        shown, keys = _not_shredded(*await _opened(items, session, rows))
        return [row for row in shown if matches(_decode(items, keys, row)["value"], op.filter)]

    if items.keyring is not None or not is_plain(op.filter or {}):
        return search.prepare(op, items.index, vector, matching, _wanted_tokens(items, op))
    return search.prepare(op, items.index, vector)


async def _search(
    items: Items, session: Session, plan: _Plan, op: RankedSearchOp
) -> list[SearchItem]:
    query = query_for(items, session, op, plan.queries.get(op.query or ""))
    rows = await ranking.run(session, query, op.options)
    rows, keys = _not_shredded(*await _opened(items, session, rows))
    if op.refresh_ttl:
        _note_read(plan, rows)
    return [SearchItem(**_decode(items, keys, row), score=row[-1]) for row in rows]


def _wanted_tokens(items: Items, op: SearchOp) -> dict[str, str]:
    """Return the tokens without which no item of one root matches; of several roots, none."""
    if items.index_key is None or not op.namespace_prefix or not op.filter:
        return {}
    named = [key for key in items.filterable if key in op.filter and "." not in key]  # no path
    equal = {key: _equal_to(op.filter[key]) for key in named}
    found = items.index_key.tokens(equal, list(equal), "item", op.namespace_prefix[0])
    return {key: token for key, token in found.items() if token}


def _equal_to(condition: Any) -> Any:
    """Return what a condition has a field be equal to; None if nothing."""
    return condition.get("$eq") if isinstance(condition, Mapping) else condition


def _not_shredded(rows: list[Row], keys: _Keys) -> tuple[list[Row], _Keys]:
    """Leave out the items that nobody can read: a search is about what there is to find."""
    gone = {root for root, known in keys.items() if known.data_key is None}
    return [row for row in rows if _root(row[0]) not in gone], keys


def _note_read(plan: _Plan, rows: Sequence[Row]) -> None:
    plan.read.update((row[0], row[1]) for row in rows if row[7])


def _decode(items: Items, keys: _Keys, row: Row) -> dict[str, Any]:
    try:
        return _decoded(items, keys, row)
    except VatError as error:
        error.add_note(f"This is of item {row[1]!r} of namespace {row[0]!r}.")
        raise


def _decoded(items: Items, keys: _Keys, row: Row) -> dict[str, Any]:
    prefix, key, value, type_, exact, created_at, updated_at = row[:7]
    if type_ is not None:
        value = _codec(items, keys, prefix).load(type_, exact, prefix, key)
    elif not _is_clear(items, keys, _root(prefix)):
        raise SealError(
            f"item {key!r} of {prefix!r} must be sealed and is not. It was not used. Set"
            " accept_plaintext= and have seal_existing() seal it, write it again through this"
            " store, or read it with an unsealed one."
        )
    return {
        "namespace": tuple(prefix.split(".")),
        "key": key,
        "value": value,
        "created_at": created_at,
        "updated_at": updated_at,
    }


async def value_in(items: Items, session: Session, row: Row) -> Any:
    """Return the value of an item as `sql.GET` selected it; None if it is gone meanwhile."""
    rows, keys = await _opened(items, session, [row])
    return _decode(items, keys, rows[0])["value"] if rows else None


async def _list_namespaces(
    session: Session, space: Space, op: ListNamespacesOp
) -> list[tuple[str, ...]]:
    params = namespaces.listing(space.root, op.match_conditions or (), op.max_depth)
    page = {"limit": op.limit, "offset": op.offset}
    return [tuple(labels) for (labels,) in await session.fetch(namespaces.LIST, params | page)]
