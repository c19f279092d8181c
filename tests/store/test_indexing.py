"""What waits for its vectors gets them, once, whoever dies or fails meanwhile."""

import asyncio
import logging
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from langgraph_vat import ConfigurationError, Keyring, SemanticStore, Vat
from langgraph_vat._ops import indexing
from tests.store.embedder import DIMS, embed
from tests.store.queue import HERE, PENDING, SECRET, VECTORS, until


@pytest.fixture
def queued(make, embedder):
    """Return a store in which items wait, and whose embedder works again."""

    def one(count: int = 3, **more: Any) -> SemanticStore:
        store = make(embedder, **more)
        embedder.fail()
        for number in range(count):
            store.put(HERE, f"{number:03}", {"text": f"text {number}"})
        embedder.work()
        embedder.calls.clear()
        return store

    return one


@pytest.mark.parametrize("is_sealed", [False, True], ids=["plain", "sealed"])
@pytest.mark.parametrize("face", ["sync", "async"])
def test_what_waits_is_indexed_when_it_is_asked_for(queued, embedder, query, is_sealed, face):
    store = queued(40, keyring=Keyring.generate() if is_sealed else None)
    if face == "sync":
        before, done, after = store.pending(), store.index_pending(), store.pending()
    else:

        async def main() -> Any:
            return await store.apending(), await store.aindex_pending(), await store.apending()

        before, done, after = asyncio.run(main())
    assert (before.items, before.error) == (40, "ConnectionError")
    assert 0 <= (datetime.now(UTC) - before.since).total_seconds() < 60
    assert done == 40
    assert after == (0, None, "")
    assert [len(call) for call in embedder.calls] == [32, 8]  # a page at once
    assert len(query(VECTORS)) == 40
    assert store.search(HERE, query="text 7", limit=1)[0].score == pytest.approx(1.0)


def test_the_paths_of_that_put_are_those_that_are_indexed(make, embedder, query):
    store = make(embedder)
    embedder.fail()
    value = {"text": "abc", "more": "def", "tags": ["x", "y"]}
    store.put(HERE, "own", value, index=["more", "tags[*]"])
    store.put(HERE, "none", {"no": "text"})  # nothing to embed: nothing waits
    embedder.work()
    assert store.index_pending() == 1
    assert query(VECTORS) == [("own", "more"), ("own", "tags[*].0"), ("own", "tags[*].1")]


def test_items_are_indexed_in_the_background(make, embedder, query, monkeypatch):
    monkeypatch.setattr("langgraph_vat._lifecycle._INDEX_S", 0.05)
    store = make(embedder)
    embedder.fail()
    store.put(HERE, "k", {"text": "abc"})
    embedder.work()
    until(lambda: query(VECTORS))
    assert query(PENDING) == []
    store.close()
    assert "langgraph-vat indexer" not in [thread.name for thread in threading.enumerate()]


def test_a_store_without_an_index_has_no_thread_and_no_queue(postgres_url):
    with SemanticStore.from_conn_string(postgres_url) as store:
        store.put(HERE, "k", {"text": "abc"})
        assert "langgraph-vat indexer" not in [thread.name for thread in threading.enumerate()]
        for call in (store.pending, store.index_pending):
            with pytest.raises(ConfigurationError, match="no index"):
                call()


def test_closing_does_not_wait_for_an_embedder_that_hangs(queued, embedder, query, monkeypatch):
    monkeypatch.setattr("langgraph_vat._lifecycle._INDEX_S", 0.05)
    store = queued(2)
    embedder.gate.clear()
    until(lambda: embedder.calls)
    store.close()
    assert not embedder.gate.is_set()
    assert (
        query("SELECT error, due_at <= now(), taken_until <= now() FROM vat_store_pending")
        == [("ConnectionError", True, True)] * 2
    )


def test_a_vat_stops_indexing_without_a_word(
    postgres_url, redis_url, embedder, caplog, monkeypatch
):
    monkeypatch.setattr("langgraph_vat._lifecycle._INDEX_S", 0.001)
    index: Any = {"dims": DIMS, "embed": embedder}
    for _ in range(5):
        with Vat.connect(postgres_url, redis_url, index=index) as vat:
            vat.store.put(HERE, "k", {"text": "abc"})
    assert [r.message for r in caplog.records if r.name == "langgraph_vat"] == []


KILLED = """
import sys
from langgraph_vat import SemanticStore

def failing(texts):
    raise ConnectionError

index = {"dims": 16, "embed": failing, "fields": ["text"]}
store = SemanticStore.from_conn_string(sys.argv[1], index=index)
store.setup()
store.put(("a", "b"), "k", {"text": "abc"})
print("put", flush=True)
sys.stdin.read()
"""


def test_who_is_killed_leaves_what_waits_to_the_next(postgres_url, make, embedder, query):
    command = [sys.executable, "-c", KILLED, postgres_url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "put\n"
        process.send_signal(signal.SIGKILL)
    assert make(embedder).index_pending() == 1
    assert query(VECTORS) == [("k", "text")]


HANGING = """
import sys
from langgraph_vat import SemanticStore

def hanging(texts):
    print("asked", flush=True)
    sys.stdin.read()

index = {"dims": 16, "embed": hanging, "fields": ["text"]}
SemanticStore.from_conn_string(sys.argv[1], index=index).index_pending()
"""


def test_who_is_killed_while_it_embeds_loses_what_it_took_after_a_while(
    postgres_url, queued, query
):
    store = queued()
    command = [sys.executable, "-c", HANGING, postgres_url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "asked\n"
        assert store.index_pending() == 0  # it is at it
        process.send_signal(signal.SIGKILL)
    query("UPDATE vat_store_pending SET taken_until = now() - interval '1 s' RETURNING 1")
    assert store.index_pending() == 3
    assert len(query(VECTORS)) == 3


INDEXING = """
import sys
sys.path.insert(0, sys.argv[2])
from langgraph_vat import SemanticStore
from tests.store.embedder import embed

asked = []
def counting(texts):
    asked.extend(texts)
    return embed(texts)

index = {"dims": 16, "embed": counting, "fields": ["text"]}
store = SemanticStore.from_conn_string(sys.argv[1], index=index)
print("ready", flush=True)
sys.stdin.readline()
print(store.index_pending(), len(asked), flush=True)
store.close()
"""


def test_processes_that_index_at_once_index_each_item_once(postgres_url, queued, query):
    queued(300)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", INDEXING, postgres_url, root]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sum(int(done) for done, _ in said) == sum(int(asked) for _, asked in said) == 300
    assert query("SELECT count(*) FROM store_vectors") == [(300,)]
    assert query(PENDING) == []


def test_of_two_who_index_the_same_one_stores(queued, embedder, query):
    store = queued()
    embedder.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.index_pending)
        until(lambda: len(embedder.calls) == 1)
        query("UPDATE vat_store_pending SET taken_until = now() RETURNING 1")  # it was too slow
        second = pool.submit(store.index_pending)
        until(lambda: len(embedder.calls) == 2)
        embedder.gate.set()
    assert first.result() + second.result() == 3
    assert len(query(VECTORS)) == 3


CHANGES: dict[str, Any] = {
    "deleted": (lambda s: s.delete(HERE, "000"), 2, []),
    "changed": (lambda s: s.put(HERE, "000", {"text": "mno"}), 2, ["mno"]),
    "not to be indexed": (lambda s: s.put(HERE, "000", {"text": "mno"}, index=False), 2, []),
    "refreshed": (lambda s: s.get(HERE, "000"), 3, ["text 0"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_item_that_changes_while_it_is_embedded_gets_no_old_vectors(
    make, embedder, query, change
):
    store = make(embedder, ttl={"default_ttl": 60})
    embedder.fail()
    for number in range(3):
        store.put(HERE, f"{number:03}", {"text": f"text {number}"}, ttl=60)
    embedder.work()
    assert store.search((), query="works again")
    embedder.calls.clear()
    act, indexed, texts = CHANGES[change]
    begun, go_on = threading.Event(), threading.Event()

    def slowly(texts: list[str]) -> None:
        if "text 1" in texts:
            begun.set()
            assert go_on.wait(60)

    embedder.failing = slowly
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(store.index_pending)
        assert begun.wait(60)
        act(store)
        go_on.set()
    assert done.result() == indexed
    assert query(PENDING) == []
    expected = {text: embed([text])[0] for text in texts}
    for text in expected:
        (found,) = [i for i in store.search(HERE, query=text) if i.key == "000"]
        assert found.score == pytest.approx(1.0)
    assert query("SELECT count(*) FROM store_vectors WHERE key = '000'") == [(len(texts),)]


def test_what_is_put_again_before_it_is_read_is_not_indexed_by_the_paths_of_before(
    queued, embedder, query, monkeypatch
):
    store = queued(1)
    read = indexing._read

    async def late(*args: Any) -> Any:
        embedder.fail()
        store.put(HERE, "000", {"text": "abc", "more": "def"}, index=["more"])
        embedder.work()
        return await read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_read", late)
        assert store.index_pending() == 0
    assert query(PENDING) == [("000", ["more"], 0, "ConnectionError")]
    assert store.index_pending() == 1
    assert query(VECTORS) == [("000", "more")]


def test_who_puts_without_an_index_meanwhile_is_indexed_as_it_is(
    postgres_url, queued, embedder, query
):
    store = queued(1)
    plain = SemanticStore.from_conn_string(postgres_url)
    embedder.failing = lambda texts: plain.put(HERE, "000", {"text": f"abc {len(embedder.calls)}"})
    assert store.index_pending() == 0
    assert len(query(PENDING)) == 1
    embedder.work()
    assert store.index_pending() == 1
    assert store.search(HERE, query="abc 1")[0].score == pytest.approx(1.0)
    plain.close()


def test_what_cannot_be_embedded_stays_and_stops_no_other(queued, embedder, query):
    store = queued(70)
    bad = {"text 0", "text 33", "text 34"}

    def failing(texts: list[str]) -> None:
        if bad & set(texts):
            raise ValueError(texts)

    embedder.failing = failing
    assert store.index_pending() == 67
    assert query(PENDING) == [(f"{n:03}", None, 1, "ValueError") for n in (0, 33, 34)]
    assert store.index_pending() == 0
    assert [row[2] for row in query(PENDING)] == [2, 2, 2]
    assert query(
        "SELECT min(due_at) > now(), max(taken_until) <= now() FROM vat_store_pending"
    ) == [(True, True)]
    embedder.work()
    assert store.index_pending() == 3


def test_what_cannot_be_opened_stays_and_stops_no_other(make, embedder, query, postgres_url):
    keyring = Keyring.generate()
    store = make(embedder, keyring=keyring)
    embedder.fail()
    for root in ("good", "damaged", "keyless", "moved"):
        store.put((root,), root, {"text": root})
    store.put(("shredded",), "shredded", {"text": "x"})
    store.shred("shredded")
    with psycopg.connect(postgres_url) as connection:
        connection.execute("UPDATE vat_store_keys SET data_key = 'bad' WHERE root = 'keyless'")
        connection.execute("UPDATE store SET vat_value = '\\x00' WHERE key = 'damaged'")
        connection.execute(
            "UPDATE store SET vat_value = (SELECT vat_value FROM store WHERE key = 'good')"
            " WHERE key = 'moved'"
        )
    store.close()
    embedder.work()
    fresh = make(embedder, keyring=keyring)
    assert fresh.index_pending() == 1
    assert query(VECTORS) == [("good", "text")]
    assert [(key, attempts) for key, _, attempts, _ in query(PENDING)] == [
        ("damaged", 1),
        ("keyless", 1),
        ("moved", 1),
        ("shredded", 1),
    ]
    assert {error for *_, error in query(PENDING)} == {
        "OtherKeyError",
        "SealError",
        "ShreddedError",
    }


def test_an_outage_leaves_all_as_it_was_and_is_said_once(queued, embedder, query, caplog):
    store = queued(40)
    caplog.clear()
    embedder.fail(error=TimeoutError)
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert store.index_pending() == 0
    assert [len(call) for call in embedder.calls] == [32, 1] * 3  # a page, and something else
    assert query(
        "SELECT bool_and(due_at <= now() AND taken_until <= now()) FROM vat_store_pending"
    ) == [(True,)]
    assert store.pending().error == "TimeoutError"
    assert "text 1" not in caplog.text
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) <= 1
    embedder.work()
    assert store.index_pending() == 40


def test_a_wrong_embedder_does_not_empty_the_queue(queued, make, query):
    queued(3)
    wrong = make(lambda texts: [[1.0] for _ in texts])
    assert wrong.index_pending() == 0
    assert [error for *_, error in query(PENDING)] == ["ConfigurationError"] * 3
    assert query(VECTORS) == []


def test_nothing_of_it_is_logged(queued, embedder, caplog):
    store = queued(1)
    store.put(HERE, "k", {"text": SECRET})
    embedder.fail(error=RuntimeError)
    store.put(HERE, "k", {"text": SECRET})
    with caplog.at_level(logging.DEBUG):
        store.index_pending()
    assert SECRET not in caplog.text
