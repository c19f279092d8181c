"""Which namespaces there are, how much is in one, and that one goes with all below it."""

import re

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.store.base import ListNamespacesOp, MatchCondition, PutOp
from langgraph.store.memory import InMemoryStore
from langgraph.store.postgres import PostgresStore
from psycopg.sql import SQL

from langgraph_vat import SemanticStore
from langgraph_vat._durable import namespaces as sql
from tests.test_plans import looked_at

# Those that sort around the dot, and those that mean something in a pattern or in SQL.
LABELS = (
    "a", "ab", "a-", "a/", "a b", "a!", "*", "%", "a%", "_", "a_", "a'", 'a"', "\\", "[^", "(a|b)",
    "a$", "^a", "+", "{1}", "line\nbreak", "\x01", "/", "-", "é", "e\u0301", "🦊", "\U0010ffff",
    "A", "vat-tenant", "vat-tenant;",
)  # fmt: skip
NAMESPACES = st.lists(st.sampled_from(LABELS), min_size=1, max_size=4).map(tuple)
PATHS = st.lists(st.sampled_from((*LABELS, "*", "*", "*")), max_size=3).map(tuple)
CONDITIONS = st.lists(
    st.builds(MatchCondition, st.sampled_from(("prefix", "suffix")), PATHS), max_size=3
).map(tuple)
LISTS = st.builds(
    ListNamespacesOp,
    CONDITIONS,
    st.one_of(st.none(), st.integers(0, 4)),
    st.integers(0, 10),
    st.integers(0, 3),
)


@pytest.fixture
def store(postgres_url):
    with SemanticStore.from_conn_string(postgres_url) as store:
        yield store


def fill(store: SemanticStore, found: list[tuple[str, ...]], **options) -> None:
    store.batch([PutOp(ns, "k", {"n": n}, **options) for n, ns in enumerate(found)])


@pytest.mark.timeout(3_600)
def test_namespaces_are_those_of_in_memory_store(store):
    @given(st.sets(NAMESPACES, max_size=20), st.lists(LISTS, min_size=5, max_size=5))
    def check(held, ops):
        oracle = InMemoryStore()
        fill(oracle, sorted(held))
        store.batch([PutOp(item.namespace, item.key, None) for item in store.search((), limit=99)])
        fill(store, sorted(held))
        for op in ops:
            assert store.batch([op]) == oracle.batch([op]), op

    check()


def test_what_expired_is_in_no_namespace(store, postgres_url):
    fill(store, [("a",), ("a", "b"), ("c", "d")], ttl=1)
    store.put(("a", "b"), "other", {})
    store.put(("e",), "k", {})
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("UPDATE store SET expires_at = expires_at - interval '2 minutes'")
    assert store.list_namespaces() == [("a", "b"), ("e",)]
    assert store.list_namespaces(max_depth=1) == [("a",), ("e",)]


FILL = (
    """
INSERT INTO store (prefix, key, value)
SELECT 'u-' || n % 50 || '.s', 'k' || n, '{}'::jsonb FROM generate_series(1, 20000) AS n
UNION ALL SELECT 'u.' || n || '.s', 'k', '{}' FROM generate_series(1, 2000) AS n
UNION ALL SELECT 'vat-tenant:' || n || '.s', 'k', '{}' FROM generate_series(1, 2000) AS n
UNION ALL SELECT 'z', 'k' || n, '{}' FROM generate_series(1, 2000) AS n
""",
    "VACUUM ANALYZE store",
)
QUESTIONS = {
    "all roots": ((), 1, 52),
    "all below one of many roots that sort beside it": ((("prefix", ("u-7",)),), None, 1),
    "what is below a root with neighbours": ((("prefix", ("u", "7")),), None, 1),
    "one of many, by its end": ((("prefix", ("u-7",)), ("suffix", ("s",))), None, 1),
    "no more than the first labels of many": ((("prefix", ("u",)),), 1, 1),
}


@pytest.mark.parametrize("maker", [SemanticStore, PostgresStore], ids=["ours", "adopted"])
def test_few_rows_are_looked_at_for_namespaces(postgres_url, maker):
    with maker.from_conn_string(postgres_url) as made:
        made.setup()
    with SemanticStore.from_conn_string(postgres_url):
        pass
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for statement in FILL:
            connection.execute(statement)
        for mode in ("force_custom_plan", "force_generic_plan"):
            connection.execute(SQL("SET plan_cache_mode = {}").format(mode))
            for question, (conditions, depth, size) in QUESTIONS.items():
                op = [MatchCondition(*condition) for condition in conditions]
                params = {**sql.listing("", op, depth), "limit": 100, "offset": 0}
                assert len(connection.execute(sql.LIST, params).fetchall()) == size, question
                rows = looked_at(plan_of(connection, sql.LIST, params))
                assert rows <= 3 * size + 5, (mode, question)


def plan_of(connection: psycopg.Connection, statement: str, params: dict) -> dict:
    """Return how a statement was run that was prepared, as the plan cache has it."""
    names = list(params)
    numbered = re.sub(r"%\((\w+)\)s", lambda name: f"${names.index(name[1]) + 1}", statement)
    connection.execute(f"PREPARE asked AS {numbered}")
    values = SQL(", ").join(params.values())
    explain = SQL("EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE asked ({})").format(values)
    (plan,) = connection.execute(explain).fetchone()
    connection.execute("DEALLOCATE asked")
    return plan[0]["Plan"]
