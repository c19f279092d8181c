"""
``python -m benchmarks.search``: whether the right memories are found, and how fast.

50,000 items (``ITEMS=``) of 384 dimensions in 500 namespaces, one of them with 20 % of
all, in `SemanticStore` and in PostgresStore as it is by default. 100 questions to each
share of the items that a namespace or a filter leaves: recall@10 against exact brute
force, answers that are shorter than they should be, and the median time. The stores
take turns, question by question. Then what it takes to put. Needs numpy.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from langgraph.store.base import PutOp
from langgraph.store.postgres import PostgresStore
from psycopg.rows import dict_row

from langgraph_vat import SemanticStore
from langgraph_vat.embedded import EmbeddedServers

ITEMS = int(os.environ.get("ITEMS", "50000"))
DIMS = 384
QUESTIONS = 100
FOUND = 10
SHARES = {"20 %": 0.2, "5 %": 0.05, "1 %": 0.01}  # of one namespace each; the rest shares the rest
NAMESPACES = 500
FILTERS = {"10 %": ("tenth", 10), "1 %": ("hundredth", 100)}


class World:
    """
    The vectors: topics, and what is said about them; and where each item is.

    Texts are numbers. An embedder of them is a lookup.
    """

    def __init__(self) -> None:
        dice = np.random.default_rng(7)
        topics = dice.normal(size=(ITEMS // 50, DIMS))
        about = topics[dice.integers(len(topics), size=ITEMS)]
        self.vectors = _unit(about + 0.7 * dice.normal(size=(ITEMS, DIMS)))
        chosen = dice.integers(ITEMS, size=QUESTIONS)
        self.questions = _unit(self.vectors[chosen] + 0.03 * dice.normal(size=(QUESTIONS, DIMS)))
        self.namespaces = self._namespaces(dice)

    def _namespaces(self, dice: np.random.Generator) -> np.ndarray:
        sizes = [int(ITEMS * share) for share in SHARES.values()]
        rest = len(SHARES) + np.arange(ITEMS - sum(sizes)) % (NAMESPACES - len(SHARES))
        named = np.concatenate([np.full(size, n) for n, size in enumerate(sizes)] + [rest])
        dice.shuffle(named)
        return named

    def embed(self, texts: list[str]) -> list[list[float]]:
        """Look vectors up: of item ``i``, or of question ``q``."""
        return [
            (self.questions if kind == "q" else self.vectors)[int(number)].tolist()
            for kind, number in (text.split() for text in texts)
        ]

    def item(self, number: int) -> PutOp:
        """Return what puts an item."""
        value = {
            "text": f"i {number}",
            **{name: number % every for name, every in FILTERS.values()},
        }
        return PutOp(("docs", f"n{self.namespaces[number]}"), str(number), value)

    def nearest(self, question: int, among: np.ndarray) -> set[str]:
        """Return the keys of the true nearest."""
        numbers = np.flatnonzero(among)
        scores = self.vectors[numbers] @ self.questions[question]
        return {str(n) for n in numbers[np.argsort(-scores)[:FOUND]]}

    def cases(self) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any], np.ndarray]]:
        """Return each share's name, namespace, filter, and which items it leaves."""
        every = np.ones(ITEMS, dtype=bool)
        yield "100 %", ("docs",), {}, every
        for number, name in enumerate([*SHARES, f"{100 / NAMESPACES / 1.4:.1f} %"]):
            yield name, ("docs", f"n{number}"), {}, self.namespaces == number
        for name, (field, size) in FILTERS.items():
            among = np.arange(ITEMS) % size == 1
            yield f"{name} by filter", ("docs",), {field: 1}, among


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _load(store: Any, world: World) -> float:
    begun = time.perf_counter()
    for start in range(0, ITEMS, 1_000):
        store.batch([world.item(n) for n in range(start, min(start + 1_000, ITEMS))])
    return time.perf_counter() - begun


def _ask(stores: dict[str, Any], world: World) -> None:
    for name, namespace, filter_, among in world.cases():
        times: dict[str, list[float]] = {one: [] for one in stores}
        recall, short = dict.fromkeys(stores, 0.0), dict.fromkeys(stores, 0)
        wanted = min(FOUND, int(among.sum()))
        for question in range(QUESTIONS):
            right = world.nearest(question, among)
            for one, store in stores.items():
                begun = time.perf_counter()
                found = store.search(
                    namespace, query=f"q {question}", filter=filter_ or None, limit=FOUND
                )
                times[one].append(time.perf_counter() - begun)
                recall[one] += len(right & {item.key for item in found}) / wanted / QUESTIONS
                short[one] += len(found) < wanted
        for one in stores:
            ms = 1e3 * statistics.median(times[one])
            worst = 1e3 * sorted(times[one])[-2]
            sys.stdout.write(
                f"{name:16} {one:14} recall@10 {recall[one]:.3f}  short {short[one]:3}"
                f"  median {ms:7.2f} ms  p99 {worst:7.2f} ms\n"
            )
        sys.stdout.flush()


def _median_ms(call: Callable[[int], Any], times: int) -> float:
    taken = []
    for number in range(times):
        begun = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(taken)


def _write(stores: dict[str, Any], world: World) -> None:
    """Put anew, in a namespace of its own, in turns."""
    ops = [world.item(n)._replace(namespace=("writes",)) for n in range(1_000)]
    taken: dict[str, list[list[float]]] = {one: [[], [], []] for one in stores}
    for _ in range(5):
        for one, store in stores.items():
            taken[one][0].append(_median_ms(lambda _, store=store: store.batch(ops), 1))
            taken[one][1].append(
                _median_ms(lambda n, store=store: store.put(("writes",), str(n), ops[n].value), 50)
            )
            taken[one][2].append(
                _median_ms(lambda n, store=store: store.get(("writes",), str(n)), 100)
            )
    for number, what in enumerate(("put of 1,000", "put", "get")):
        for one in stores:
            ms = statistics.median(taken[one][number])
            sys.stdout.write(f"{what:16} {one:14} median {ms:8.2f} ms\n")


def main() -> None:
    """Fill both, ask both."""
    world = World()
    index: Any = {"dims": DIMS, "embed": world.embed, "fields": ["text"]}
    with tempfile.TemporaryDirectory(prefix="vat-bench-") as path:
        Path(path).chmod(0o755)
        servers = EmbeddedServers.start(Path(path))
        try:
            _compare(servers.postgres, world, index)
        finally:
            servers.stop()


def _compare(url: str, world: World, index: Any) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for name in ("ours", "theirs"):
            connection.execute(f"CREATE DATABASE {name}")
    ours, theirs = (url.replace("/postgres?", f"/{name}?") for name in ("ours", "theirs"))
    with (
        psycopg.connect(theirs, autocommit=True, row_factory=dict_row) as connection,
        SemanticStore.from_conn_string(ours, index=index) as store,
    ):
        peer = PostgresStore(connection, index=index)
        peer.setup()
        stores = {"SemanticStore": store, "PostgresStore": peer}
        for name, one in stores.items():
            sys.stdout.write(f"{name} loads {ITEMS} items in {_load(one, world):.1f} s\n")
        for other in (theirs, ours):
            with psycopg.connect(other, autocommit=True) as cleaner:
                cleaner.execute("VACUUM ANALYZE")
        _ask(stores, world)
        _write(stores, world)


if __name__ == "__main__":
    main()
