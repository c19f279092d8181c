"""Which namespaces there are, how much is in one, and that one goes with all below it."""

import inspect
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.store.base import ListNamespacesOp, MatchCondition, PutOp
from langgraph.store.memory import InMemoryStore
from langgraph.store.postgres import PostgresStore
from psycopg.sql import SQL

from langgraph_vat import InvalidInputError, Keyring, SemanticStore
from langgraph_vat._durable import items as items_sql
from langgraph_vat._durable import namespaces as sql
from tests.store.embedder import DIMS, embed
from tests.test_plans import looked_at

INDEX = {"dims": DIMS, "embed": embed, "fields": ["text"]}

# Those that sort around the dot, and those that mean something in a pattern or in SQL.
LABELS = (
    "a", "ab", "a-", "a/", "a b", "a!", "*", "%", "a%", "_", "a_", "a'", 'a"', "\\", "[^", "(a|b)",
    "a$", "^a", "+", "{1}", "line\nbreak", "\x01", "/", "-", "é", "e\u0301", "🦊", "\U0010ffff",
    "A", "vat-tenant", "vat-tenant;",
)  # fmt: skip
# Few in each example, so that conditions are about what is there.
POOLS = st.lists(st.sampled_from(LABELS), min_size=2, max_size=5, unique=True)


def namespaces_of(pool: list[str]) -> st.SearchStrategy:
    label = st.sampled_from(pool)
    return st.sets(st.lists(label, min_size=1, max_size=4).map(tuple), max_size=20)


def lists_of(pool: list[str]) -> st.SearchStrategy:
    path = st.lists(st.sampled_from((*pool, "*", "*")), max_size=3).map(tuple)
    condition = st.builds(MatchCondition, st.sampled_from(("prefix", "suffix")), path)
    conditions = st.lists(condition, max_size=3).map(tuple)
    depth = st.one_of(st.none(), st.integers(0, 4))
    one = st.builds(ListNamespacesOp, conditions, depth, st.integers(0, 10), st.integers(0, 3))
    return st.lists(one, min_size=5, max_size=10)


@pytest.fixture
def store(postgres_url):
    with SemanticStore.from_conn_string(postgres_url) as store:
        yield store


def fill(store: SemanticStore, found: list[tuple[str, ...]], text: str = "", **options) -> None:
    store.batch([PutOp(ns, "k", {"n": n, "text": text}, **options) for n, ns in enumerate(found)])


@pytest.mark.timeout(3_600)
def test_namespaces_are_those_of_in_memory_store(store):
    @given(POOLS.flatmap(lambda pool: st.tuples(namespaces_of(pool), lists_of(pool))))
    def check(drawn):
        held, ops = drawn
        oracle = InMemoryStore()
        fill(oracle, sorted(held))
        store.batch([PutOp(item.namespace, item.key, None) for item in store.search((), limit=99)])
        fill(store, sorted(held))
        for op in ops:
            assert store.batch([op]) == oracle.batch([op]), op

    check()


def test_labels_are_compared_whole(store):
    held = [("x", "a"), ("x", "ab"), ("x", "a", "b"), ("xa", "b"), ("ab",), ("x", "a-"), ("a",)]
    fill(store, held)
    assert store.list_namespaces(prefix=("*", "a")) == [("x", "a"), ("x", "a", "b")]
    assert store.list_namespaces(prefix=("x", "a")) == [("x", "a"), ("x", "a", "b")]
    assert store.list_namespaces(suffix=("a",)) == [("a",), ("x", "a")]
    assert store.list_namespaces(suffix=("a", "b")) == [("x", "a", "b")]
    assert store.list_namespaces(prefix=("a",), suffix=("a",)) == [("a",)]
    assert store.list_namespaces(prefix=("x", "a"), suffix=("*", "a", "b")) == [("x", "a", "b")]


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


@pytest.fixture(params=[SemanticStore, PostgresStore], ids=["ours", "adopted"])
def filled(request, postgres_url) -> Iterator[psycopg.Connection]:
    with request.param.from_conn_string(postgres_url) as made:
        made.setup()
    with SemanticStore.from_conn_string(postgres_url):
        pass
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for statement in FILL:
            connection.execute(statement)
        yield connection


def test_few_rows_are_looked_at_for_namespaces(filled):
    for mode in ("force_custom_plan", "force_generic_plan"):
        filled.execute(SQL("SET plan_cache_mode = {}").format(mode))
        for question, (conditions, depth, size) in QUESTIONS.items():
            op = [MatchCondition(*condition) for condition in conditions]
            params = {**sql.listing("", op, depth), "limit": 100, "offset": 0}
            assert len(filled.execute(sql.LIST, params).fetchall()) == size, question
            rows = looked_at(plan_of(filled, sql.LIST, params))
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


# --- counting ------------------------------------------------------------------


FILTERS = (None, {}, {"n": {"$gte": 2}}, {"odd": True}, {"n": {"$in": [1, 4, 9]}}, {"x": None})


@pytest.fixture(params=["plain", "sealed", "tokens", "view"])
def counted(request, postgres_url):
    keyring = None if request.param == "plain" else Keyring.generate()
    fields = ("odd",) if request.param == "tokens" else ()
    with SemanticStore.from_conn_string(
        postgres_url, index=INDEX, keyring=keyring, filterable_fields=fields
    ) as store:
        yield store.scoped("a.b%") if request.param == "view" else store


async def test_as_many_are_counted_as_a_search_finds(counted, monkeypatch):
    monkeypatch.setattr("langgraph_vat._ops.namespaces._PAGE", 3)
    found = [("a",), ("a", "b"), ("a", "b", "c"), ("ab",), ("a-", "b"), ("a%", "b")]
    for size, ns in enumerate(found, 1):
        for n in range(size):
            counted.put(ns, f"k{n}", {"n": n, "odd": n % 2 == 1, "text": "x"}, index=False)
    for prefix in ((), ("a", "b", "c", "d"), ("a-",), *found):
        for condition in FILTERS:
            expected = len(counted.search(prefix, filter=condition, limit=100))
            assert counted.count(prefix, filter=condition) == expected
            assert await counted.acount(prefix, filter=condition) == expected
    assert counted.count() == 21


def test_what_is_gone_is_not_counted(postgres_url):
    with SemanticStore.from_conn_string(postgres_url, keyring=Keyring.generate()) as store:
        for root in ("kept", "shredded"):
            store.put((root,), "k", {"n": 1})
            store.put((root,), "late", {"n": 1}, ttl=1)
        store.shred("shredded")
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute("UPDATE store SET expires_at = now() WHERE key = 'late'")
        for condition in (None, {"n": 1}):
            assert store.count(filter=condition) == 1
            assert store.count(("shredded",), filter=condition) == 0


@pytest.mark.parametrize(
    ("args", "condition", "named"),
    [
        (("a",), {"n": {"$regex": "x"}}, "regex"),
        ("abc", None, "a namespace must be a tuple"),
        (("vat-tenant:x",), None, "scoped"),
        (("a\0",), None, "NUL"),
    ],
)
def test_what_cannot_be_counted_is_refused(store, args, condition, named):
    with pytest.raises(InvalidInputError, match=named):
        store.count(args, filter=condition)


# --- deleting ------------------------------------------------------------------


async def test_a_namespace_goes_with_all_below_it_and_nothing_else(counted, postgres_url):
    stay = [("ab",), ("a-", "b"), ("a%",), ("b", "a"), ("A",), ("*",), ("a b",), ("a/", "b")]
    for both in range(2):
        fill(counted, [*stay, ("a",), ("a", "b"), ("a", "b", "*"), ("a", "🦊")], text="x")
        calls = (counted.delete_namespace, counted.adelete_namespace)
        assert await result(calls[both](("a",))) == 4
        assert counted.list_namespaces() == sorted(stay)
        assert await result(calls[both](("a",))) == 0
        assert counted.delete_namespace(("*",)) == 1
        assert counted.delete_namespace(("b", "a")) == 1
        assert counted.count() == len(stay) - 2
        with psycopg.connect(postgres_url) as connection:
            (vectors,) = connection.execute("SELECT count(*) FROM store_vectors").fetchone()
        assert vectors == len(stay) - 2


async def result(found):
    return await found if inspect.isawaitable(found) else found


def test_it_goes_in_steps_each_of_which_is_a_transaction(store, postgres_url, monkeypatch):
    monkeypatch.setattr("langgraph_vat._ops.namespaces._MOST_ROWS", 10)
    store.batch([PutOp(("a", str(n % 4)), f"k{n}", {}) for n in range(95)])
    with psycopg.connect(postgres_url) as connection, ThreadPoolExecutor(1) as pool:
        # The last one is held by somebody: the steps before it do not wait for that.
        connection.execute("SELECT FROM store WHERE prefix = 'a.3' AND key = 'k91' FOR UPDATE")
        deleting = pool.submit(store.delete_namespace, ("a",))
        while store.count(("a",)) > 5:
            assert not deleting.done()
        store.put(("a", "0"), "new", {})  # where it has been
        connection.rollback()
        assert deleting.result() == 95
    assert [item.key for item in store.search(())] == ["new"]


def test_what_expired_goes_too_and_is_not_counted(store, postgres_url):
    fill(store, [("a",), ("a", "b")], ttl=1)
    store.put(("a", "c"), "k", {})
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("UPDATE store SET expires_at = now() WHERE expires_at IS NOT NULL")
        assert store.delete_namespace(("a",)) == 1
        assert connection.execute("SELECT count(*) FROM store").fetchone() == (0,)


def test_everything_is_not_deleted_by_mistake(store):
    fill(store, [("a",)])
    for nothing in ((), []):
        with pytest.raises(InvalidInputError, match="nothing was deleted"):
            store.delete_namespace(nothing)
    for wrong in ("a", None, ("vat-tenant:x",)):
        with pytest.raises(InvalidInputError):
            store.delete_namespace(wrong)
    with pytest.raises(InvalidInputError, match="scoped"):
        store.delete_all()
    with pytest.raises(InvalidInputError, match="scoped"):
        store.shred_all()
    assert store.count() == 1


def test_few_rows_are_looked_at_to_find_what_is_to_be_sealed(filled):
    filled.execute("SET plan_cache_mode = force_custom_plan")
    everything = {"bound": "", "end": None, "limit": 100}
    found = filled.execute(sql.ROOTS, everything).fetchall()
    assert len(found) == 100
    assert {root for _, root, _ in found} > {"u", "u-0", "u-7", "vat-tenant:1"}
    assert looked_at(plan_of(filled, sql.ROOTS, everything)) <= 500
    rest = {"bound": "vat-tenant;", "end": None, "limit": 100}
    assert filled.execute(sql.ROOTS, rest).fetchall() == [("z\x01", "z", True)]
    page = {"first": "u.", "end": "u/", "after_prefix": "", "after_key": "", "limit": 10}
    assert looked_at(plan_of(filled, items_sql.PLAIN_ITEMS, page)) <= 33


def test_few_rows_are_looked_at_to_delete_and_to_open(filled):
    filled.execute("SET plan_cache_mode = force_custom_plan")
    after = {"after_prefix": "u.1990.s", "after_key": "k", "limit": 10}
    for first, end in (("u", "u\x01"), ("u.", "u/")):
        params = {"first": first, "end": end, **after}
        page = sql.PAGE.format(columns="s.prefix, s.key", filter="true")
        assert looked_at(plan_of(filled, page, params)) <= 11
        # Each is looked at when it is found, joined, deleted.
        assert looked_at(plan_of(filled, sql.DELETE_NEXT, params)) <= 33
