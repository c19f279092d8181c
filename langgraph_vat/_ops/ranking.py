"""
How what a search finds is ordered: by meaning, by words, or by both.

``search`` and ``lexical`` say what their orders are. ``hybrid`` fuses the beginnings of both:
an item's score is the sum of 1 / (60 + its rank) over those that have it (reciprocal rank
fusion: Cormack, Clarke and Büttcher, 2009). What neither has comes after, by meaning again.
How long the beginnings are depends on the size of a page and not on its number, so pages of
one size show every match exactly once.

Whatever the order, items with a score come before those without, the greatest first.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self, TypedDict, cast

from langgraph.store.base import SearchOp

from langgraph_vat._durable import lexical as sql
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Row, Session
from langgraph_vat._ops import lexical, search
from langgraph_vat._ops.search import Query, VectorIndex
from langgraph_vat.errors import ConfigurationError, InvalidInputError
from langgraph_vat.settings import Settings, search_fault

# Their constant, which nobody has to choose.
_K = 60
# Where a list holds nearly all there is, to be in it says nothing: the deeper, the more
# any common word outweighs the nearest meaning (tests/store/test_recall.py).
_LEAST_DEPTH, _PAGES_DEEP = 20, 2


class SearchOptions(TypedDict, total=False):
    """What LangGraph's search has no parameters for; see `SemanticStore.search`."""

    ranking: Literal["vector", "lexical", "hybrid"] | None
    min_score: float | None
    ef_search: int | None
    max_scan_tuples: int | None


class RankedSearchOp(SearchOp):
    """A search with options of its own."""

    options: SearchOptions

    def __new__(cls, *fields: Any, options: SearchOptions) -> Self:
        """Return one of a search's fields."""
        made = super().__new__(cls, *fields)
        made.options = options
        return made

    def _replace(self, **changes: Any) -> "RankedSearchOp":
        return RankedSearchOp(*super()._replace(**changes), options=self.options)

    @property
    def is_by_meaning(self) -> bool:
        """Whether its query is to be embedded."""
        return self.options.get("ranking") in ("vector", "hybrid")


class Rankings:
    """
    How a store can order what it finds, and how it does unless a search says so.

    Raises:
        ConfigurationError: What the settings say is not among it.
    """

    def __init__(self, index: VectorIndex | None, settings: Settings) -> None:
        self._has_vectors = index is not None
        self._has_hnsw = index is not None and index.kind == "hnsw"
        self._has_texts = settings.text_search is not None
        usual = "vector" if self._has_vectors else "lexical" if self._has_texts else None
        self._default = {
            "ranking": settings.ranking or usual,
            "ef_search": settings.ef_search,
            "max_scan_tuples": settings.max_scan_tuples,
        }
        if fault := self._fault(self._default):
            raise ConfigurationError(fault)

    def completed(self, op: SearchOp) -> RankedSearchOp:
        """Return a search with all its options, or refuse it; without a query there is no rank."""
        given = op.options if isinstance(op, RankedSearchOp) else {}
        fault = self._fault(given)
        chosen = {name: value for name, value in given.items() if value is not None}
        options = {**self._default, **chosen}
        if not op.query:
            options["ranking"] = None
        if options["ranking"] is None and "min_score" in options:
            fault = fault or "min_score needs a query, since without one no item has a score"
        if fault:
            raise InvalidInputError(f"{fault}; nothing was searched")
        return RankedSearchOp(*op, options=cast("SearchOptions", options))

    def _fault(self, options: Mapping[str, Any]) -> str:
        """Return what is wrong with options; nothing if they are well."""
        if unknown := sorted(options.keys() - SearchOptions.__annotations__):
            return f"a search has no option {unknown[0]!r}"
        if fault := next(filter(None, (search_fault(*one) for one in options.items())), ""):
            return fault
        ranking = options.get("ranking")
        if ranking in ("vector", "hybrid") and not self._has_vectors:
            return f"ranking={ranking!r} needs a store with index="
        if ranking in ("lexical", "hybrid") and not self._has_texts:
            return f"ranking={ranking!r} needs a store with text_search="
        scan = [name for name in sql.TUNED if options.get(name) is not None]
        return f"{scan[0]} needs a store with an HNSW index" if scan and not self._has_hnsw else ""


async def run(session: Session, query: Query, options: SearchOptions) -> list[Row]:
    """Return the rows of one page: an item's columns and its score, if it has one."""
    tuned = {name: options.get(name) for name in sql.TUNED if options.get(name) is not None}
    for name, value in tuned.items():
        await session.execute(sql.TUNE, {"name": f"hnsw.{name}", "value": str(value)})
    rows = await _RANKINGS[options.get("ranking")](session, query)
    for name in tuned:
        await session.execute(sql.TUNED[name])
    least = options.get("min_score")
    # Those that are left out are the last ones, so what a page starts with is the same.
    return [row for row in rows if least is None or (row[-1] is not None and row[-1] >= least)]


async def _by_meaning(session: Session, query: Query) -> list[Row]:
    rows = await search.run(session, query)
    assert query.index is not None
    return [(*row[:-1], query.index.score(row[-1])) for row in rows]


async def _fused(session: Session, query: Query) -> list[Row]:
    op, scores = query.op, defaultdict[tuple[str, str], float](float)
    found: dict[tuple[str, str], Row] = {}
    depth = max(_LEAST_DEPTH, _PAGES_DEEP * op.limit)
    beginning = replace(query, op=op._replace(limit=depth, offset=0))
    for rows in await search.run(session, beginning), await lexical.best(session, beginning):
        for rank, row in enumerate((row for row in rows if row[-1] is not None), start=1):
            scores[row[0], row[1]] += 1 / (_K + rank)
            found.setdefault((row[0], row[1]), row)
    # Sorted as they were found: of equal ones the nearer in meaning is first.
    ranked = sorted(((*row[:-1], scores[p]) for p, row in found.items()), key=lambda row: -row[-1])
    page = ranked[op.offset : op.offset + op.limit]
    if len(page) == op.limit:
        return page
    others = lexical.narrowed(query, sql.ELSEWHERE, columns(list(found), *sql.PLACES))
    rest = op._replace(limit=op.limit - len(page), offset=max(0, op.offset - len(ranked)))
    return page + [
        (*row[:-1], None) for row in await search.exact(session, replace(others, op=rest))
    ]


_RANKINGS = {None: search.run, "vector": _by_meaning, "lexical": lexical.run, "hybrid": _fused}
