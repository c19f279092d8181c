"""What `SemanticStore` does, and what PostgresStore gets wrong."""

import asyncio
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from fractions import Fraction

import psycopg
import pytest
from langgraph.store.base import (
    GetOp,
    InvalidNamespaceError,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchOp,
)
from langgraph.store.postgres import PostgresStore

from langgraph_vat import (
    ConfigurationError,
    InvalidInputError,
    Keyring,
    SchemaError,
    SealError,
    SemanticStore,
)
from tests.fix_servers import waiting
from tests.store.embedder import DIMS, embed

INDEX = {"dims": DIMS, "embed": embed, "fields": ["text"]}


@pytest.fixture(params=["plain", "sealed"])
def store(request, postgres_url):
    keyring = Keyring.generate() if request.param == "sealed" else None
    with SemanticStore.from_conn_string(postgres_url, index=INDEX, keyring=keyring) as store:
        yield store


def test_an_item_comes_back_and_keeps_its_birthday(store):
    store.put(("a", "b"), "k", {"text": "hello", "n": 1})
    first = store.get(("a", "b"), "k")
    store.put(("a", "b"), "k", {"text": "changed"})
    second = store.get(("a", "b"), "k")
    assert first.value == {"text": "hello", "n": 1}
    assert (second.value, second.key, second.namespace) == ({"text": "changed"}, "k", ("a", "b"))
    assert second.created_at == first.created_at
    assert second.updated_at > first.updated_at
    store.delete(("a", "b"), "k")
    assert store.get(("a", "b"), "k") is None


@pytest.mark.parametrize(
    "value",
    [
        {"x": "nul \x00 inside"},
        {"x": "half an emoji \ud83d"},
        {"x": math.inf},
        {"x": datetime(2026, 1, 2, tzinfo=UTC)},
        {"x": b"bytes"},
        {"x": {"deep": [1, {"deeper": None}]}},
        {},
    ],
)
def test_values_that_json_cannot_hold_come_back_equal(store, value):
    store.put(("v",), "k", value)
    assert store.get(("v",), "k").value == value


def test_numbers_are_compared_as_numbers(store):
    for n in (2, 9, 10, 100, -5):
        store.put(("n",), str(n), {"n": n, "text": "x"}, index=False)
    store.put(("n",), "word", {"n": "50"}, index=False)
    found = store.search(("n",), filter={"n": {"$gte": 10}})
    assert {item.value["n"] for item in found} == {10, 100}


def test_a_path_of_endless_digits_leads_nowhere(store):
    store.put(("n",), "k", {"x": [1]})
    for digits in ("0", "00", "9" * 10, "9" * 5_000):
        found = store.search(("n",), filter={f"x.{digits}": 1})
        assert len(found) == (int(digits[:9]) == 0)


def test_an_unknown_operator_is_refused_before_anything_is_written(store):
    with pytest.raises(InvalidInputError, match=r"\$regex.*\$gte"):
        store.batch([PutOp(("a",), "k", {}), SearchOp(("a",), {"n": {"$regex": "x"}})])
    assert store.get(("a",), "k") is None


def test_every_match_is_on_exactly_one_page(store):
    for i in range(50):
        store.put(
            ("p",),
            f"{i:02}",
            {"text": f"cab {i}", "keep": i % 2 == 0},
            index=None if i % 3 else False,
        )
    for query in (None, "abc"):
        for condition, size in ((None, 50), ({"keep": True}, 25)):
            pages = [
                store.search(("p",), query=query, filter=condition, limit=10, offset=offset)
                for offset in range(0, 60, 10)
            ]
            keys = [item.key for page in pages for item in page]
            assert len(keys) == len(set(keys)) == size


def test_the_nearest_come_first_and_those_without_vectors_last(store):
    store.put(("s",), "far", {"text": "mmmm nnnn"})
    store.put(("s",), "near", {"text": "abc abc"})
    store.put(("s",), "none", {"text": "abc"}, index=False)
    found = store.search(("s",), query="abc abc")
    assert [item.key for item in found] == ["near", "far", "none"]
    assert found[0].score == pytest.approx(1.0)
    assert found[2].score is None


def test_a_text_that_is_gone_leaves_no_vector(store):
    store.put(("v",), "k", {"text": "abc", "more": "def"}, index=["text", "more"])
    store.put(("v",), "k", {"text": "mno"}, index=False)
    (item,) = store.search(("v",), query="abc")
    assert item.score is None


def test_the_best_of_several_texts_counts(store):
    store.put(("v",), "k", {"parts": ["mno", "abc"]}, index=["parts[*]"])
    (item,) = store.search(("v",), query="abc")
    assert item.score == pytest.approx(1.0)


def test_a_batch_answers_in_order_and_reads_its_own_writes(store):
    results = store.batch(
        [
            GetOp(("b",), "k"),
            PutOp(("b",), "k", {"n": 1}),
            GetOp(("b",), "k"),
            PutOp(("b",), "k", {"n": 2}),
            PutOp(("b",), "k", {"n": 3}),
            SearchOp(("b",)),
            PutOp(("b",), "k", None),
            GetOp(("b",), "k"),
            ListNamespacesOp(),
        ]
    )
    assert results[0] is None
    assert results[2].value == {"n": 1}
    assert [item.value for item in results[5]] == [{"n": 3}]
    assert results[7] is None
    assert results[8] == []


def test_namespaces_end_at_segment_borders_and_have_no_wildcards(store):
    for namespace in (("a",), ("a", "x"), ("ab",), ("a%",), ("a_b",), ("axb",)):
        store.put(namespace, "k", {"text": ".".join(namespace)}, index=False)
    assert {i.namespace for i in store.search(("a",))} == {("a",), ("a", "x")}
    assert {i.namespace for i in store.search(("a%",))} == {("a%",)}
    assert {i.namespace for i in store.search(("a_b",))} == {("a_b",)}
    assert len(store.search(())) == 6
    assert store.list_namespaces(prefix=("a",)) == [("a",), ("a", "x")]
    assert store.list_namespaces(suffix=("x",)) == [("a", "x")]
    assert store.list_namespaces(prefix=("*", "x")) == [("a", "x")]
    assert store.list_namespaces(max_depth=1, limit=2) == [("a",), ("a%",)]


@pytest.mark.parametrize(
    ("namespace", "key", "error"),
    [
        ((), "k", InvalidNamespaceError),
        (("a.b",), "k", InvalidNamespaceError),
        (("",), "k", InvalidNamespaceError),
        (("a\x00",), "k", (InvalidNamespaceError, InvalidInputError)),
        (("a",), "k\x00", InvalidInputError),
        (("a",), "\ud800", InvalidInputError),
        (("a",), "k" * 10_000, InvalidInputError),
        (("langgraph",), "k", InvalidNamespaceError),
    ],
)
def test_what_cannot_be_stored_is_refused(store, namespace, key, error):
    with pytest.raises(error):
        store.put(namespace, key, {"text": "x"})
    assert store.search(()) == []


def test_strange_keys_stay_apart(store):
    keys = ["*", "a:b", "{x}", "a|b", "%", "[z]", "line\nbreak", "🦊", "a'b", 'a"b', "\\"]
    for key in keys:
        store.put(("k",), key, {"own": key}, index=False)
    for key in keys:
        assert store.get(("k",), key).value == {"own": key}
    store.delete(("k",), "*")
    assert len(store.search(("k",), limit=100)) == len(keys) - 1


def test_expired_items_are_gone_at_once_and_refreshed_by_reading(postgres_url):
    with SemanticStore.from_conn_string(postgres_url) as store:
        store.put(("t",), "short", {"n": 1}, ttl=0.4)
        store.put(("t",), "kept", {"n": 2})
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            age = "UPDATE store SET expires_at = expires_at - interval '20 seconds'"
            connection.execute(age)
            assert store.get(("t",), "short").value == {"n": 1}  # refreshed to 24 seconds
            connection.execute(age)
            assert store.get(("t",), "short", refresh_ttl=False) is not None
            connection.execute(age)
        assert store.get(("t",), "short") is None
        assert [item.key for item in store.search(("t",))] == ["kept"]
        assert store.sweep_ttl() == 1
        assert store.sweep_ttl() == 0


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [[1.0]],
        [[math.nan] * DIMS],
        [[1e39] * DIMS],
        [[10**400] * DIMS],
        [[0.0] * DIMS] * 2,
        ["1" * DIMS],
        [["1.0"] * DIMS],
        ["marker"],
        "marker",
        [None],
        None,
        7,
    ],
)
def test_an_embedder_that_returns_nonsense_is_named(postgres_url, bad):
    index = {"dims": DIMS, "embed": lambda _: bad, "fields": ["text"]}
    with SemanticStore.from_conn_string(postgres_url, index=index) as store:
        with pytest.raises(ConfigurationError, match="the embedder returned") as caught:
            store.put(("a",), "k", {"text": "x"})
        assert "marker" not in f"{caught.value} {caught.value.__context__}"
        assert store.get(("a",), "k") is None


def test_numbers_of_the_embedders_own_kind_are_taken(postgres_url):
    index = {"dims": 2, "embed": lambda _: iter([(Fraction(1, 2), 1)]), "fields": ["text"]}
    with SemanticStore.from_conn_string(postgres_url, index=index) as store:
        store.put(("a",), "k", {"text": "x"})
        with psycopg.connect(postgres_url) as connection:
            (row,) = connection.execute("SELECT embedding::text FROM store_vectors").fetchall()
        assert row == ("[0.5,1]",)


def test_what_the_embedder_refuses_leaves_no_key_behind(postgres_url):
    index = {"dims": DIMS, "embed": lambda _: [], "fields": ["text"]}
    keyring = Keyring.generate()
    with SemanticStore.from_conn_string(postgres_url, index=index, keyring=keyring) as store:
        with pytest.raises(ConfigurationError):
            store.put(("a",), "k", {"text": "x"})
        with psycopg.connect(postgres_url) as connection:
            assert connection.execute("SELECT count(*) FROM vat_store_keys").fetchone() == (0,)


def test_a_namespace_is_no_string(store):
    with pytest.raises(InvalidInputError, match="tuple"):
        store.put("abc", "k", {"text": "x"})


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda s: s.put(("a",), "k", {}, ttl="5"), "ttl must be a number of minutes"),
        (lambda s: s.put(("a",), "k", {}, ttl=True), "ttl must be a number of minutes"),
        (lambda s: s.put(("a",), "k", {}, index="text"), r"index must be .*\['text'\]"),
        (lambda s: s.put(("a",), "k", {}, index=True), "index must be"),
        (lambda s: s.put(("a",), "k", {}, index=[1]), "index must be"),
        (lambda s: s.batch([PutOp(("a",), 1, {})]), "a key must be a string"),
        (lambda s: s.batch([PutOp(None, "k", {})]), "a namespace must be a tuple"),
        (lambda s: s.search("abc"), "a namespace must be a tuple"),
        (lambda s: s.list_namespaces(prefix="abc"), "a namespace must be a tuple"),
        (lambda s: s.search(("a",), limit=-1), "limit and offset"),
        (lambda s: s.search(("a",), limit="3"), "limit and offset"),
        (lambda s: s.search(("a",), limit=None), "limit and offset"),
        (lambda s: s.search(("a",), offset=1.5), "limit and offset"),
        (lambda s: s.search(("a",), filter="x"), "filter must be a mapping"),
        (lambda s: s.search(("a",), query=5), "query must be a string"),
        (lambda s: s.list_namespaces(limit=-1), "limit and offset"),
        (lambda s: s.list_namespaces(max_depth=-1), "max_depth"),
        (lambda s: s.list_namespaces(max_depth="1"), "max_depth"),
    ],
)
def test_the_error_names_the_cause(store, call, named):
    with pytest.raises(InvalidInputError, match=named):
        call(store)
    assert store.search(()) == []


def test_a_page_may_be_larger_than_anything(store):
    store.put(("a",), "k", {"text": "abc", "n": 1})
    for options in ({}, {"query": "abc"}, {"filter": {"n": 1}}):
        (found,) = store.search(("a",), limit=10**30, **options)
        assert found.key == "k"
        assert store.search(("a",), offset=10**30, limit=10**30, **options) == []
    assert store.list_namespaces(limit=10**30) == [("a",)]


def test_an_item_that_is_not_sealed_is_named(postgres_url):
    with SemanticStore.from_conn_string(postgres_url, keyring=Keyring.generate()) as store:
        store.put(("a", "b"), "other", {"text": "x"})
        with psycopg.connect(postgres_url) as connection:
            connection.execute("INSERT INTO store (prefix, key, value) VALUES ('a.b', 'k', '{}')")
        with pytest.raises(SealError, match=r"'k' of 'a\.b'"):
            store.search(("a",))


PLACES = [(("n", label), "k") for label in "cba"]  # not in their order


@pytest.mark.parametrize(
    "ops",
    [
        [GetOp(*place) for place in PLACES],
        [SearchOp(("n",))],
        [SearchOp(namespace) for namespace, _ in PLACES],
        [PutOp(*place, {"n": 2}) for place in PLACES],
        [PutOp(*place, None) for place in PLACES],
    ],
    ids=["get", "search", "searches", "put", "delete"],
)
def test_rows_are_locked_in_one_order(postgres_url, ops):
    with (
        SemanticStore.from_conn_string(postgres_url) as store,
        psycopg.connect(postgres_url) as holder,
        psycopg.connect(postgres_url) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        for place in reversed(PLACES):
            store.put(*place, {"n": 1}, ttl=10)
        holder.execute("SELECT FROM store WHERE prefix = 'n.a' FOR UPDATE")
        run = pool.submit(store.batch, ops)
        while not (waiting(postgres_url) or run.done()):
            pass
        try:
            rest = "SELECT prefix FROM store WHERE prefix > 'n.a' FOR UPDATE NOWAIT"
            assert len(other.execute(rest).fetchall()) == 2
        finally:
            other.rollback()
            holder.rollback()
        run.result()


def test_a_vector_of_zeros_is_like_none(postgres_url):
    index = {"dims": 2, "embed": lambda texts: [[float("a" in t), 0.0] for t in texts]}
    with SemanticStore.from_conn_string(postgres_url, index=index) as store:
        store.put(("z",), "zero", {"text": "b"})
        store.put(("z",), "one", {"text": "a"})
        found = store.search(("z",), query="a")
        assert [(i.key, i.score) for i in found] == [("one", 1.0), ("zero", None)]


@pytest.mark.parametrize("ttl", [0, -1, math.nan, math.inf, 2**31])
def test_a_ttl_that_is_no_duration_is_refused(store, ttl):
    with pytest.raises(InvalidInputError, match="ttl"):
        store.put(("t",), "k", {"text": "x"}, ttl=ttl)
    assert store.search(("t",)) == []


@pytest.mark.parametrize(
    "condition",
    [MatchCondition("infix", ("a",)), *(MatchCondition("prefix", (p,)) for p in ("\0", "\ud800"))],
)
def test_namespace_conditions_are_checked_before_there_is_anything_to_match(store, condition):
    with pytest.raises(InvalidInputError):
        store.batch([PutOp(("a",), "k", {}), ListNamespacesOp(match_conditions=(condition,))])
    assert store.get(("a",), "k") is None


def test_other_dims_than_the_tables_are_refused(postgres_url):
    with SemanticStore.from_conn_string(postgres_url, index=INDEX):
        pass
    other = SemanticStore.from_conn_string(postgres_url, index={"dims": 8, "embed": embed})
    with pytest.raises(ConfigurationError, match=r"16.*8"):
        other.setup()
    other.close()


def test_without_the_right_to_create_pgvector_the_remedy_is_named(postgres_url):
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP EXTENSION vector")
        connection.execute("DROP ROLE IF EXISTS plain_role")
        connection.execute("CREATE ROLE plain_role LOGIN")
        connection.execute("GRANT ALL ON SCHEMA public TO plain_role")
    url = postgres_url.replace("postgres@", "plain_role@")
    store = SemanticStore.from_conn_string(url, index=INDEX)
    with pytest.raises(SchemaError, match="pgvector"):
        store.setup()
    store.close()
    with SemanticStore.from_conn_string(url) as plain:
        plain.put(("a",), "k", {"n": 1})
        assert plain.get(("a",), "k").value == {"n": 1}


@pytest.mark.parametrize("dims", [1_536, 3_072, 5_000])
@pytest.mark.parametrize("distance", ["cosine", "l2", "inner_product"])
def test_every_size_and_distance_finds_the_same_nearest(postgres_url, dims, distance):
    def wide(texts):
        return [[*v, *([0.0] * (dims - DIMS))] for v in embed(texts)]

    index = {"dims": dims, "embed": wide, "fields": ["text"], "distance_type": distance}
    with SemanticStore.from_conn_string(postgres_url, index=index) as store:
        for text in ("aaaa", "mmmm", "ammm"):
            store.put(("d",), text, {"text": text})
        assert [i.key for i in store.search(("d",), query="aaaa")] == ["aaaa", "ammm", "mmmm"]


def test_sealed_rows_are_bound_to_their_place(postgres_url):
    with SemanticStore.from_conn_string(postgres_url, keyring=Keyring.generate()) as store:
        store.put(("s",), "mine", {"secret": "marker-one"})
        store.put(("s",), "other", {"secret": "marker-two"})
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            dump = connection.execute("SELECT string_agg(s::text, '') FROM store s").fetchone()[0]
            assert "marker" not in dump
            connection.execute(
                "UPDATE store SET vat_value = (SELECT vat_value FROM store WHERE key = 'other')"
                " WHERE key = 'mine'"
            )
        with pytest.raises(SealError):
            store.get(("s",), "mine")
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(
                "UPDATE store SET vat_value = NULL, vat_type = NULL, value = '{\"x\": 1}'"
            )
        with pytest.raises(SealError):
            store.get(("s",), "mine")


def test_what_is_wrong_with_one_root_stops_no_other(postgres_url):
    keyring = Keyring.generate()
    with SemanticStore.from_conn_string(postgres_url, keyring=keyring) as store:
        for root in ("good", "bad"):
            store.put((root, "x"), "k", {"own": root})
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("UPDATE vat_store_keys SET data_key = 'damaged' WHERE root = 'bad'")
    with SemanticStore.from_conn_string(postgres_url, keyring=keyring) as store:
        assert store.get(("good", "x"), "k").value == {"own": "good"}
        assert len(store.search(("good",), filter={"own": "good"})) == 1
        with pytest.raises(SealError):
            store.get(("bad", "x"), "k")
        store.put(("good", "x"), "k", {"own": "again"})


def test_a_root_that_another_process_just_made_can_be_read(postgres_url):
    keyring = Keyring.generate()
    reader = SemanticStore.from_conn_string(postgres_url, keyring=keyring)
    with SemanticStore.from_conn_string(postgres_url, keyring=keyring) as writer:
        writer.put(("old",), "k", {"n": 1})
        assert reader.get(("old",), "k").value == {"n": 1}
        writer.put(("new",), "k", {"n": 2})
        assert {item.value["n"] for item in reader.search(())} == {1, 2}
    reader.close()


def test_batches_that_name_the_same_keys_in_other_orders_do_not_deadlock(postgres_url):
    names = [str(i) for i in range(40)]
    with SemanticStore.from_conn_string(postgres_url) as store:

        def write(number):
            ordered = names if number % 2 else names[::-1]
            for _ in range(10):
                store.batch([PutOp(("d",), name, {"n": number}) for name in ordered])

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(write, range(6)))
        assert len({item.value["n"] for item in store.search(("d",), limit=40)}) == 1
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute(DEADLOCKS).fetchone() == (0,)


DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


def test_pages_of_many_equally_near_items_are_complete(postgres_url, monkeypatch):
    monkeypatch.setattr("langgraph_vat._ops.search._FEW", 500)
    with SemanticStore.from_conn_string(postgres_url, index=INDEX) as store:
        ops = [PutOp(("ties",), str(i), {"text": "ab"[i % 2], "n": i}) for i in range(1_100)]
        for start in range(0, len(ops), 100):  # the last batch comes first in a search
            store.batch(ops[start : start + 100])
        pages = [
            store.search(("ties",), query="a", limit=150, offset=offset)
            for offset in range(0, 1_200, 150)
        ]
        keys = [item.key for page in pages for item in page]
        assert len(keys) == len(set(keys)) == 1_100


def test_postgres_store_and_ours_open_each_others_database(postgres_url):
    index = {"dims": DIMS, "embed": embed, "fields": ["text"]}
    with PostgresStore.from_conn_string(postgres_url, index=index) as theirs:
        theirs.setup()
        theirs.put(("x",), "theirs", {"text": "abc", "n": 7})
    with SemanticStore.from_conn_string(postgres_url, index=index) as ours:
        assert ours.get(("x",), "theirs").value == {"text": "abc", "n": 7}
        ours.put(("x",), "ours", {"text": "abc abc"}, ttl=1.5)
        assert len(ours.search(("x",), query="abc")) == 2
    with PostgresStore.from_conn_string(postgres_url, index=index) as theirs:
        theirs.setup()
        assert theirs.get(("x",), "ours").value == {"text": "abc abc"}
        assert {i.key for i in theirs.search(("x",), query="abc")} == {"ours", "theirs"}


def test_one_object_serves_threads_and_event_loops(store):
    def work(number):
        for i in range(10):
            store.put(("w", str(number)), str(i), {"text": f"abc {number} {i}"})
        return len(store.search(("w", str(number)), query="abc", limit=20))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [10] * 8

    async def read():
        found = await asyncio.gather(*(store.asearch(("w", str(n)), limit=20) for n in range(8)))
        return sum(map(len, found))

    assert asyncio.run(read()) == 80
    assert asyncio.run(read()) == 80
    assert threading.active_count() < 40


def test_setup_may_run_in_many_threads_at_once(postgres_url):
    stores = [SemanticStore.from_conn_string(postgres_url, index=INDEX) for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(SemanticStore.setup, stores))
    for store in stores:
        store.close()


def test_the_index_scan_is_never_short(postgres_url):
    with SemanticStore.from_conn_string(postgres_url, index=INDEX) as store:
        ops = [
            PutOp(
                ("many", str(i % 7)), str(i), {"text": f"{'abcdefghijklmno'[i % 15]} {i}", "n": i}
            )
            for i in range(10_500)
        ]
        store.batch(ops)
        found = store.search(("many",), query="a 15", limit=10)
        assert len(found) == 10
        exact = max(i.score for i in store.search(("many", "1"), query="a 15", limit=1))
        assert found[0].score >= exact - 1e-6
        rare = store.search(("many",), query="a", filter={"n": {"$lt": 20}}, limit=10, offset=5)
        assert len(rare) == 10
