"""Sealed rows are found by what nobody can read there, without opening others."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from enum import StrEnum
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver

from langgraph_vat import (
    ConfigurationError,
    HybridSaver,
    InvalidInputError,
    Keyring,
    SealError,
    SemanticStore,
    StrictSerializer,
    UnknownKeyError,
)
from langgraph_vat._durable.filters import matches
from langgraph_vat._seal.blind_index import IndexKey

KEYRING = Keyring.generate()
FIELDS = ("user", "org")


class Color(StrEnum):
    RED = "red"


@pytest.fixture
def keyring():
    return KEYRING


def put(saver: Any, thread: str, metadata: dict[str, Any]) -> Any:
    checkpoint = {**empty_checkpoint(), "id": str(uuid6())}
    config = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
    return saver.put(config, checkpoint, {"source": "loop", "step": 1, **metadata}, {})


def ids(saver: Any, thread: str | None = None, **filter: Any) -> list[str]:
    config = {"configurable": {"thread_id": thread}} if thread else None
    return [found.checkpoint["id"] for found in saver.list(config, filter=filter)]


def rows(url: str, query: str, *params: Any) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")  # past the triggers
        cursor = connection.execute(query, params or None)
        return cursor.fetchall() if cursor.description else []


def tokens(url: str, thread: str) -> Any:
    query = "SELECT metadata -> 'vat_blind' FROM checkpoints WHERE thread_id = %s"
    return [row[0] for row in rows(url, query, thread)]


def spoil(url: str) -> None:
    """Change every sealed value: whoever opens one is told so."""
    rows(
        url,
        "UPDATE checkpoints SET vat_exact = set_byte(vat_exact, 40, get_byte(vat_exact, 40) # 1)",
    )


# --- tokens -----------------------------------------------------------------------------

KEY = IndexKey.generate()
scalars = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.floats(-3, 3).map(round).map(float),
    st.text(max_size=3),
    st.sampled_from(["1", "1.0", "true", "", "\ud800", 2**70, float(2**70), -0.0, 10**5000]),
)


@given(scalars, scalars)
def test_what_is_equal_has_an_equal_token(one, other):
    same = KEY.token(one, "f") == KEY.token(other, "f")
    assert same or one != other
    if type(one) is type(other) and not (isinstance(one, float) and math.isnan(one)):
        assert same == (one == other)


def test_tokens_differ_by_field_owner_and_key():
    places = [("a", "b"), ("ab",), ("a", "b", ""), ("b", "a")]
    found = {KEY.token("x", *place) for place in places} | {
        IndexKey.generate().token("x", "a", "b")
    }
    assert len(found) == 5
    assert all(len(token) == 32 for token in found)


def test_an_index_key_is_bound_to_its_place_and_shows_nothing():
    wrapped = KEY.wrap(KEYRING, associated_data=b"here")
    again = IndexKey.unwrap(wrapped, KEYRING, associated_data=b"here")
    assert again.token("x") == KEY.token("x")
    with pytest.raises(SealError):
        IndexKey.unwrap(wrapped, KEYRING, associated_data=b"there")
    with pytest.raises(SealError, match="damaged"):
        IndexKey.unwrap(KEYRING.wrap(b"short", associated_data=b""), KEYRING, associated_data=b"")
    with pytest.raises(TypeError):
        KEY.__reduce__()
    assert KEY._secret.hex() not in repr(KEY)


# --- checkpoints --------------------------------------------------------------------------

VALUES = [
    "ada", "bob", "", "1", 1, True, 1.0, 0, False, 2.5, 2**60, None, ["ada"], ("ada",), {"a": 1},
    Color.RED, "red", Decimal(1), float("nan"), float("inf"), b"ada",
]  # fmt: skip


def test_a_list_finds_what_in_memory_saver_finds(process):
    """Whether its rows were written with these fields declared, with others, or with none."""
    oracle = InMemorySaver()
    allowed = StrictSerializer(allow=[Color])
    writers = [
        process(filterable_metadata=fields, serde=allowed)
        for fields in (FIELDS, ("user",), ("org", "more"), (), ("user", "org"))
    ]
    for number, value in enumerate(VALUES):
        metadata: dict[str, Any] = {"user": value, "org": VALUES[-number], "n": number % 2}
        if number % 5 == 4:
            del metadata["user"]
        for at, writer in enumerate(writers):
            config = put(writer, f"t{at}", metadata)
            put_same(oracle, config, metadata)
    for writer in writers:
        writer.flush()
    for reader in (
        writers[0],
        writers[1],
        writers[3],
        process(serde=allowed, filterable_metadata=FIELDS),
    ):
        for value in VALUES:
            for wanted in ({"user": value}, {"user": value, "n": 0}, {"org": value, "user": "ada"}):
                assert ids(reader, **wanted) == sorted(ids(oracle, **wanted))[::-1], wanted
            assert ids(reader, "t1", user=value) == sorted(ids(oracle, "t1", user=value))[::-1]


def put_same(oracle: InMemorySaver, config: Any, metadata: dict[str, Any]) -> None:
    checkpoint = {**empty_checkpoint(), "id": config["configurable"]["checkpoint_id"]}
    where = {"configurable": {**config["configurable"], "checkpoint_id": None}}
    oracle.put(where, checkpoint, {"source": "loop", "step": 1, **metadata}, {})


def test_pages_of_a_filtered_list_are_complete(process):
    saver, other = process(filterable_metadata=FIELDS), process()
    expected = []
    for number in range(230):
        writer = other if number % 3 == 0 else saver
        config = put(writer, f"t{number % 7}", {"user": "ada" if number % 2 else "bob"})
        if number % 2:
            expected.append(config["configurable"]["checkpoint_id"])
    saver.flush()
    other.flush()
    assert ids(saver, user="ada") == expected[::-1]
    limited = [one.checkpoint["id"] for one in saver.list(None, filter={"user": "ada"}, limit=7)]
    assert limited == expected[:-8:-1]
    before = {"configurable": {"thread_id": "t1", "checkpoint_id": expected[50]}}
    found = saver.list(None, filter={"user": "ada"}, before=before)
    assert [one.checkpoint["id"] for one in found] == expected[49::-1]


def test_what_does_not_match_is_not_opened(process, postgres_url):
    saver = process(filterable_metadata=("user",))
    wanted = put(saver, "t", {"user": "ada"})["configurable"]["checkpoint_id"]
    saver.flush()
    kept = rows(postgres_url, "SELECT vat_exact FROM checkpoints")[0][0]
    for number in range(20):
        put(saver, f"t{number}", {"user": f"user {number}"})
    saver.flush()
    spoil(postgres_url)
    rows(
        postgres_url, "UPDATE checkpoints SET vat_exact = %s WHERE checkpoint_id = %s", kept, wanted
    )
    assert ids(saver, user="ada") == [wanted]
    with pytest.raises(SealError):
        ids(saver, user="user 7")


def test_no_value_can_be_read(process, postgres_url):
    saver = process(filterable_metadata=FIELDS)
    put(saver, "t", {"user": "ada.lovelace", "org": 4711_4711_4711})
    saver.flush()
    text = json.dumps(rows(postgres_url, "SELECT metadata FROM checkpoints")[0][0])
    assert "vat_blind" in text
    assert "lovelace" not in text
    assert "471147114711" not in text
    assert next(iter(saver.list(None))).metadata["user"] == "ada.lovelace"
    assert "vat_blind" not in next(iter(saver.list(None))).metadata


def test_a_forged_token_finds_nothing(process, postgres_url):
    saver = process(filterable_metadata=("user",))
    put(saver, "ada", {"user": "ada"})
    put(saver, "bob", {"user": "bob"})
    saver.flush()
    rows(
        postgres_url,
        "UPDATE checkpoints SET metadata = metadata || jsonb_build_object('vat_blind',"
        " (SELECT metadata -> 'vat_blind' FROM checkpoints WHERE thread_id = 'ada'))",
    )
    assert len(ids(saver, user="ada")) == 1


def test_tokens_of_tenants_cannot_be_compared(process, postgres_url):
    saver = process(filterable_metadata=("user",))
    for tenant in ("a", "b"):
        put(saver.scoped(tenant), "t", {"user": "ada"})
    put(saver, "t", {"user": "ada"})
    saver.flush()
    found = {
        row[0] for row in rows(postgres_url, "SELECT metadata ->> 'vat_blind' FROM checkpoints")
    }
    assert len(found) == 3
    for view in (saver, saver.scoped("a"), saver.scoped("b")):
        assert len(ids(view, user="ada")) == 1
        assert ids(view, user="bob") == []
    saver.copy_thread("t", "copy")
    assert len(ids(saver, user="ada")) == 2


def test_processes_that_begin_at_once_agree_on_a_key(process, postgres_url):
    savers = [process(filterable_metadata=("user",)) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: put(savers[n], f"t{n}", {"user": "ada"}), range(8)))
    for saver in savers:
        saver.flush()
    assert len(ids(savers[0], user="ada")) == 8
    assert len(rows(postgres_url, "SELECT DISTINCT metadata -> 'vat_blind' FROM checkpoints")) == 1


def test_the_key_is_rotated_with_the_others(postgres_url):
    old = Keyring.generate("old")
    both = old.with_key("new")
    options: dict[str, Any] = {"filterable_metadata": ("user",), "filterable_fields": ("user",)}
    with (
        HybridSaver.from_conn_string(postgres_url, keyring=both, **options) as saver,
        SemanticStore.from_conn_string(postgres_url, keyring=both, **options) as store,
    ):
        put(saver, "t", {"user": "ada"})
        store.put(("u",), "k", {"user": "ada"})
    after = both.with_primary("new")
    with (
        HybridSaver.from_conn_string(postgres_url, keyring=after, **options) as saver,
        SemanticStore.from_conn_string(postgres_url, keyring=after, **options) as store,
    ):
        assert saver.threads.rotate() == (2, 0)
        assert store.rotate() == (2, 0)
        assert saver.threads.rotate() == (0, 0)
        assert store.rotate() == (0, 0)
        assert saver.scoped("x").threads.rotate() == (0, 0)
    alone = after.without("old")
    with (
        HybridSaver.from_conn_string(postgres_url, keyring=alone, **options) as saver,
        SemanticStore.from_conn_string(postgres_url, keyring=alone, **options) as store,
    ):
        assert len(ids(saver, user="ada")) == 1
        assert len(store.search(("u",), filter={"user": "ada"})) == 1
    stranger = Keyring.generate("other")
    with HybridSaver.from_conn_string(postgres_url, keyring=stranger, **options) as saver:
        with pytest.raises(UnknownKeyError):
            put(saver, "t2", {"user": "ada"})
        assert rows(postgres_url, "SELECT FROM checkpoints WHERE thread_id = 't2'") == []


def test_resealing_gives_tokens_to_what_has_none(process, postgres_url):
    plain, saver = process(), process(filterable_metadata=FIELDS)
    for number in range(70):
        put(plain, "t", {"user": f"user {number}"})
    plain.flush()
    assert tokens(postgres_url, "t") == [None] * 70
    assert len(ids(saver, user="user 69")) == 1
    assert saver.threads.reseal().left == 0
    assert all(set(one) == {*FIELDS} for one in tokens(postgres_url, "t"))
    kept = rows(postgres_url, "SELECT checkpoint_id, vat_exact FROM checkpoints ORDER BY 1")
    spoil(postgres_url)
    rows(
        postgres_url,
        "UPDATE checkpoints SET vat_exact = %s WHERE checkpoint_id = %s",
        kept[9][1],
        kept[9][0],
    )
    assert ids(saver, user="user 9") == [kept[9][0]]


def test_shredding_destroys_tokens(process, postgres_url):
    saver = process(filterable_metadata=FIELDS)
    put(saver, "t", {"user": "ada"})
    put(saver, "other", {"user": "ada"})
    saver.flush()
    saver.threads.shred("t")
    assert tokens(postgres_url, "t") == [{"user": None, "org": None}]
    assert len(ids(saver, user="ada")) == 1
    assert tokens(postgres_url, "other")[0]["user"]


def test_indexes_are_made_when_they_are_needed(postgres_url):
    with HybridSaver.from_conn_string(postgres_url, filterable_metadata=("user",)) as plain:
        assert plain.check() == []
        assert "lacks" not in plain.ddl()
    options: dict[str, Any] = {"keyring": KEYRING, "filterable_metadata": FIELDS}
    saver = HybridSaver.from_conn_string(postgres_url, **options)
    assert saver.check() == ["2 indexes of filterable_metadata are missing: run setup()"]
    put(saver, "t", {"user": "ada"})
    assert len(ids(saver, user="ada")) == 1
    assert saver.ddl().count("vat_checkpoints_lacks") == 2
    assert saver.ddl(concurrently=True).count("INDEX CONCURRENTLY IF NOT EXISTS") == 4
    saver.setup()
    assert saver.check() == []
    saver.close()
    store = SemanticStore.from_conn_string(
        postgres_url, keyring=KEYRING, filterable_fields=("a'b \\\"}",)
    )
    store.setup()
    assert store.check() == []
    rows(postgres_url, "DROP INDEX vat_store_blind")
    assert store.check() == ["1 indexes of filterable_fields are missing: run setup()"]
    store.setup()
    assert store.check() == []
    store.put(("x",), "k", {"a'b \\\"}": "v"})
    assert len(store.search(("x",), filter={"a'b \\\"}": "v"})) == 1
    store.close()


@pytest.mark.parametrize(
    "given", [{"filterable_metadata": ("a\0",)}, {"filterable_fields": ("",)},
              {"filterable_fields": ("%s",)},
              {"filterable_metadata": ("a",), "thread_metadata": ("a",)},
              {"filterable_metadata": "user"}, {"thread_metadata": ("vat_blind",)}],
)  # fmt: skip
def test_what_cannot_be_declared_is_refused(given):
    with pytest.raises(ConfigurationError):
        HybridSaver.from_conn_string("postgresql://nowhere", keyring=KEYRING, **given)


# --- items ----------------------------------------------------------------------------------


@pytest.fixture
def stores(postgres_url):
    made = [
        SemanticStore.from_conn_string(postgres_url, keyring=KEYRING, filterable_fields=fields)
        for fields in (("user", "n"), (), ("user",))
    ]
    for store in made:
        store.setup()
    yield made
    for store in made:
        store.close()


def keys(store: SemanticStore, prefix: tuple[str, ...], filter: dict[str, Any]) -> set[str]:
    return {item.key for item in store.search(prefix, filter=filter, limit=1_000)}


def test_a_search_finds_what_matches(stores):
    store, bare, other = stores
    values = [{"user": value, "n": number} for number, value in enumerate(VALUES)]
    values += [{"n": 1}, {"user": {"a": "ada"}}]
    values = [v for v in values if not isinstance(v.get("user"), Color)]
    for number, value in enumerate(values):
        for root, writer in (("a", store), ("b", bare), ("c", other)):
            writer.put((root, "memories"), f"{root}{number}", value)
    filters: list[dict[str, Any]] = [
        {"user": "ada"}, {"user": 1}, {"user": True}, {"user": None}, {"user": ["ada"]},
        {"user": {"$eq": "ada"}}, {"user": {"$ne": "ada"}}, {"user": {"$eq": "ada", "$ne": "x"}},
        {"user": {"$gt": 0}}, {"user": {"a": 1}}, {"user": {"a": "ada"}}, {"n": 1},
        {"user": "ada", "n": 0}, {"user": "ada", "n": {"$lt": 5}}, {"user": 2.5}, {"user": "1"},
    ]  # fmt: skip
    for wanted in filters:
        expected = {str(at) for at, value in enumerate(values) if matches(value, wanted)}
        for reader in (store, bare):
            found = keys(reader, (), wanted)
            assert found == {root + at for root in "abc" for at in expected}, wanted
            for root in "abc":
                assert keys(reader, (root,), wanted) == {root + at for at in expected}, wanted


def test_other_items_are_not_opened(stores, postgres_url):
    store = stores[0]
    store.put(("a",), "wanted", {"user": "ada"})
    kept = rows(postgres_url, "SELECT vat_value FROM store")[0][0]
    for number in range(20):
        store.put(("a", "b"), f"k{number}", {"user": f"user {number}"})
    rows(
        postgres_url,
        "UPDATE store SET vat_value = set_byte(vat_value, 40, get_byte(vat_value, 40) # 1)",
    )
    rows(postgres_url, "UPDATE store SET vat_value = %s WHERE key = 'wanted'", kept)
    assert keys(store, ("a",), {"user": "ada"}) == {"wanted"}
    with pytest.raises(SealError):
        keys(store, (), {"user": "ada"})


def test_roots_cannot_be_compared_and_are_shredded_with_their_tokens(stores, postgres_url):
    store, bare, _ = stores
    for root in ("a", "b"):
        store.put((root, "x"), "k", {"user": "ada"})
    query = "SELECT value ->> 'vat_blind' FROM store ORDER BY prefix"
    assert len({row[0] for row in rows(postgres_url, query)}) == 2
    store.shred("a")
    assert json.loads(rows(postgres_url, query)[0][0]) == {"user": None, "n": None}
    assert json.loads(rows(postgres_url, query)[1][0])["user"]
    assert keys(store, ("a",), {"user": "ada"}) == set()
    with pytest.raises(InvalidInputError):
        store.shred("")
    assert keys(store, ("b",), {"user": "ada"}) == {"k"}
    bare.put(("b", "x"), "late", {"user": "bob"})
    assert keys(store, ("b",), {"user": "bob"}) == {"late"}
    assert store.reseal().left == 0
    assert json.loads(rows(postgres_url, query)[1][0])["user"]
    assert json.loads(rows(postgres_url, query)[2][0])["user"]
