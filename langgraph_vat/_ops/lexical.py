"""
Search by words: which items have those of the query, the rarest counting most.

Any text is a query: it is read as the items' texts were, and any of its words will do. What
has the most telling ones comes first (BM25), then all other items, as in a search without
a query. So the order is total, and pages show every match exactly once.

The cost is bounded. Words are counted within the namespace that is searched, and not beyond
some thousands. Items are scored that have one of the rarest words, as many words as there
are few enough items for; if these are not many, so are, up to that bound, the latest that
have the next word. Words more frequent than these count only where one of these is, too.
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, LiteralString, TypeAlias

from psycopg import sql as composing

from langgraph_vat._durable import items as items_sql
from langgraph_vat._durable import lexical as sql
from langgraph_vat._io.protocols import Row, Session
from langgraph_vat._ops import search
from langgraph_vat._ops.search import Query
from langgraph_vat._ops.texts import readable

Asked: TypeAlias = Mapping[str, Any]
Ordered: TypeAlias = Callable[
    [Session, Query, Asked | None, LiteralString, int | None, int],
    Awaitable[tuple[list[Row], int]],
]

# BM25's k1 + 1, for 1.2.
_SCALE = 2.2
_MOST_QUERY_BYTES = 10_000
_MOST_WORDS = 32
# To score one takes some 20 µs.
_MOST_SCORED = 2_000
_ENOUGH = 200
_MOST_KNOWN = 50_000


async def run(session: Session, query: Query) -> list[Row]:
    """Return the rows of one page: an item's columns and its score, if it has one."""
    return await _page(session, query, _ordered)


async def best(session: Session, query: Query) -> list[Row]:
    """Return those of them that have a score."""
    return await _page(session, query, _scored)


def narrowed(query: Query, condition: LiteralString, params: Mapping[str, Any]) -> Query:
    """Return a search for fewer items; the condition says where the one before it belongs."""
    narrow = composing.SQL(condition).format(filter=query.condition)
    return replace(query, condition=narrow, params={**query.params, **params})


async def _page(session: Session, query: Query, ordered: Ordered) -> list[Row]:
    first, last = query.op.offset, query.op.offset + query.op.limit
    asked = await _ask(session, query)
    if query.matching is not None:
        places, _ = await ordered(session, query, asked, items_sql.PLACE, None, 0)
        return (await search.opened(session, query, places, last))[first:last]
    return (await ordered(session, query, asked, items_sql.ITEM, query.op.limit, first))[0]


async def _ask(session: Session, query: Query) -> Asked | None:
    """Return the words by which items are looked for and scored, as parameters; None of none."""
    limits = {"most_words": _MOST_WORDS, "most_known": _MOST_KNOWN, "most_scored": _MOST_SCORED}
    text = readable(query.op.query or "", _MOST_QUERY_BYTES)
    params = {"prefix": query.params["prefix"], "text": text, **limits}
    rows = await session.fetch(sql.ASK, params, plan_anew=True)
    words, rare = _chosen([(quoted, count) for _, quoted, count, *_ in rows if count])
    if not words:
        return None
    return {
        "words": " | ".join(words),
        "rare_words": " | ".join(rare),
        "lexemes": [row[0] for row in rows],
        "weights": [_weight(count, known) for _, _, count, known, _ in rows],
        "average": max(rows[0][-1] or 0.0, 1.0),
        "most_scored": _MOST_SCORED,
    }


def _chosen(words: list[tuple[str, int]]) -> tuple[list[str], list[str]]:
    """Return of words, the rarest first, those to look for, and those whose items all count."""
    found, total = [quoted for quoted, _ in words], 0
    for position, (_, count) in enumerate(words):
        if total + count > _MOST_SCORED:
            rare = found[:position]
            # One more, where these are not enough; if there is none, of it none comes first.
            return (rare, rare) if total >= _ENOUGH else (found[: position + 1], rare or found)
        total += count
    return found, found


def _weight(count: int, known: int) -> float:
    """Return what a word is worth that so many of the known items have: never less than 0."""
    known = max(known, count)
    return _SCALE * math.log(1 + (known - count + 0.5) / (count + 0.5))


async def _scored(
    session: Session,
    query: Query,
    asked: Asked | None,
    selected: LiteralString,
    limit: int | None,
    offset: int,
) -> tuple[list[Row], int]:
    """Return a page of the candidates that have a score, and how many have one."""
    if asked is None:
        return [], 0
    params = {**query.params, **asked, "limit": limit, "offset": offset}
    rows = await session.fetch(query.compose(sql.SCORED, selected), params, plan_anew=True)
    return [row[:-1] for row in rows if row[0] is not None], rows[0][-1]


async def _ordered(
    session: Session,
    query: Query,
    asked: Asked | None,
    selected: LiteralString,
    limit: int | None,
    offset: int,
) -> tuple[list[Row], int]:
    """Return a page of all candidates in their total order, and how many have a score."""
    rows, scored = await _scored(session, query, asked, selected, limit, offset)
    left = None if limit is None else limit - len(rows)
    if left == 0:
        return rows, scored
    others = query if asked is None else narrowed(query, sql.UNSCORED, asked)
    params = {**others.params, "limit": left, "offset": max(0, offset - scored)}
    return rows + await session.fetch(others.compose(items_sql.LIST, selected), params), scored
