"""
Search: which items, in which order.

Without a query the order is total: last updated first. With one, the items
with vectors come by the distance of their best one, then the others. The
order is total, too: pages show every match exactly once.

Where few items are in the namespace and pass the filter, and on every page
but the first, all their vectors are compared: the answer is exact. For the
first page of many, the index is scanned until enough have passed; should it
stop short, all are compared after all. The index may miss one of the nearest,
so that page can differ by it from what the next one continues.

Sealed values cannot be filtered in SQL. Their filter is applied to the opened
values, in the same order, until the page is full; where fields have tokens, to
those alone that have the right ones.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString, TypeAlias, cast

import orjson
from langchain_core.embeddings import Embeddings
from langgraph.store.base import IndexConfig, SearchOp
from langgraph.store.base.embed import ensure_embeddings
from psycopg import sql as composing

from langgraph_vat._durable import items as sql
from langgraph_vat._durable.blind import item_condition
from langgraph_vat._durable.filters import to_sql
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Row, Session
from langgraph_vat._ops.fields import Fields
from langgraph_vat._seal.blind_index import BLIND
from langgraph_vat.errors import ConfigurationError, UnavailableError

Matching: TypeAlias = Callable[[list[Row]], Awaitable[list[Row]]]

# Up to so many candidates, comparing all is as quick as the index.
_FEW = 2_000
_ALL = 2**62
_PAGE = 200
# pgvector indexes vectors up to these dimensions.
_MOST_DIMS = {"vector": 2_000, "halfvec": 4_000}
# Their greatest numbers.
_MOST = {"vector": 3.4e38, "halfvec": 65_504.0}
_OPERATORS = {"cosine": "<=>", "l2": "<->", "inner_product": "<#>"}
_OPCLASSES = {"cosine": "cosine", "l2": "l2", "inner_product": "ip"}


class VectorIndex:
    """
    What is embedded and how it is compared, from LangGraph's `IndexConfig`.

    Raises:
        ConfigurationError: The configuration cannot work.
    """

    def __init__(self, config: IndexConfig) -> None:
        given = cast("Mapping[str, Any]", config)
        ann = given.get("ann_index_config") or {}
        if not isinstance(ann, Mapping):
            raise ConfigurationError("ann_index_config must be a dict, as PostgresStore takes it")
        self.dims = given.get("dims")
        if type(self.dims) is not int or self.dims < 1:
            raise ConfigurationError("index needs dims, the length of its vectors")
        self.embeddings = _embeddings(given.get("embed"))
        self.fields = Fields(given.get("fields"))
        self.distance = given.get("distance_type", "cosine")
        if self.distance not in _OPERATORS:
            raise ConfigurationError(f"distance_type must be one of {', '.join(_OPERATORS)}")
        chosen = "vector" if self.dims <= _MOST_DIMS["vector"] else "halfvec"
        vector_type = ann.get("vector_type", chosen)
        if vector_type not in _MOST_DIMS:
            raise ConfigurationError(f"vector_type must be one of {', '.join(_MOST_DIMS)}")
        fits = self.dims <= _MOST_DIMS[vector_type]
        self.kind = ann.get("kind", "hnsw" if fits else "flat")
        if self.kind not in ("hnsw", "ivfflat", "flat"):
            raise ConfigurationError("kind must be hnsw, ivfflat or flat")
        self.type = f"{vector_type}({self.dims})"
        self.operator = _OPERATORS[self.distance]
        self.opclass = f"{vector_type}_{_OPCLASSES[self.distance]}_ops"
        self.options = _options(ann)

    def texts(self, value: Mapping[str, Any], paths: Sequence[str] | None) -> dict[str, str]:
        """Return the texts of a value to embed, by the name of their field."""
        return self.fields.texts(value, paths)

    def literals(self, vectors: Any, count: int) -> list[str]:
        """
        Return the vectors of `count` texts as pgvector reads them.

        Raises:
            ConfigurationError: The embedder gave another number of vectors or
                of dimensions, or numbers that the column cannot hold.
        """
        found = _numbers(vectors)
        if found is None:
            raise _bad_vectors("something other than lists of numbers")
        if len(found) != count:
            raise _bad_vectors(f"{len(found)} vectors for {count} texts")
        return [self._literal(vector) for vector in found]

    def _literal(self, vector: list[float]) -> str:
        if len(vector) != self.dims:
            raise _bad_vectors(f"{len(vector)} dimensions and index= says {self.dims}")
        most = _MOST[self.type.partition("(")[0]]
        if not all(abs(number) <= most for number in vector):
            raise _bad_vectors(f"a number that a {self.type} cannot hold, such as NaN")
        return "[" + ",".join(map(repr, vector)) + "]"

    def score(self, distance: float | None) -> float | None:
        """Return the score of a distance: greater is nearer, and 1 is equal for cosine."""
        if distance is None:
            return None
        return 1 - distance if self.distance == "cosine" else -distance


def _bad_vectors(what: str) -> ConfigurationError:
    return ConfigurationError(f"the embedder returned {what}; nothing was written")


def _numbers(vectors: Any) -> list[list[float]] | None:
    """Return what an embedder gave as lists of floats, its own kinds of both included."""
    try:
        found = [list(vector) for vector in vectors]
        # What only looks like a number is one of somebody's text.
        if any(isinstance(number, str | bytes) for vector in found for number in vector):
            return None
        return [[float(number) for number in vector] for vector in found]
    except (TypeError, ValueError, OverflowError):
        return None


def _options(ann: Mapping[str, Any]) -> str:
    names = {"m": "m", "ef_construction": "ef_construction", "nlist": "lists"}
    given = {key: ann[key] for key in names if key in ann}
    for key, value in given.items():
        if type(value) is not int:
            raise ConfigurationError(f"{key} of ann_index_config must be a whole number")
    options = ", ".join(f"{names[key]} = {value}" for key, value in given.items())
    return f" WITH ({options})" if options else ""


def _embeddings(embed: Any) -> Embeddings:
    """
    Return what embeds.

    Raises:
        ConfigurationError: It is missing, is no such thing, or a provider that is not installed.
    """
    if not (isinstance(embed, str | Embeddings) or callable(embed)):
        raise ConfigurationError(
            "index needs embed: a function of a list of texts, LangChain Embeddings, or the name"
            " of a provider and its model"
        )
    try:
        return ensure_embeddings(embed)
    except (ValueError, ImportError) as error:
        raise ConfigurationError(
            f"the embedder that index names cannot be loaded: {error}"
        ) from error


@dataclass(slots=True)
class Query:
    """One search, ready to run."""

    op: SearchOp
    index: VectorIndex | None
    vector: str | None
    condition: composing.Composable
    params: dict[str, Any]
    matching: Matching | None
    """Tells by the opened value, where SQL cannot."""

    def compose(
        self, statement: LiteralString, selected: LiteralString = sql.ITEM
    ) -> composing.Composed:
        """Fill a statement's columns, operator, type and filter in."""
        index = self.index
        return composing.SQL(statement).format(
            columns=composing.SQL(selected),
            filter=self.condition,
            operator=composing.SQL(index.operator if index else ""),
            type=composing.SQL(index.type if index else ""),
        )


def prepare(
    op: SearchOp,
    index: VectorIndex | None,
    vector: str | None,
    matching: Matching | None = None,
    tokens: Mapping[str, str] | None = None,
) -> Query:
    """Plan a search; `matching` is given where values are sealed, with the tokens they need."""
    condition: composing.Composable = composing.SQL("true")
    params: dict[str, Any] = {}
    if op.filter:
        in_sql = to_sql(op.filter) if matching is None else None
        if in_sql is not None:
            condition, params = in_sql
    if tokens:
        condition = item_condition(tokens)
        wanted = [orjson.dumps({BLIND: {key: token}}).decode() for key, token in tokens.items()]
        params = {f"blind_{number}": one for number, one in enumerate(wanted)}
    params |= {"prefix": ".".join(op.namespace_prefix), "query": vector}
    return Query(op, index, vector, condition, params, matching if op.filter else None)


async def run(session: Session, query: Query) -> list[Row]:
    """Return the rows of one page: an item's columns and its distance, if it has one."""
    last = query.op.limit
    is_first = query.op.offset == 0 < last and query.matching is None
    if query.vector is not None and is_first and _has_index(query):
        page, is_all = await _compared(session, query, sql.ITEM, last, 0, few=_FEW)
        if not is_all:
            page = await _nearest(session, query, last)
        if page or is_all:
            return page
    return await exact(session, query)


async def exact(session: Session, query: Query) -> list[Row]:
    """Return them without any index of vectors: what is on a page is on no other."""
    first, last = query.op.offset, query.op.offset + query.op.limit
    if query.matching is not None:
        # What there is is asked once: no row shifts.
        places = await _ordered(session, query, sql.PLACE, None, 0)
        return (await opened(session, query, places, last))[first:last]
    return await _ordered(session, query, sql.ITEM, query.op.limit, first)


def _has_index(query: Query) -> bool:
    return query.index is not None and query.index.kind != "flat"


async def _ordered(
    session: Session, query: Query, selected: LiteralString, limit: int | None, offset: int
) -> list[Row]:
    """Return a page of all candidates in their total order."""
    if query.vector is not None:
        return (await _compared(session, query, selected, limit, offset, few=_ALL))[0]
    params = {**query.params, "limit": limit, "offset": offset}
    return await session.fetch(query.compose(sql.LIST, selected), params)


async def _compared(
    session: Session,
    query: Query,
    selected: LiteralString,
    limit: int | None,
    offset: int,
    *,
    few: int,
) -> tuple[list[Row], bool]:
    """Return a page by comparing all candidates, and True; False if they are more than `few`."""
    params = {**query.params, "few": few, "limit": limit, "offset": offset}
    rows = await session.fetch(query.compose(sql.EXACT, selected), params)
    return [row[:-1] for row in rows if row[0] is not None], rows[0][-1] <= few


async def opened(session: Session, query: Query, places: Sequence[Row], enough: int) -> list[Row]:
    """Open what is at these places in order until enough match: of each its last column, too."""
    assert query.matching is not None
    found: list[Row] = []
    for start in range(0, len(places), _PAGE):
        last = {(prefix, key): one for prefix, key, one in places[start : start + _PAGE]}
        rows = await session.fetch(sql.GET, columns(list(last), "prefixes", "keys"))
        by_place = {(row[0], row[1]): row for row in rows}
        ordered = [(*by_place[p], one) for p, one in last.items() if p in by_place]
        found += await query.matching(ordered)
        if len(found) >= enough:
            break
    return found


async def _nearest(session: Session, query: Query, enough: int) -> list[Row]:
    """Return a first page by the index; nothing where the index cannot tell what belongs on it."""
    await session.execute(sql.ITERATIVE_SCAN)
    for limit in (enough + 1, 4 * enough, 32 * enough):
        rows = await session.fetch(query.compose(sql.NEAREST), {**query.params, "limit": limit})
        items: dict[tuple[str, str], Row] = {}
        for row in rows:
            items.setdefault((row[0], row[1]), row)  # the first is its nearest
        page = sorted(items.values(), key=_order)[:enough]
        is_end = len(rows) < limit
        # Equal distances come in any order: the page is known once something farther was seen.
        if len(page) == enough and (is_end or rows[-1][-1] > page[-1][-1]):
            return page
        if is_end:
            break
    return []


def _order(row: Row) -> tuple[float, float, str, str]:
    """As `sql.EXACT` orders."""
    return row[-1], -row[6].timestamp(), row[0], row[1]


def failed_to_embed(kind: str) -> UnavailableError:
    """Say that an embedder failed with which type of exception, and not on what."""
    return UnavailableError(
        f"the embedder failed ({kind}); nothing was written or read. Repeat it"
        " when the embedder works."
    )
