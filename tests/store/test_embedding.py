"""An embedder that fails, hangs or lies costs no item, and nobody else's time."""

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings
from langgraph.store.base import GetOp, PutOp, SearchOp

from langgraph_vat import ConfigurationError, Keyring, SemanticStore, UnavailableError
from tests.store.embedder import Embedder, embed
from tests.store.queue import HERE, PENDING, SECRET, VECTORS, callers, soon, until


@pytest.mark.parametrize("is_sealed", [False, True], ids=["plain", "sealed"])
@pytest.mark.parametrize("face", ["sync", "async"])
def test_an_item_whose_text_cannot_be_embedded_is_stored_and_queued(
    make, embedder, query, caplog, is_sealed, face
):
    store = make(embedder, keyring=Keyring.generate() if is_sealed else None)

    def put(key: str, **more: Any) -> None:
        if face == "sync":
            store.put(HERE, key, {"text": SECRET, "more": "x"}, **more)
        else:
            asyncio.run(store.aput(HERE, key, {"text": SECRET, "more": "x"}, **more))

    put("old")
    put("other")
    embedder.fail()
    with caplog.at_level(logging.DEBUG):
        put("old")
        put("new", index=["more", "text"])
        put("unindexed", index=False)
    assert store.get(HERE, "old").value == {"text": SECRET, "more": "x"}
    assert query(VECTORS) == [("other", "text")]  # none of the text that was replaced
    assert query(PENDING) == [
        ("new", ["more", "text"], 0, "ConnectionError"),
        ("old", None, 0, "ConnectionError"),
    ]
    assert SECRET not in caplog.text
    assert [r.levelname for r in caplog.records if r.name == "langgraph_vat"] == ["WARNING"]


def test_who_fails_twice_is_asked_three_times(make, embedder, query):
    store = make(embedder)
    embedder.fail(2)
    store.put(HERE, "k", {"text": "abc"})
    assert len(embedder.calls) == 3
    assert query(PENDING) == []
    assert query(VECTORS) == [("k", "text")]


class TooManyError(Exception):
    status_code = 429


class RefusedTextError(Exception):
    status_code = 400


@pytest.mark.parametrize(
    ("error", "times"), [(ValueError, 1), (RefusedTextError, 1), (TooManyError, 3), (OSError, 3)]
)
def test_what_would_fail_again_is_not_repeated(make, embedder, query, error, times):
    store = make(embedder)
    embedder.fail(error=error)
    store.put(HERE, "k", {"text": "abc"})
    assert len(embedder.calls) == times
    assert query(PENDING) == [("k", None, 0, error.__name__)]


def test_in_an_outage_nobody_waits_for_the_embedder_again(make, embedder, query, caplog):
    store = make(embedder)
    embedder.fail()
    for number in range(5):
        store.put(HERE, str(number), {"text": f"text {number}"})
    assert len(embedder.calls) == 3
    assert len(query(PENDING)) == 5
    assert len(caplog.records) == 1
    embedder.work()
    assert len(store.search(HERE, query="text")) == 5  # it works: so puts ask again, too
    store.put(HERE, "5", {"text": "text 5"})
    assert query(VECTORS) == [("5", "text")]


def test_a_text_that_it_refuses_is_no_outage(make, embedder, query):
    store = make(embedder)
    embedder.fail(error=ValueError)
    store.put(HERE, "refused", {"text": "abc"})
    embedder.work()
    store.put(HERE, "good", {"text": "abc"})
    assert query(VECTORS) == [("good", "text")]


@pytest.mark.parametrize("face", ["sync", "async"])
def test_an_embedder_that_hangs_is_waited_for_so_long_and_no_longer(make, embedder, query, face):
    store = make(embedder, embed_timeout_s=0.2)
    embedder.gate.clear()
    for number in range(3):
        if face == "sync":
            store.put(HERE, str(number), {"text": "abc"})
        else:
            asyncio.run(store.aput(HERE, str(number), {"text": "abc"}))
    assert len(embedder.calls) == 1  # it hangs still
    assert query(PENDING) == [(str(n), None, 0, "TimeoutError") for n in range(3)]
    with pytest.raises(UnavailableError, match="TimeoutError"):
        store.search(HERE, query="abc")


def test_an_async_function_that_hangs_is_cancelled(make, query):
    ended = []

    async def hanging(texts: list[str]) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(texts)

    store = make(hanging, embed_timeout_s=0.1)
    asyncio.run(store.aput(HERE, "k", {"text": "abc"}))
    assert ended == [["abc"]]
    assert query(PENDING) == [("k", None, 0, "TimeoutError")]


@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_query_that_cannot_be_embedded_is_an_error(make, embedder, query, face):
    store = make(embedder)
    embedder.fail(error=RuntimeError)
    ops = [PutOp(HERE, "k", {"text": "abc"}), SearchOp(HERE, query=SECRET)]
    with pytest.raises(UnavailableError, match=r"RuntimeError.*nothing was written") as caught:
        store.batch(ops) if face == "sync" else asyncio.run(store.abatch(ops))
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert query("SELECT key FROM store") == query(PENDING) == []


def test_an_item_leaves_the_queue_when_it_is_put_again_or_goes(make, embedder, query):
    store = make(embedder)
    embedder.fail()
    for key in ("again", "unindexed", "deleted", "expired", "kept"):
        store.put(HERE, key, {"text": key}, ttl=0.001 if key == "expired" else None)
    embedder.work()
    assert store.search(HERE, query="abc")
    store.put(HERE, "again", {"text": "again"})
    store.put(HERE, "unindexed", {"text": "unindexed"}, index=False)
    store.delete(HERE, "deleted")
    until(lambda: store.sweep_ttl() or not store.get(HERE, "expired", refresh_ttl=False))
    store.sweep_ttl()
    assert query(PENDING) == [("kept", None, 0, "ConnectionError")]
    assert query(VECTORS) == [("again", "text")]


def test_a_batch_is_queued_as_far_as_it_could_not_be_embedded(make, embedder, query, monkeypatch):
    store = make(embedder)

    def failing(texts: list[str]) -> None:
        if len(embedder.calls) > 1:
            raise ConnectionError

    embedder.failing = failing
    store.batch([PutOp(HERE, f"{n:03}", {"text": f"text {n}"}) for n in range(200)])
    assert [len(call) for call in embedder.calls] == [128, 72, 72, 72]
    assert query("SELECT count(*) FROM store_vectors") == [(128,)]
    assert query("SELECT count(*), min(key) FROM vat_store_pending") == [(72, "128")]
    assert store.batch([GetOp(HERE, "199")])[0].value == {"text": "text 199"}


# --- calls that are shared ------------------------------------------------------


@pytest.fixture
def patient(monkeypatch):
    """The next call waits for company until the one under way ends."""
    monkeypatch.setattr("langgraph_vat._io.embedding._GATHER_S", 60.0)


def test_threads_share_a_call(make, embedder, query, patient):
    store = make(embedder)
    embedder.gate.clear()
    with ThreadPoolExecutor(21) as pool:
        pool.submit(store.put, HERE, "first", {"text": "first"})
        until(lambda: embedder.calls)
        for number in range(20):
            pool.submit(store.put, HERE, str(number), {"text": f"text {number % 10}"})
        until(lambda: callers(store._items.embedding.documents._threads) == 21)
        embedder.gate.set()
    assert [sorted(call) for call in embedder.calls] == [
        ["first"],
        [f"text {number}" for number in range(10)],
    ]
    assert len(query(VECTORS)) == 21


async def tasks_share(
    store: SemanticStore, calls: list[list[str]], gate: Callable[[], Any]
) -> None:
    first = asyncio.create_task(store.aput(HERE, "first", {"text": "first"}))
    await soon(lambda: calls)
    others = [
        asyncio.create_task(store.aput(HERE, str(number), {"text": f"text {number % 10}"}))
        for number in range(20)
    ]
    embedding = store._items.embedding
    shared = embedding.documents._calls_of_loop()
    await soon(lambda: callers(shared) == 21)
    gate()
    await asyncio.gather(first, *others)


def test_tasks_share_a_call(make, embedder, query, patient):
    store = make(embedder)
    embedder.gate.clear()
    asyncio.run(tasks_share(store, embedder.calls, embedder.gate.set))
    assert [len(call) for call in embedder.calls] == [1, 10]
    assert len(query(VECTORS)) == 21


def test_tasks_share_a_call_of_an_async_function(make, query, patient):
    calls: list[list[str]] = []
    gate = threading.Event()

    async def slow(texts: list[str]) -> list[list[float]]:
        calls.append(texts)
        await soon(gate.is_set)
        return embed(texts)

    store = make(slow)
    asyncio.run(tasks_share(store, calls, gate.set))
    assert [len(call) for call in calls] == [1, 10]
    assert len(query(VECTORS)) == 21
    store.put(HERE, "sync", {"text": "sync"})  # for who blocks it has a loop of its own
    assert ("sync", "text") in query(VECTORS)


class Asymmetric(Embeddings):
    """Embeds a query otherwise than a document, one at a time."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.embedder(texts)

    def embed_query(self, text: str) -> list[float]:
        self.embedder([f"query {text}"])
        return embed([text])[0]


def test_equal_queries_at_the_same_time_are_embedded_once(make, embedder):
    store = make(Asymmetric(embedder))
    store.put(HERE, "k", {"text": "abc"})
    embedder.gate.clear()
    with ThreadPoolExecutor(6) as pool:
        found = [pool.submit(store.search, HERE, query=q) for q in ("abc", "abc", "abc", "def")]
        calls = store._items.embedding.queries._threads
        until(lambda: callers(calls) == 4)
        embedder.gate.set()
    assert [one.result()[0].key for one in found] == ["k"] * 4
    assert sorted(embedder.calls) == [["abc"], ["query abc"], ["query def"]]


@pytest.mark.parametrize("fault", ["raises", "drops", "adds"])
def test_what_one_text_does_to_the_embedder_harms_no_other(make, query, patient, fault):
    embedder = Embedder()

    def moody(texts: list[str]) -> list[list[float]]:
        found = embedder(texts)
        if "poison" in texts and fault == "raises":
            raise ValueError(texts)
        if "poison" in texts and fault == "drops":
            found.pop(texts.index("poison"))
        return [*found, found[0]] if "poison" in texts and fault == "adds" else found

    store = make(moody)
    embedder.gate.clear()
    with ThreadPoolExecutor(12) as pool:
        puts = {
            key: pool.submit(store.put, HERE, key, {"text": key})
            for key in ("first", "poison", *"abcdefgh")
        }
        calls = store._items.embedding.documents._threads
        until(lambda: callers(calls) == 10)
        embedder.gate.set()
    bad = puts.pop("poison")
    for put in puts.values():
        put.result()
    assert {key for key, _ in query(VECTORS)} == puts.keys()
    if fault == "raises":
        bad.result()
        assert query(PENDING) == [("poison", None, 0, "ValueError")]
    else:
        with pytest.raises(ConfigurationError, match="vectors for 1 texts"):
            bad.result()
        assert query("SELECT key FROM store WHERE key = 'poison'") == []


@pytest.mark.parametrize("is_native", [False, True], ids=["function", "async function"])
def test_a_task_that_is_cancelled_takes_nothing_from_the_others(make, query, patient, is_native):
    calls: list[list[str]] = []
    gate = threading.Event()

    async def native(texts: list[str]) -> list[list[float]]:
        calls.append(texts)
        await soon(gate.is_set)
        return embed(texts)

    def function(texts: list[str]) -> list[list[float]]:
        calls.append(texts)
        gate.wait(60)
        return embed(texts)

    store = make(native if is_native else function)

    async def main() -> list[Any]:
        tasks = [
            asyncio.create_task(store.aput(HERE, str(n), {"text": f"text {n}"})) for n in range(6)
        ]
        shared = store._items.embedding.documents._calls_of_loop()
        await soon(lambda: callers(shared) == 6)
        for number in (0, 3):
            tasks[number].cancel()
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    done = asyncio.run(main())
    assert [isinstance(one, asyncio.CancelledError) for one in done] == [
        number in (0, 3) for number in range(6)
    ]
    assert [key for key, _ in query(VECTORS)] == ["1", "2", "4", "5"]


@pytest.mark.parametrize("face", ["sync", "async"])
def test_when_a_store_closes_nobody_waits_and_what_waited_is_queued(make, query, caplog, face):
    embedder = Embedder()
    store = make(embedder)
    embedder.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        if face == "sync":
            put = pool.submit(store.put, HERE, "k", {"text": "abc"})
        else:
            put = pool.submit(asyncio.run, store.aput(HERE, "k", {"text": "abc"}))
        until(lambda: embedder.calls)
        store._items.embedding.close()
        put.result()
    assert not embedder.gate.is_set()
    assert query(PENDING) == [("k", None, 0, "closed")]
    assert caplog.records == []
    store.put(HERE, "later", {"text": "abc"})
    assert len(embedder.calls) == 1
    embedder.gate.set()


ENDING = """
import asyncio, sys, threading
from langgraph_vat import SemanticStore

def hanging(texts):
    threading.Event().wait()

store = SemanticStore.from_conn_string(
    sys.argv[1], index={"dims": 2, "embed": hanging}, embed_timeout_s=0.1
)
store.setup()
if sys.argv[2] == "sync":
    store.put(("a",), "k", {"text": "x"})
else:
    asyncio.run(store.aput(("a",), "k", {"text": "x"}))
print("done")
"""


@pytest.mark.parametrize("face", ["sync", "async"])
def test_the_interpreter_ends_though_the_embedder_hangs(postgres_url, face):
    command = [sys.executable, "-W", "error", "-c", ENDING, postgres_url, face]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
