"""
Search: which items, in which order.

Without a query the order is total: last updated first. With one, the items
with vectors come by the distance of their best one, then the others: pages
over both show every match exactly once.

Where few items are in the namespace and pass the filter, all their vectors
are compared: the answer is exact. Where there are many, the index is scanned
until enough have passed; should it stop short, all are compared after all.

Sealed values cannot be filtered in SQL. Their filter is applied to the opened
values, in the same order, until the page is full.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from langgraph.store.base import IndexConfig, SearchOp
from langgraph.store.base.embed import ensure_embeddings, get_text_at_path, tokenize_path
from psycopg import sql as composing

from langgraph_vat._durable import items as sql
from langgraph_vat._durable.filters import to_sql
from langgraph_vat._io.protocols import Row, Session
from langgraph_vat.errors import ConfigurationError, UnavailableError

# Up to so many candidates, comparing all is as quick as the index.
_FEW = 10_000
_PAGE = 200
# pgvector indexes vectors up to these dimensions.
_MOST_DIMS = {"vector": 2_000, "halfvec": 4_000}
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
        self.dims = given.get("dims")
        if not isinstance(self.dims, int) or self.dims < 1:
            raise ConfigurationError("index needs dims, the length of its vectors")
        self.embeddings = ensure_embeddings(given.get("embed"))
        self.fields = [_field(path) for path in given.get("fields") or ["$"]]
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
        names = {"m": "m", "ef_construction": "ef_construction", "nlist": "lists"}
        options = ", ".join(f"{name} = {int(ann[k])}" for k, name in names.items() if k in ann)
        self.options = f" WITH ({options})" if options else ""

    def texts(self, value: Mapping[str, Any], paths: Sequence[str] | None) -> dict[str, str]:
        """Return the texts of a value to embed, by the name of their field."""
        fields = self.fields if paths is None else [_field(path) for path in paths]
        found: dict[str, str] = {}
        for path, tokens in fields:
            texts = get_text_at_path(value, cast("Any", tokens))
            names = [path] if len(texts) == 1 else [f"{path}.{i}" for i in range(len(texts))]
            found.update(zip(names, texts, strict=True))
        return found

    def literal(self, vector: Sequence[float]) -> str:
        """
        Return a vector as pgvector reads it.

        Raises:
            ConfigurationError: The embedder gave another number of dimensions.
        """
        if len(vector) != self.dims:
            raise ConfigurationError(
                f"the embedder returned {len(vector)} dimensions and index= says {self.dims};"
                " nothing was written"
            )
        return "[" + ",".join(map(repr, map(float, vector))) + "]"

    def score(self, distance: float | None) -> float | None:
        """Return the score of a distance: greater is nearer, and 1 is equal for cosine."""
        if distance is None:
            return None
        return 1 - distance if self.distance == "cosine" else -distance


def _field(path: str) -> tuple[str, Any]:
    return path, "$" if path == "$" else tokenize_path(path)


@dataclass(slots=True)
class Query:
    """One search, ready to run."""

    op: SearchOp
    index: VectorIndex | None
    vector: str | None
    condition: composing.Composed
    params: dict[str, Any]
    matches: Callable[[Row], bool] | None
    """Tells by the opened value, where SQL cannot."""

    def compose(self, statement: str) -> composing.Composed:
        """Fill a statement's operator, type and filter in."""
        index = self.index
        return composing.SQL(statement).format(
            filter=self.condition,
            operator=composing.SQL(index.operator if index else ""),
            type=composing.SQL(index.type if index else ""),
        )


def prepare(
    op: SearchOp,
    index: VectorIndex | None,
    vector: str | None,
    matches: Callable[[Row], bool] | None,
) -> Query:
    """Plan a search; `matches` is given where values are sealed."""
    condition = composing.Composed([composing.SQL("true")])
    params: dict[str, Any] = {}
    if op.filter:
        in_sql = to_sql(op.filter) if matches is None else None
        if in_sql is not None:
            condition, params = in_sql
    params |= {"prefix": ".".join(op.namespace_prefix), "query": vector}
    return Query(op, index, vector, condition, params, matches if op.filter else None)


async def run(session: Session, query: Query) -> list[Row]:
    """Return the rows of one page: an item's columns and its distance, if it has one."""
    first, last = query.op.offset, query.op.offset + query.op.limit
    if query.matches is not None:
        return (await _until(session, query, last))[first:last]
    if query.vector is not None and await _is_large(session, query):
        rows = await _nearest(session, query, last)
        if len(rows) >= last:
            return rows[first:last]
    return await _ordered(session, query, query.op.limit, first)


async def _ordered(session: Session, query: Query, limit: int, offset: int) -> list[Row]:
    statement = query.compose(sql.LIST if query.vector is None else sql.EXACT)
    return await session.fetch(statement, {**query.params, "limit": limit, "offset": offset})


async def _until(session: Session, query: Query, enough: int) -> list[Row]:
    assert query.matches is not None
    found: list[Row] = []
    for offset in range(0, 2**62, _PAGE):
        rows = await _ordered(session, query, _PAGE, offset)
        found += filter(query.matches, rows)
        if len(found) >= enough or len(rows) < _PAGE:
            break
    return found


async def _is_large(session: Session, query: Query) -> bool:
    if query.index is None or query.index.kind == "flat":
        return False
    params = {**query.params, "most": _FEW + 1}
    return bool((await session.fetch(query.compose(sql.COUNT), params))[0][0] > _FEW)


async def _nearest(session: Session, query: Query, enough: int) -> list[Row]:
    """Return items by their nearest vector; fewer than `enough` if the scan stopped short."""
    await session.execute(sql.ITERATIVE_SCAN)
    limit = 2 * enough
    while True:
        params = {**query.params, "limit": limit}
        rows = await session.fetch(query.compose(sql.NEAREST), params)
        items = {(row[0], row[1]): row for row in reversed(rows)}
        if len(items) >= enough or len(rows) < limit:
            return sorted(items.values(), key=lambda row: row[-1])
        limit *= 4


def failed_to_embed(error: Exception) -> UnavailableError:
    """Say that an embedder failed, and not on what."""
    return UnavailableError(
        f"the embedder failed ({type(error).__name__}); nothing was written or read. Repeat it"
        " when the embedder works."
    )
