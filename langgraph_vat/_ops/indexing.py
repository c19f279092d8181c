"""
Items that wait for their vectors: whoever has an index takes them up.

1. A page is taken for a while, in a statement that commits. No transaction is open while
   items are embedded, and who dies has lost the page when the time is over.
2. Vectors are stored only of items that are as they were read, in the transaction that
   takes them off the queue; so of two who did the same, one stores.
3. What cannot be opened, or embedded, stays, and waits longer each time. It stops no others:
   where a page fails, the embedder is asked for something else; if that fails, too, all wait,
   else each item is tried for itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg

from langgraph_vat._durable import embedding as sql
from langgraph_vat._durable import items as items_sql
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Backend, Row, Session
from langgraph_vat._ops.embedding import Embedded, Embedding, embed_queued, failure_for_all
from langgraph_vat._ops.items import Items, replace_vectors, value_in
from langgraph_vat._ops.shared import now
from langgraph_vat._records import Pending
from langgraph_vat.errors import ConfigurationError

_PAGE = 32


@dataclass(slots=True)
class _Waiting:
    """An item that waits, as it was taken and read."""

    place: tuple[str, str]
    since: datetime
    updated_at: datetime | None = None
    texts: dict[str, str] | None = None
    """By the names of their fields; None if it could not be opened, or is not there."""
    error: str | None = None
    """The type of what was raised; None if nothing was."""
    is_due: bool = False
    """Whether it may be tried again at once."""


async def count_pending(items: Items, backend: Backend) -> Pending:
    """
    Return what waits.

    Raises:
        ConfigurationError: There is no index.
    """
    _required(items)
    return Pending(*(await backend.durable.fetch(sql.COUNT))[0])


async def index_pending(
    items: Items, backend: Backend, *, is_all_due: bool = False
) -> tuple[int, str]:
    """
    Try what waits, each once, until nothing is left or the embedder fails for all.

    Args:
        items: What the store knows.
        backend: Where to ask.
        is_all_due: Whether what failed a moment ago is tried, too.

    Returns:
        How many have their vectors now, and the type of what the embedder raised at last.

    Raises:
        ConfigurationError: There is no index.
    """
    embedding = _required(items)
    begun = (await backend.durable.fetch(sql.NOW))[0][0]
    # A page at once, something else, then each for itself as far as there is time.
    taken_s = 4 * embedding.timeout_s + 60
    due = "infinity" if is_all_due else begun
    params = {"due": due, "begun": begun, "taken_s": taken_s, "limit": _PAGE}
    indexed, failure = 0, ""
    while not (failure or embedding.is_closed):
        rows = await backend.durable.fetch(sql.TAKE, params)
        if not rows:
            break
        done, failure = await _index(items, embedding, backend, rows)
        indexed += done
    return indexed, failure


def _required(items: Items) -> Embedding:
    if items.embedding is None:
        raise ConfigurationError("this store has no index, so nothing waits for one; pass index=")
    return items.embedding


async def _index(
    items: Items, embedding: Embedding, backend: Backend, rows: Sequence[Row]
) -> tuple[int, str]:
    waiting = await _read(items, embedding, backend, rows)
    readable = [one for one in waiting if one.texts is not None]
    found, is_out = await _embed(embedding, backend, readable)
    ready = [one for one in waiting if one.texts is not None and _has(found, one.texts)]
    done = await _store(embedding, backend, ready, found)
    left = [one for one in waiting if one.place not in done]
    for one in left if embedding.is_closed else ():
        one.error, one.is_due = None, True
    given = [(*one.place, one.since, one.error, one.is_due) for one in left]
    if given:
        names = ("prefixes", "keys", "sinces", "errors", "are_due")
        await backend.durable.fetch(sql.GIVE_BACK, columns(given, *names))
    return len(done), found.failure if is_out or not done else ""


async def _read(
    items: Items, embedding: Embedding, backend: Backend, rows: Sequence[Row]
) -> list[_Waiting]:
    async def body(session: Session) -> list[_Waiting]:
        places = columns([row[:2] for row in rows], "prefixes", "keys")
        found = {row[:2]: row for row in await session.fetch(items_sql.GET, places)}
        return [await _read_one(items, embedding, session, row, found.get(row[:2])) for row in rows]

    return await backend.durable.transact(body)


async def _read_one(
    items: Items,
    embedding: Embedding,
    session: Session,
    taken: Row,
    item: Row | None,
) -> _Waiting:
    prefix, key, since, paths = taken
    one = _Waiting((prefix, key), since)
    if item is None:
        return one
    try:
        value = await value_in(items, session, item)
        one.texts = embedding.index.texts(value or {}, paths)
    except psycopg.Error:
        raise
    except Exception as error:  # noqa: BLE001 - a serializer, or a path, may raise anything
        one.error = type(error).__name__
    one.updated_at = item[6]
    return one


async def _embed(
    embedding: Embedding, backend: Backend, waiting: Sequence[_Waiting]
) -> tuple[Embedded, bool]:
    """Embed a page; of one that fails each item, unless the embedder fails for all: say if so."""
    texts = dict.fromkeys(text for one in waiting for text in (one.texts or {}).values())
    found = await embed_queued(embedding, backend, texts)
    if not found.failure:
        return found, False
    left = [one for one in waiting if not _has(found, one.texts or {})]
    if failure := await failure_for_all(embedding, backend):
        for one in left:
            one.error, one.is_due = failure, True
        if not embedding.is_closed:
            embedding.outage.say(failure)
        return found, True
    until = now() + 2 * embedding.timeout_s
    for one in left:
        if now() > until:
            one.is_due = True
            continue
        own = await embed_queued(embedding, backend, (one.texts or {}).values())
        one.error = own.failure or None
        found.vectors.update(own.vectors)
    return found, False


def _has(found: Embedded, texts: Mapping[str, str]) -> bool:
    return all(text in found.vectors for text in texts.values())


async def _store(
    embedding: Embedding, backend: Backend, ready: Sequence[_Waiting], found: Embedded
) -> set[tuple[str, str]]:
    """Store vectors of items that are as they were read; return which those were."""
    by_place = {one.place: one for one in ready}

    async def body(session: Session) -> set[tuple[str, str]]:
        read = [(*one.place, one.updated_at) for one in ready]
        names = ("prefixes", "keys", "updated")
        same = await session.fetch(sql.LOCK_UNCHANGED, columns(read, *names))
        taken = [(*row, by_place[row].since) for row in same]
        names = ("prefixes", "keys", "sinces")
        done = await session.fetch(sql.FINISH, columns(taken, *names))
        rows = [
            (*place, name, found.vectors[text])
            for place in done
            for name, text in (by_place[place].texts or {}).items()
        ]
        await replace_vectors(embedding.index, session, done, rows)
        return set(done)

    return await backend.durable.transact(body) if ready else set()
