"""Search by words, and by words and meaning together: `Settings.text_search`."""

import asyncio
import itertools
import math
import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from langgraph.store.base import GetOp, PutOp, SearchOp
from langgraph.store.postgres import PostgresStore

from langgraph_vat import (
    ConfigurationError,
    InvalidInputError,
    Keyring,
    SemanticStore,
    Vat,
)
from langgraph_vat._io.blocking import BlockingSession
from langgraph_vat._ops import lexical, texts
from langgraph_vat._ops.ranking import RankedSearchOp
from tests.fix_servers import waiting
from tests.store.embedder import DIMS, embed
from tests.test_plans import looked_at

INDEX = {"dims": DIMS, "embed": embed, "fields": ["text"]}
BOTH = {"index": INDEX, "text_search": "english"}
WORDS = ("ant", "bee", "cat", "dog", "eel", "fox")
_roots = itertools.count()


@pytest.fixture
def store(postgres_url):
    with SemanticStore.from_conn_string(postgres_url, **BOTH) as store:
        yield store


@pytest.fixture
def words(postgres_url):
    """A store that knows of words alone, and takes them as they are."""
    with SemanticStore.from_conn_string(postgres_url, text_search="simple") as store:
        yield store


def keys(found):
    return [item.key for item in found]


def scored(found):
    return [item.key for item in found if item.score is not None]


def run(url, statement, *params):
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(statement, *params)


# --- which items, in which order ----------------------------------------------------


def test_rare_words_count_more_than_many(store):
    for i in range(20):
        store.put(("u",), f"k{i}", {"text": f"The user likes walking to place {i}"})
    store.put(("u",), "rare", {"text": "A friend lives in Reykjavik"})
    found = store.search(
        ("u",), query="which places does the user like: Reykjavik?", ranking="lexical"
    )
    assert found[0].key == "rare"
    assert found[0].score > 5 * found[1].score > 0


def bm25(documents, query, key):
    """Return the textbook's score of a document."""
    average = max(1, sum(map(len, documents.values())) / len(documents))
    total = 0.0
    for word in dict.fromkeys(query):
        holders = sum(word in document for document in documents.values())
        weight = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
        times = documents[key].count(word)
        length = 1 - 0.75 + 0.75 * len(documents[key]) / average
        total += weight * times * 2.2 / (times + 1.2 * length)
    return total


@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=8), min_size=1, max_size=12),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4),
)
def test_scores_are_those_of_the_textbook(shared_words, texts, query):
    namespace = (f"bm25-{next(_roots)}",)
    documents = {f"{i:02}": text for i, text in enumerate(texts)}
    # The other namespace begins alike, and is none of it.
    ops = [PutOp(namespace, key, {"t": " ".join(d)}, ["t"]) for key, d in documents.items()]
    ops.append(PutOp((f"{namespace[0]}x",), "other", {"t": " ".join(query * 9)}, ["t"]))
    shared_words.batch(ops)
    found = shared_words.search(namespace, query=" ".join(query), limit=20)
    expected = {key: bm25(documents, query, key) for key in documents}
    assert len(found) == len(documents)
    for item in found:
        wanted = expected[item.key]
        assert item.score == (pytest.approx(wanted) if wanted else None)
    scores = [item.score or 0 for item in found]
    assert scores == sorted(scores, reverse=True)


@pytest.fixture(scope="module")
def shared_words(postgres_server):
    options = {"text_search": "simple", "schema": "shared_words"}
    with SemanticStore.from_conn_string(postgres_server.url, **options) as store:
        yield store


ANY = st.text(st.characters(), max_size=60) | st.text("'\"\\&|!<->:*()ab \0", max_size=20)


@settings(max_examples=200)
@given(text=ANY, query=ANY)
@example(text="it's a \\ 'quoted' a&b", query="it's \\ 'quoted' a&b <-> | !")
@example(text="x", query="x:*")
@example(text="half \ud83d emoji \0", query="half \ud83d emoji \0")
@example(text="https://a.io/b?c=1&d='2' a-b-c 1e5 <b>", query="https://a.io/b?c=1&d='2' a-b-c")
@example(text="z" * 3_000, query="z" * 3_000)
@example(text="!:&", query="!:&")
def test_any_text_can_be_stored_and_asked_for(shared_words, text, query):
    namespace = (f"any-{next(_roots)}",)
    shared_words.put(namespace, "k", {"t": text}, index=["t"])
    assert keys(shared_words.search(namespace, query=query)) == ["k"]
    (own,) = shared_words.search(namespace, query=text)
    is_word = any("a" <= char.lower() <= "z" for char in text) and len(text) < 2_000
    assert (own.score is not None) >= is_word


def test_what_one_namespace_has_tells_nothing_in_another(words):
    words.put(("a",), "k", {"t": "cat"})
    words.put(("a",), "l", {"t": "dog"})
    before = [(item.key, item.score) for item in words.search(("a",), query="cat")]
    words.batch([PutOp(("b",), str(i), {"t": "cat"}) for i in range(50)])
    assert [(item.key, item.score) for item in words.search(("a",), query="cat")] == before


def test_words_are_those_of_the_language(store):
    store.put(("u",), "k", {"text": "She was running with the dogs"})
    assert scored(store.search(("u",), query="run dog", ranking="lexical")) == ["k"]
    assert scored(store.search(("u",), query="was the with", ranking="lexical")) == []


def test_the_first_of_a_very_long_text_counts(words):
    long = " ".join(f"w{i}" for i in range(100_000))
    words.put(("u",), "k", {"t": f"early {long} late"})
    assert words.get(("u",), "k").value["t"].endswith("late")
    assert scored(words.search(("u",), query="early")) == ["k"]
    assert scored(words.search(("u",), query=f"w7 {long}")) == ["k"]


def test_of_frequent_words_the_latest_are_scored(words, monkeypatch):
    monkeypatch.setattr(lexical, "_MOST_SCORED", 5)
    monkeypatch.setattr(lexical, "_ENOUGH", 2)
    for i in range(30):
        rare = {3: "dog", 4: "dog", 5: "eel"}.get(i, "")
        words.put(("u",), f"{i:02}", {"t": f"cat {rare}"})
    latest = [f"{i:02}" for i in range(29, -1, -1)]

    def found(query):
        found = words.search(("u",), query=query, limit=30)
        assert len(set(keys(found))) == 30
        with_score = scored(found)
        assert keys(found)[len(with_score) :] == [key for key in latest if key not in with_score]
        return with_score

    assert found("cat dog") == ["04", "03"]
    assert found("cat zebra") == latest[:5]
    assert found("cat eel") == ["05", *latest[:4]]
    assert found("cat eel zebra dog") == ["05", "04", "03"]
    assert found("zebra") == []


RANKINGS = ("vector", "lexical", "hybrid")
FILTERS = (None, {"keep": True}, {"odd": {"$ne": b"x"}})  # the last one SQL cannot express


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("condition", FILTERS)
@pytest.mark.parametrize("size", [1, 7, 20])
def test_every_match_is_on_exactly_one_page(store, ranking, condition, size, monkeypatch):
    monkeypatch.setattr("langgraph_vat._ops.ranking._LEAST_DEPTH", 8)
    dice, ops = random.Random(size), []
    for i in range(60):
        text = f"{' '.join(dice.choices(WORDS, k=2))} {'abcdef'[i % 6] * dice.randrange(20)}"
        value = {"text": text, "keep": i % 3 > 0}
        ops.append(PutOp(("p",), f"{i:02}", value, index=None if i % 5 else False))
    store.batch(ops)
    options = {"query": "an ant or a fox", "ranking": ranking, "filter": condition}
    pages = [store.search(("p",), limit=size, offset=n, **options) for n in range(0, 70, size)]
    found = [item for page in pages for item in page]
    assert (
        len(found) == len({item.key for item in found}) == (40 if condition == FILTERS[1] else 60)
    )
    scores = [item.score for item in found]
    with_score = [score for score in scores if score is not None]
    assert with_score == sorted(with_score, reverse=True)
    assert scores[len(with_score) :] == [None] * (len(found) - len(with_score))
    # What has a score from some limit on is where the pages would have it.
    least = with_score[len(with_score) // 2]
    cut = [
        store.search(("p",), limit=size, offset=n, min_score=least, **options)
        for n in range(0, 70, size)
    ]
    wanted = [item.key for item in found if item.score is not None and item.score >= least]
    assert [item.key for page in cut for item in page] == wanted


def test_hybrid_is_the_fusion_of_both(store):
    for i in range(100):
        store.put(("h",), f"{i:03}", {"text": f"{WORDS[i % 6]} {WORDS[i % 5]} {'abc' * (i % 7)}"})
    query = "ant fox abcabc"
    ranks = {}
    for ranking in ("vector", "lexical"):
        found = store.search(("h",), query=query, ranking=ranking, limit=20)
        for rank, key in enumerate(scored(found), start=1):
            ranks.setdefault(key, []).append(rank)
    found = store.search(("h",), query=query, ranking="hybrid", limit=10)
    expected = {key: sum(1 / (60 + rank) for rank in of_key) for key, of_key in ranks.items()}
    assert [item.score for item in found] == sorted(expected.values(), reverse=True)[:10]
    assert all(item.score == expected[item.key] for item in found)
    # The others are there, too, in the order of their meaning.
    every = store.search(("h",), query=query, ranking="hybrid", limit=10, offset=len(expected))
    by_meaning = store.search(("h",), query=query, limit=100)
    assert [i.score for i in every] == [None] * 10
    assert keys(every) == [key for key in keys(by_meaning) if key not in expected][:10]


def test_hybrid_finds_what_either_finds(store):
    store.put(("h",), "exact", {"text": "order XK-4711 was sent"})
    store.put(("h",), "near", {"text": "ooo rrr ddd eee"})
    for i in range(100):
        store.put(("h",), f"{i}", {"text": "lllll mmmm nnnn"})
    assert set(keys(store.search(("h",), query="xk-4711", ranking="hybrid", limit=2))) >= {"exact"}
    store.put(("h",), "no text", {"other": 1})
    assert len(store.search(("h",), query="XK-4711", ranking="hybrid", limit=200)) == 103


FILL = (
    """
INSERT INTO store (prefix, key, value)
SELECT 'users.' || n % 1000, n::text, '{}' FROM generate_series(1, 30000) AS n""",
    """
INSERT INTO vat_store_texts (prefix, key, updated_at, document, words)
SELECT prefix, key, updated_at, to_tsvector('simple', text), 8
FROM store, LATERAL (
    SELECT string_agg('w' || (key::int * i % 4999), ' ') || ' all' AS text
    FROM generate_series(1, 7) AS i
) AS t""",
    "VACUUM ANALYZE",
)


def test_other_namespaces_are_not_looked_at(words, postgres_url, monkeypatch):
    for statement in FILL:
        run(postgres_url, statement)
    asked, fetch = [], BlockingSession.fetch

    async def spied(session, query, params=None, **options):
        asked.append((query, params))
        return await fetch(session, query, params, **options)

    monkeypatch.setattr(BlockingSession, "fetch", spied)
    found = words.search(("users", "7"), query="all w49 w14 w1234", filter={"n": None})
    assert len(scored(found)) == 10
    with psycopg.connect(postgres_url) as connection:
        for statement, params in asked:
            text = statement if isinstance(statement, str) else statement.as_string(connection)
            plan = connection.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {text}", params).fetchone()
            assert looked_at(plan[0][0]["Plan"]) < 1_000, text
    assert len(asked) >= 2


def test_a_page_may_be_larger_than_anything(store):
    store.put(("a",), "k", {"text": "ant"})
    for ranking in RANKINGS:
        (found,) = store.search(("a",), query="ant", ranking=ranking, limit=10**30)
        assert found.key == "k"
        assert store.search(("a",), query="ant", ranking=ranking, offset=10**30) == []
        assert store.search(("a",), query="ant", ranking=ranking, limit=0) == []
        assert store.search(("b",), query="ant", ranking=ranking) == []


# --- documents go with their items -------------------------------------------------


def test_a_text_that_is_gone_is_found_no_more(words):
    words.put(("v",), "k", {"t": "ant"})
    words.put(("v",), "k", {"t": "bee"})
    assert scored(words.search(("v",), query="ant")) == []
    assert scored(words.search(("v",), query="bee")) == ["k"]
    words.put(("v",), "k", {"t": "bee"}, index=False)
    assert scored(words.search(("v",), query="bee")) == []
    words.put(("v",), "k", {"t": "bee", "parts": ["cat", "dog"]}, index=["parts[*]"])
    assert scored(words.search(("v",), query="bee")) == []
    assert scored(words.search(("v",), query="dog")) == ["k"]
    words.delete(("v",), "k")
    assert words.search(("v",), query="dog") == []


def test_a_batch_finds_what_it_wrote(words):
    results = words.batch(
        [
            PutOp(("b",), "k", {"t": "ant"}),
            SearchOp(("b",), query="ant"),
            PutOp(("b",), "k", {"t": "bee"}),
            SearchOp(("b",), query="ant"),
            SearchOp(("b",), query="bee"),
            GetOp(("b",), "k"),
        ]
    )
    assert [scored(results[n]) for n in (1, 3, 4)] == [["k"], [], ["k"]]


def test_what_has_expired_is_not_found(words, postgres_url):
    words.put(("t",), "k", {"t": "ant"}, ttl=1)
    words.put(("t",), "l", {"t": "ant"})
    run(postgres_url, "UPDATE store SET expires_at = now() WHERE key = 'k'")
    assert keys(words.search(("t",), query="ant")) == ["l"]


def test_values_that_json_cannot_hold_are_found_by_the_rest(words):
    words.put(("v",), "k", {"t": "ant", "b": b"\xff", "n": {1: "bee"}, "d": [{"x": {1, 2}}]})
    assert scored(words.search(("v",), query="ant")) == ["k"]
    assert scored(words.search(("v",), query="bee")) == ["k"]


def test_what_a_stranger_wrote_anew_is_not_found_by_its_old_words(postgres_url):
    with PostgresStore.from_conn_string(postgres_url) as theirs:
        theirs.setup()
        theirs.put(("s",), "before", {"text": "ant"})
        with SemanticStore.from_conn_string(postgres_url, text_search="simple") as ours:
            assert scored(ours.search(("s",), query="ant")) == ["before"]
            ours.put(("s",), "ours", {"text": "bee"})
            theirs.put(("s",), "ours", {"text": "cat"})
            theirs.put(("s",), "theirs", {"text": "bee"})
            assert scored(ours.search(("s",), query="bee")) == []
            assert len(ours.search(("s",), query="bee")) == 3
            assert ours.index_texts() == 2
            assert ours.index_texts() == 0
            assert scored(ours.search(("s",), query="bee")) == ["theirs"]
            assert scored(ours.search(("s",), query="cat")) == ["ours"]


# --- setting it up ------------------------------------------------------------------


def test_items_from_before_are_found_and_a_setup_that_was_stopped_goes_on(
    postgres_url, monkeypatch
):
    monkeypatch.setattr(texts, "_PAGE", 10)
    with SemanticStore.from_conn_string(postgres_url) as store:
        store.batch([PutOp(("u",), f"{i:02}", {"t": "ant"}) for i in range(25)])
        store.put(("u",), "odd", {"t": "ant", "b": b"x"})
    read, calls = texts._old_text, itertools.count(1)

    def stopped(*args):
        if next(calls) > 15:
            raise KeyboardInterrupt
        return read(*args)

    later = SemanticStore.from_conn_string(postgres_url, text_search="simple")
    monkeypatch.setattr(texts, "_old_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        later.setup()
    assert ["lack words: run setup()" in line for line in later.check()] == [True]
    monkeypatch.setattr(texts, "_old_text", read)
    later.setup()
    assert later.check() == []
    assert len(scored(later.search(("u",), query="ant", limit=30))) == 26
    assert next(calls) == 17  # what was done is kept
    later.close()


def test_another_language_is_refused_and_the_way_to_it_works(postgres_url):
    with SemanticStore.from_conn_string(postgres_url, text_search="english") as store:
        store.put(("u",), "k", {"t": "running dogs"})
    other = SemanticStore.from_conn_string(postgres_url, text_search="simple")
    with pytest.raises(ConfigurationError, match=r"'english'.*'simple'.*DROP TABLE") as caught:
        other.setup()
    assert [str(caught.value).removesuffix(". Nothing was written.")] == other.check()
    # A process that never asked reads and writes as it is recorded.
    assert scored(other.search(("u",), query="run")) == ["k"]
    run(postgres_url, "DROP TABLE vat_store_texts, vat_store_text_search")
    other.setup()
    assert scored(other.search(("u",), query="run")) == []
    assert scored(other.search(("u",), query="running")) == ["k"]
    other.close()


@pytest.mark.parametrize("name", ["klingon", "English", "english'; --", "pg_catalog.english"])
def test_a_language_that_is_not_there_is_named_before_anything_is_made(postgres_url, name):
    store = SemanticStore.from_conn_string(postgres_url, text_search=name)
    with pytest.raises(ConfigurationError, match=r"english.*simple"):
        store.setup()
    assert "english" in store.check()[0]
    store.close()
    assert run(postgres_url, "SELECT to_regclass('vat_store_texts')").fetchone() == (None,)


def test_ddl_is_enough_for_a_role_that_may_not_create(postgres_url):
    options = {"text_search": "english", "schema": "own"}
    run(postgres_url, "DROP ROLE IF EXISTS few_rights")
    run(postgres_url, "CREATE ROLE few_rights LOGIN")
    url = postgres_url.replace("postgres@", "few_rights@")
    store = SemanticStore.from_conn_string(url, **options)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(store.ddl())
        connection.execute("GRANT USAGE ON SCHEMA own TO few_rights")
        connection.execute(
            "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA own TO few_rights"
        )
        connection.execute("REVOKE DELETE ON own.vat_store_texts FROM few_rights")
        assert ["DELETE on table vat_store_texts" in line for line in store.check()] == [True]
        connection.execute("GRANT DELETE ON own.vat_store_texts TO few_rights")
        connection.execute(
            "REVOKE INSERT, UPDATE, DELETE ON own.vat_store_text_search FROM few_rights"
        )
    store.setup()
    assert store.check() == []
    store.put(("u",), "k", {"t": "ants"})
    assert scored(store.search(("u",), query="ant")) == ["k"]
    store.close()
    run(postgres_url, "DROP OWNED BY few_rights; DROP ROLE few_rights")


def test_setup_may_run_in_many_threads_at_once(postgres_url):
    with SemanticStore.from_conn_string(postgres_url) as store:
        store.batch([PutOp(("u",), f"{i}", {"t": "ant"}) for i in range(600)])
    stores = [SemanticStore.from_conn_string(postgres_url, text_search="simple") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(SemanticStore.setup, stores))
    assert len(scored(stores[0].search(("u",), query="ant", limit=999))) == 600
    for store in stores:
        store.close()


def test_reading_older_texts_takes_the_place_of_no_newer_one(words, postgres_url):
    words.put(("u",), "k", {"t": "old"})
    run(postgres_url, "UPDATE vat_store_texts SET updated_at = 'epoch'")
    with psycopg.connect(postgres_url) as other, ThreadPoolExecutor(1) as pool:
        other.execute("UPDATE store SET updated_at = now()")
        other.execute("UPDATE vat_store_texts SET updated_at = now(), document = 'new:1'")
        reading = pool.submit(words.index_texts)
        while not waiting(postgres_url):
            assert not reading.done()
        other.commit()
        assert reading.result() == 0
    assert scored(words.search(("u",), query="new")) == ["k"]


def test_items_may_be_put_while_those_from_before_are_read(words, postgres_url):
    words.batch([PutOp(("u",), f"{i:03}", {"t": "old"}) for i in range(300)])

    def put(number):
        for i in range(number, 300, 3):
            words.put(("u",), f"{i:03}", {"t": "new"})

    def read():
        for _ in range(20):
            run(postgres_url, "UPDATE vat_store_texts SET updated_at = 'epoch' WHERE key < '200'")
            words.index_texts()

    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(put, n) for n in range(3)] + [pool.submit(read)]:
            one.result()
    assert scored(words.search(("u",), query="old", limit=300)) == []
    assert len(scored(words.search(("u",), query="new", limit=300))) == 300


def test_words_are_never_kept_of_what_is_sealed(postgres_url):
    with pytest.raises(ConfigurationError, match=r"text_search.*keyring"):
        SemanticStore.from_conn_string(
            postgres_url, text_search="english", keyring=Keyring.generate()
        )
    with pytest.raises(ConfigurationError, match=r"text_search.*keyring"):
        Vat.connect(postgres_url, text_search="english", keyring=Keyring.generate())


def test_words_go_when_their_root_is_sealed(words, postgres_url):
    for namespace in (("a",), ("a", "b"), ("ab",)):
        words.put(namespace, "k", {"t": "secretword"})
    until = datetime.now(UTC) + timedelta(hours=1)
    with SemanticStore.from_conn_string(
        postgres_url, keyring=Keyring.generate(), accept_plaintext=until
    ) as sealing:
        assert sealing.seal_existing().left == 0
        assert len(sealing.search(())) == 3
    assert run(postgres_url, "SELECT count(*) FROM vat_store_texts").fetchone() == (0,)
    # A process without the key does not bring them back.
    assert words.index_texts() == 3
    dump = run(postgres_url, "SELECT string_agg(t::text, '') FROM vat_store_texts t").fetchone()
    assert "secretword" not in dump[0]


def test_what_is_sealed_meanwhile_gets_no_words(words, postgres_url, monkeypatch):
    words.put(("a",), "k", {"t": "secretword"})
    run(postgres_url, "DELETE FROM vat_store_texts")
    until = datetime.now(UTC) + timedelta(hours=1)
    read = texts._old_text

    def read_and_sealed(*args):
        with SemanticStore.from_conn_string(
            postgres_url, keyring=Keyring.generate(), accept_plaintext=until
        ) as sealing:
            assert sealing.seal_existing().values == 1
        return read(*args)

    monkeypatch.setattr(texts, "_old_text", read_and_sealed)
    assert words.index_texts() == 0
    assert run(postgres_url, "SELECT count(*) FROM vat_store_texts").fetchone() == (0,)


def prefixes(url):
    found = run(url, "SELECT prefix FROM vat_store_texts ORDER BY prefix").fetchall()
    return [prefix for (prefix,) in found]


def test_words_go_with_their_items_however_these_go(words, postgres_url):
    views = {name: words.scoped(name) for name in ("s", "t")}
    for view in (words, *views.values()):
        for namespace in (("a",), ("a", "b"), ("ab",)):
            view.put(namespace, "k", {"t": "ant"}, ttl=60)
    assert words.delete_namespace(("a",)) == views["s"].delete_namespace(("a",)) == 2
    assert views["t"].delete_all() == 3
    assert prefixes(postgres_url) == ["ab", "vat-tenant:s.ab"]
    run(postgres_url, "UPDATE store SET expires_at = now()")
    assert views["s"].sweep_ttl() == 1
    assert prefixes(postgres_url) == ["ab"]
    words.delete(("ab",), "k")
    assert prefixes(postgres_url) == []


def test_words_of_a_tenant_go_when_it_is_sealed(words, postgres_url):
    for name in ("s", "s2"):
        words.scoped(name).put(("a",), "k", {"t": "secretword"})
    until = datetime.now(UTC) + timedelta(hours=1)
    with SemanticStore.from_conn_string(
        postgres_url, keyring=Keyring.generate(), accept_plaintext=until
    ) as sealing:
        view = sealing.scoped("s")
        assert view.seal_existing().values == 1
        assert prefixes(postgres_url) == ["vat-tenant:s2.a"]
        assert view.shred_all() == 1
    assert words.scoped("s").index_texts() == 1  # of which nothing can be read
    (document,) = run(
        postgres_url, "SELECT document::text FROM vat_store_texts WHERE prefix = 'vat-tenant:s.a'"
    ).fetchone()
    assert document == ""


# --- tenants ----------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["lexical", "hybrid"])
def test_a_view_finds_by_words_what_is_its_own(store, ranking):
    views = {name: store.scoped(name) for name in ("a", "a.b", "%")}
    for name, view in views.items():
        view.put(("u",), "k", {"text": f"the kiwi of {name}"})
    store.put(("u",), "k", {"text": "the kiwi of nobody"})
    for name, view in views.items():
        (found,) = view.search((), query="kiwi", ranking=ranking)
        assert (found.namespace, found.value["text"]) == (("u",), f"the kiwi of {name}")
        (found,) = asyncio.run(view.asearch(("u",), query="kiwi", ranking=ranking))
        assert found.score > 0
    (found,) = store.search((), query="kiwi", ranking=ranking)
    assert found.value["text"] == "the kiwi of nobody"


def test_a_view_reads_its_own_texts(words, postgres_url):
    for view in (words, words.scoped("t"), words.scoped("t2")):
        for i in range(3):
            view.put(("u", "v"), f"{i}", {"t": "ant"})
    run(postgres_url, "DELETE FROM vat_store_texts")
    run(postgres_url, "UPDATE vat_store_text_search SET is_complete = false")
    assert words.scoped("t").index_texts() == 3
    assert prefixes(postgres_url) == ["vat-tenant:t.u.v"] * 3
    assert len(words.check()) == 1
    assert asyncio.run(words.aindex_texts()) == 6
    assert words.check() == []


# --- options of a search --------------------------------------------------------------


def test_what_a_store_ranks_by_unless_told(postgres_url):
    def first(options, **given):
        with SemanticStore.from_conn_string(postgres_url, **options) as store:
            return store.search(("d",), query="kiwi", limit=1, **given)[0].key

    with SemanticStore.from_conn_string(postgres_url, **BOTH) as store:
        store.put(("d",), "words", {"text": "a kiwi and mmmmmmmmmmmmmmmm aaaaaaaaaaaaaa"})
        store.put(("d",), "meaning", {"text": "ikiw"})
        store.put(("d",), "latest", {"text": "aaaa"})
    assert first({}) == "latest"
    assert first({"index": INDEX}) == "meaning"
    assert first({"text_search": "english"}) == "words"
    assert first(BOTH) == "meaning"
    assert first(BOTH, ranking="lexical") == "words"
    assert first({**BOTH, "ranking": "lexical"}) == "words"
    assert first({**BOTH, "ranking": "lexical"}, ranking="vector") == "meaning"


def test_the_embedder_is_not_asked_for_words(postgres_url):
    asked = []

    def spied(texts):
        asked.extend(texts)
        return embed(texts)

    options = {"index": {**INDEX, "embed": spied}, "text_search": "english"}
    with SemanticStore.from_conn_string(postgres_url, **options) as store:
        store.search(("a",), query="words", ranking="lexical")
        store.search(("a",), query="meaning")
        store.search(("a",), query="both", ranking="hybrid")
    assert asked == ["meaning", "both"]


@pytest.mark.parametrize(
    ("made_with", "options", "named"),
    [
        (BOTH, {"ranking": "best"}, "vector, lexical, hybrid"),
        (BOTH, {"ranking": ["vector"]}, "vector, lexical, hybrid"),
        (BOTH, {"min_score": math.nan}, "min_score must be"),
        (BOTH, {"min_score": math.inf}, "min_score must be"),
        (BOTH, {"min_score": True}, "min_score must be"),
        (BOTH, {"min_score": "1"}, "min_score must be"),
        (BOTH, {"min_score": 0.5, "query": None}, "min_score needs a query"),
        (BOTH, {"min_score": 0.5, "query": ""}, "min_score needs a query"),
        (BOTH, {"ef_search": 0}, "from 1 to 1,000"),
        (BOTH, {"ef_search": 10.0}, "from 1 to 1,000"),
        (BOTH, {"max_scan_tuples": 2**31}, "from 1 to 2,147,483,647"),
        (BOTH, {"fuzzy": True}, "no option 'fuzzy'"),
        ({"index": INDEX}, {"ranking": "lexical"}, "text_search="),
        ({"index": INDEX}, {"ranking": "hybrid"}, "text_search="),
        ({"text_search": "english"}, {"ranking": "vector"}, "index="),
        ({"text_search": "english"}, {"ranking": "hybrid"}, "index="),
        ({"text_search": "english"}, {"ef_search": 10}, "HNSW"),
        ({}, {"min_score": 0.5}, "min_score needs"),
    ],
)
def test_options_that_cannot_be_are_refused(postgres_url, made_with, options, named):
    store = SemanticStore.from_conn_string(postgres_url, **made_with)
    with pytest.raises(InvalidInputError, match=f"{named}.*nothing was searched"):
        store.search(("a",), **{"query": "x", **options})
    store.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"ranking": "lexical"},
        {"ranking": "hybrid", "index": INDEX},
        {"ranking": "vector", "text_search": "english"},
        {"ranking": "best", **BOTH},
        {"ef_search": 100},
        {"ef_search": 100, "index": {**INDEX, "ann_index_config": {"kind": "flat"}}},
        {"ef_search": 1_001, "index": INDEX},
        {"text_search": ""},
        {"text_search": "a\0"},
        {"text_search": True},
    ],
)
def test_a_store_that_could_not_search_so_is_not_made(postgres_url, settings):
    with pytest.raises(ConfigurationError):
        SemanticStore.from_conn_string(postgres_url, **settings)


def test_how_far_a_scan_goes_is_set_for_one_search_alone(postgres_url, monkeypatch):
    seen = []
    names = ("hnsw.ef_search", "hnsw.max_scan_tuples")
    search_run = lexical.search.run

    async def spied(session, query):
        rows = await session.fetch("SELECT current_setting(%s), current_setting(%s)", names)
        seen.append(tuple(map(int, rows[0])))
        return await search_run(session, query)

    monkeypatch.setattr(lexical.search, "run", spied)
    options = {"index": INDEX, "max_scan_tuples": 7_000}
    with SemanticStore.from_conn_string(postgres_url, **options) as store:
        store.put(("a",), "k", {"text": "abc"})
        fields = ("a",), None, 10, 0, "abc"
        tuned = [{}, {"ef_search": 77}, {"ef_search": 78, "max_scan_tuples": 9}]
        ops = [RankedSearchOp(*fields, options=options) for options in tuned]
        for found in store.batch([*ops, SearchOp(*fields)]):
            assert keys(found) == ["k"]
    assert seen == [(40, 7_000), (77, 7_000), (78, 9), (40, 7_000)]  # 40 is pgvector's own


def test_the_least_score_counts_for_what_is_sealed_as_well(postgres_url):
    with SemanticStore.from_conn_string(
        postgres_url, index=INDEX, keyring=Keyring.generate()
    ) as store:
        for i in range(20):
            store.put(("s",), f"{i:02}", {"text": "abc" + "mno" * i, "n": i % 2})
        for condition in (None, {"n": 1}):
            options = {"query": "abc", "filter": condition}
            every = store.search(("s",), limit=20, **options)
            least = every[3].score
            assert keys(store.search(("s",), min_score=least, **options)) == keys(every[:4])
            assert keys(store.search(("s",), min_score=least, offset=3, **options)) == [
                every[3].key
            ]


def test_both_faces_take_the_same_options(store):
    store.put(("a",), "k", {"text": "kiwi"})
    store.put(("a",), "l", {"text": "plum"})
    options = {"query": "kiwi", "ranking": "lexical", "min_score": 0.0, "limit": 5}
    assert keys(store.search(("a",), **options)) == ["k"]
    assert keys(asyncio.run(store.asearch(("a",), **options))) == ["k"]
