"""
The same calls to SemanticStore and to LangGraph's InMemoryStore get the same answers.

    HYPOTHESIS_PROFILE=long python -m pytest tests/store/test_store_model.py

runs 2,000 examples, and FILTERS=5000 as many random filters. Where InMemoryStore is
itself wrong the model says what is right: a namespace without items is none, and `True`
is not 1.
"""

import itertools
import os
import random
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from langgraph.store.base import GetOp, PutOp
from langgraph.store.memory import InMemoryStore
from psycopg import connect, sql

from langgraph_vat import Keyring, SemanticStore
from langgraph_vat._durable.filters import OPERATORS, check_filter, matches, to_sql
from tests.store.embedder import DIMS, embed

INDEX: Any = {"dims": DIMS, "embed": embed, "fields": ["text", "tags[*]"]}
NAMESPACES = (("a",), ("a", "b"), ("ab",), ("a", "b", "%"), ("c_", "b"))
KEYS = ("k", "k%", "🦊")
TEXTS = ("abc", "mno", "abm", "", "cab dog")
_runs = itertools.count()

VALUES = st.fixed_dictionaries(
    {},
    optional={
        "text": st.sampled_from(TEXTS),
        "n": st.sampled_from((-5, 2, 9, 10, 100, 2.5, None)),
        # InMemoryStore refuses one text in two fields, so tags have texts of their own.
        "tags": st.lists(st.sampled_from(("lo", "an")), max_size=2, unique=True),
        "deep": st.fixed_dictionaries({"x": st.sampled_from((1, "1", None, [1, 2]))}),
        "odd": st.sampled_from(("nul \0", b"\xff", float("inf"))),
    },
)
FILTERS = st.one_of(
    st.none(),
    st.just({"n": 10}),
    st.just({"n": {"$gte": 9, "$ne": 100}}),
    st.just({"n": {"$lt": 10}}),
    st.just({"deep": {"x": 1}}),
    st.just({"deep": {"x": [1, 2]}}),
    st.just({"text": {"$ne": "abc"}}),
    st.just({"text": {"$gt": "abm"}}),
    st.just({"missing": None}),
)


class Model(RuleBasedStateMachine):
    """Drives both stores, below a root of this example's own."""

    store: SemanticStore

    def __init__(self) -> None:
        super().__init__()
        self.root = f"r{next(_runs)}"
        self.oracle = InMemoryStore(index=INDEX)

    @rule(
        ns=st.sampled_from(NAMESPACES),
        key=st.sampled_from(KEYS),
        value=VALUES,
        index=st.sampled_from((None, None, False, ["text"])),
    )
    def put(self, ns, key, value, index):
        # InMemoryStore keeps vectors of the text that was replaced: a known fault.
        self.oracle.delete((self.root, *ns), key)
        self._both("put", (self.root, *ns), key, value, index=index)

    @rule(ns=st.sampled_from(NAMESPACES), key=st.sampled_from(KEYS))
    def delete(self, ns, key):
        self._both("delete", (self.root, *ns), key)

    @rule(ns=st.sampled_from(NAMESPACES), key=st.sampled_from(KEYS))
    def get(self, ns, key):
        actual = self.store.get((self.root, *ns), key)
        expected = self.oracle.get((self.root, *ns), key)
        assert (actual and actual.value) == (expected and expected.value)

    @rule(
        items=st.lists(
            st.tuples(st.sampled_from(NAMESPACES), st.sampled_from(KEYS), VALUES), max_size=4
        )
    )
    def batch(self, items):
        ops = [PutOp((self.root, *ns), key, value) for ns, key, value in items]
        for op in ops:
            self.oracle.delete(op.namespace, op.key)
            self.oracle.batch([op])
        self.store.batch(ops)
        gets = [GetOp((self.root, *ns), key) for ns in NAMESPACES for key in KEYS]
        found = zip(self.store.batch(gets), self.oracle.batch(gets), strict=True)
        assert all((a and a.value) == (b and b.value) for a, b in found)

    @rule(ns=st.sampled_from((*NAMESPACES, ())), condition=FILTERS)
    def search(self, ns, condition):
        prefix = (self.root, *ns)
        expected = {
            (i.namespace, i.key)
            for i in self.oracle.search(prefix, limit=100)
            if condition is None or matches(i.value, condition)
        }
        pages = [
            self.store.search(prefix, filter=condition, limit=4, offset=offset)
            for offset in range(0, 24, 4)
        ]
        actual = [(i.namespace, i.key) for page in pages for i in page]
        assert len(actual) == len(expected)
        assert set(actual) == expected

    @rule(ns=st.sampled_from((*NAMESPACES, ())), query=st.sampled_from(TEXTS[:3]))
    def search_by_meaning(self, ns, query):
        expected = self.oracle.search((self.root, *ns), query=query, limit=100)
        actual = self.store.search((self.root, *ns), query=query, limit=100)
        assert _scores(actual) == _scores(expected)
        ranks = [i.score for i in actual if i.score is not None]
        assert ranks == sorted(ranks, reverse=True)
        assert all(i.score is None for i in actual[len(ranks) :])

    @rule(
        prefix=st.sampled_from((None, ("a",), ("*", "b"))),
        suffix=st.sampled_from((None, ("b",), ("*", "%"))),
        depth=st.sampled_from((None, 2)),
    )
    def list_namespaces(self, prefix, suffix, depth):
        options: Any = {"prefix": (self.root, *(prefix or ())), "suffix": suffix, "limit": 100}
        held = {
            ns
            for ns in self.oracle.list_namespaces(**options)
            if any(item.namespace == ns for item in self.oracle.search(ns, limit=100))
        }
        actual = self.store.list_namespaces(max_depth=depth, **options)
        assert actual == sorted({ns[:depth] for ns in held})

    @rule(ns=st.sampled_from((*NAMESPACES, ())), condition=FILTERS)
    def count(self, ns, condition):
        held = self.oracle.search((self.root, *ns), limit=100)
        expected = sum(condition is None or matches(item.value, condition) for item in held)
        assert self.store.count((self.root, *ns), filter=condition) == expected

    @rule(ns=st.sampled_from((*NAMESPACES, ())))
    def delete_namespace(self, ns):
        held = self.oracle.search((self.root, *ns), limit=100)
        for item in held:
            self.oracle.delete(item.namespace, item.key)
        assert self.store.delete_namespace((self.root, *ns)) == len(held)

    def _both(self, name: str, *args: Any, **kwargs: Any) -> None:
        getattr(self.store, name)(*args, **kwargs)
        getattr(self.oracle, name)(*args, **kwargs)


def _scores(items: Any) -> dict[Any, Any]:
    return {
        (i.namespace, i.key): None if i.score is None else pytest.approx(i.score, abs=1e-5)
        for i in items
    }


@pytest.mark.parametrize("tenant", [None, "a.b%2E"], ids=["whole", "view"])
@pytest.mark.parametrize("is_sealed", [False, True], ids=["plain", "sealed"])
@pytest.mark.timeout(3_600)
def test_answers_are_those_of_in_memory_store(postgres_url, is_sealed, tenant):
    keyring = Keyring.generate() if is_sealed else None
    with SemanticStore.from_conn_string(postgres_url, index=INDEX, keyring=keyring) as store:
        used = store if tenant is None else store.scoped(tenant)
        run_state_machine_as_test(type("Machine", (Model,), {"store": used}))


DATES = (
    "2026-01-02", "2026-01-02T00:00Z", "2026-01-02T01:30:00.5+02:00", "2026-01-01 23:30:00",
    "2024-02-29", "2025-02-29", "2026-1-2", "2026-01-02T24:00", "2026-01-02T00:00:00.1234567Z",
)  # fmt: skip
LEAVES = (None, True, False, 0.5, -1, 0, 1, 2, 10, "", "a", "b", "ab", "10", *DATES)
NAMES = ("x", "y", "0", "x.y", "x.0", "y.x.1", "x.", ".", "1.0", "x.01")
ORDERED = (-3, 0, 1, 2.5, 11, "a", "ab", "10", *DATES)


def _json(dice: random.Random, depth: int = 2) -> Any:
    kind = dice.randrange(10)
    if depth and kind < 2:
        return [_json(dice, depth - 1) for _ in range(dice.randrange(3))]
    return _object(dice, depth - 1) if depth and kind < 5 else dice.choice(LEAVES)


def _object(dice: random.Random, depth: int = 2) -> dict[str, Any]:
    return {dice.choice(NAMES): _json(dice, depth) for _ in range(dice.randrange(4))}


def _condition(dice: random.Random, depth: int = 3) -> Any:
    kind = dice.randrange(10)
    if not depth or kind < 2:
        return _json(dice)
    if kind < 3:
        return [_condition(dice, depth - 1) for _ in range(dice.randrange(3))]
    if kind < 5:
        return _filter(dice, depth - 1)
    return dict(_operation(dice, depth - 1) for _ in range(dice.choice((1, 1, 2))))


def _operation(dice: random.Random, depth: int) -> tuple[str, Any]:
    name = dice.choice(OPERATORS)
    if name in ("$eq", "$ne", "$contains"):
        return name, _json(dice)
    if name in ("$gt", "$gte", "$lt", "$lte"):
        return name, dice.choice(ORDERED)
    if name in ("$in", "$nin"):
        return name, [_json(dice) for _ in range(dice.randrange(4))]
    if name == "$exists":
        return name, dice.random() < 0.5
    if name == "$not":
        return name, _condition(dice, depth)
    return name, [_condition(dice, depth) for _ in range(dice.randint(1, 2))]


def _filter(dice: random.Random, depth: int = 3) -> dict[str, Any]:
    found = {dice.choice(NAMES): _condition(dice, depth) for _ in range(dice.choice((0, 1, 1, 2)))}
    if depth and dice.random() < 0.3:
        parts = [_filter(dice, depth - 1) for _ in range(dice.randint(1, 2))]
        name = dice.choice(("$and", "$or", "$not"))
        found[name] = parts[0] if name == "$not" else parts
    return found


@settings(max_examples=int(os.environ.get("FILTERS", settings().max_examples)))
@given(st.randoms(use_true_random=True))
@pytest.mark.timeout(600)
def test_sql_and_python_read_a_filter_alike(postgres_server, dice):
    values = [_object(dice) for _ in range(20)]
    condition = _filter(dice)
    check_filter(condition)
    clause, params = to_sql(condition)
    params["vs"] = [orjson.dumps(value).decode() for value in values]
    statement = sql.SQL(
        "SELECT array_agg({} ORDER BY n) FROM unnest(%(vs)s::text[]::jsonb[])"
        " WITH ORDINALITY AS s (value, n)"
    ).format(clause)
    with connect(postgres_server.url) as connection:
        (found,) = connection.execute(statement, params).fetchone()
    assert found == [matches(value, condition) for value in values], (condition, values)
