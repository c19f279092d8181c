"""What is stored is stored in another form, and says the same, whatever happens meanwhile."""

import operator
import random
import threading
from typing import Annotated, Any, TypedDict

import psycopg
import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from langgraph_vat import HybridSaver, InvalidInputError, Keyring
from langgraph_vat._ops import rewrite

WORDS = [f"word{number}" for number in range(3000)]
PACKED = """
SELECT (SELECT count(*) FROM checkpoint_blobs WHERE type ~ 'vat\\.(zstd|patch)'),
    (SELECT count(*) FROM checkpoint_writes WHERE type ~ 'vat\\.(zstd|patch)')
"""


class State(TypedDict):
    log: Annotated[list[str], operator.add]
    page: str


def talk(saver: Any, thread_id: str, turns: int) -> None:
    rng = random.Random(thread_id)

    def say(state: State) -> Any:
        page = state.get("page", "") or " ".join(rng.choices(WORDS, k=800))
        at = rng.randrange(len(page))
        return {"log": [" ".join(rng.choices(WORDS, k=90))], "page": f"{page[:at]}!{page[at:]}"}

    def ask(_: State) -> Any:
        return {"log": [f"{interrupt(' '.join(rng.choices(WORDS, k=90)))}"]}

    inner = StateGraph(State).add_node(say).add_edge(START, "say").compile()
    builder = StateGraph(State).add_node(say).add_node("inner", inner).add_node(ask)
    builder.add_edge(START, "say").add_edge("say", "inner").add_edge("inner", "ask")
    graph, config = builder.compile(checkpointer=saver), at(thread_id)
    for turn in range(turns):
        graph.invoke({"log": [f"in {turn}"]}, config)
        graph.invoke(Command(resume=f"answer {turn}"), config)


def at(thread_id: str, namespace: str | None = None) -> Any:
    found = {"thread_id": thread_id}
    return {"configurable": found if namespace is None else {**found, "checkpoint_ns": namespace}}


def shown(saver: Any) -> list[Any]:
    return [
        (found.config, found.parent_config, found.checkpoint, found.metadata,
         sorted(found.pending_writes, key=repr))
        for found in saver.list(None)
    ]  # fmt: skip


def packed(url: str) -> tuple[int, int]:
    with psycopg.connect(url) as connection:
        return connection.execute(PACKED).fetchone()


def size(url: str) -> int:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM FULL checkpoint_blobs")
        return connection.execute("SELECT pg_total_relation_size('checkpoint_blobs')").fetchone()[0]


def test_what_postgres_saver_wrote_becomes_compact_and_what_it_reads_again(postgres_url):
    with PostgresSaver.from_conn_string(postgres_url) as theirs:
        theirs.setup()
        for number in range(3):
            talk(theirs, f"t{number}", 8)
        before, large = shown(theirs), size(postgres_url)
        with HybridSaver.from_conn_string(postgres_url) as ours:
            done = ours.threads.rewrite("compact")
            assert (done.threads, done.left) == (3, 0)
            assert min(packed(postgres_url)) > 20
            assert size(postgres_url) * 4 < large
            assert shown(ours) == before
            assert [one.steps for one in ours.threads.search()] == 3 * [len(before) // 3]
            assert ours.threads.rewrite("compact").values == 0
            talk(ours, "t0", 1)
            after = shown(ours)
            assert ours.threads.rewrite("compatible").left == 0
            assert packed(postgres_url) == (0, 0)
            assert shown(ours) == after
        assert shown(theirs) == after
        talk(theirs, "t0", 1)


@pytest.mark.parametrize("is_sealed", [False, True])
async def test_there_and_back_says_the_same(postgres_url, redis_url, is_sealed):
    keyring = Keyring.generate() if is_sealed else None
    options: Any = {"redis": redis_url, "keyring": keyring}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        talk(saver, "t", 6)
        talk(saver.scoped("a"), "t", 2)
        before = shown(saver), shown(saver.scoped("a"))
        for storage in ("compatible", "compact", "compatible"):
            done = await saver.threads.arewrite(storage)
            assert (done.threads, done.left) == (2, 0)
            assert done.values > 20
            assert bool(packed(postgres_url)[0]) == (storage == "compact")
            assert (shown(saver), shown(saver.scoped("a"))) == before
            saver.prune(["t"], strategy="keep_latest") if storage == "compact" else None
            before = shown(saver), shown(saver.scoped("a"))
        assert saver.scoped("a").threads.rewrite("compact").threads == 1
        with pytest.raises(InvalidInputError, match="storage"):
            saver.threads.rewrite("small")


def test_stopped_anywhere_all_can_be_read_and_it_goes_on(postgres_url, monkeypatch):
    class StopError(Exception):
        pass

    monkeypatch.setattr(rewrite, "_MOST_ROWS", 3)
    with HybridSaver.from_conn_string(postgres_url, storage="compatible") as saver:
        talk(saver, "t", 5)
        before = shown(saver)
        durable = saver._life.blocking().durable
        transact, left = durable.transact, 0

        async def failing(body: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise StopError
            return await transact(body)

        monkeypatch.setattr(durable, "transact", failing)
        for storage in ("compact", "compatible"):
            for steps in (1, 2, 4, 7, 11):
                left = steps
                with pytest.raises(StopError):
                    saver.threads.rewrite(storage)
                assert shown(saver) == before
            left = 1000
            assert saver.threads.rewrite(storage).left == 0
            assert shown(saver) == before
            assert bool(packed(postgres_url)[0]) == (storage == "compact")


def test_steps_go_on_while_it_runs(postgres_url, redis_url, monkeypatch):
    monkeypatch.setattr(rewrite, "_MOST_ROWS", 4)
    oracle, is_done = InMemorySaver(), threading.Event()
    options: Any = {"redis": redis_url, "flush_every": 3}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        talk(saver, "other", 3)

        def rewriting() -> None:
            while not is_done.is_set():
                for storage in ("compatible", "compact"):
                    assert saver.threads.rewrite(storage).left == 0

        worker = threading.Thread(target=rewriting)
        worker.start()
        config: Any = at("t", "")
        text, version = "", None
        for step in range(120):
            text += f"{step} " + " ".join(WORDS[step : step + 20])
            checkpoint, version = empty_checkpoint(), oracle.get_next_version(version, None)
            checkpoint["channel_values"] = {"x": text}
            checkpoint["channel_versions"] = {"x": version}
            arguments = (config, checkpoint, {"step": step}, {"x": version})
            assert saver.put(*arguments) == oracle.put(*arguments)
            config = oracle.put(*arguments)
        is_done.set()
        worker.join()
        for one in oracle.list(at("t")):
            assert saver.get_tuple(one.config).checkpoint == one.checkpoint


def test_what_others_build_on_stays_whole(postgres_url):
    text, config, version, known = " ".join(WORDS), at("t", ""), None, {}
    # The last value builds on the second one, which is whole and loose.
    for storage, steps in (("compatible", 2), ("compact", 1)):
        with HybridSaver.from_conn_string(postgres_url, storage=storage) as saver:
            for _ in range(steps):
                text += " and more"
                checkpoint, version = empty_checkpoint(), saver.get_next_version(version, None)
                checkpoint["channel_values"] = {"x": text}
                checkpoint["channel_versions"] = {"x": version}
                config = saver.put(config, checkpoint, {}, {"x": version})
                known[checkpoint["id"]] = text
    with HybridSaver.from_conn_string(postgres_url) as saver:
        for storage in ("compact", "compatible", "compact"):
            assert saver.threads.rewrite(storage).left == 0
            found = {
                s.checkpoint["id"]: s.checkpoint["channel_values"] for s in saver.list(at("t"))
            }
            assert found == {checkpoint_id: {"x": value} for checkpoint_id, value in known.items()}


def test_what_cannot_be_opened_is_left_and_counted(postgres_url):
    keyring = Keyring.generate()
    with HybridSaver.from_conn_string(postgres_url, keyring=keyring) as saver:
        for thread_id in ("a", "b"):
            talk(saver, thread_id, 3)
        with psycopg.connect(postgres_url) as connection:
            connection.execute(
                "UPDATE checkpoint_blobs SET blob = set_byte(blob, 30, get_byte(blob, 30) # 1)"
                " WHERE thread_id = 'a' AND vat_bases IS NULL AND channel = 'page'"
            )
        done = saver.threads.rewrite("compatible")
        assert done.threads == 2
        assert done.left > 0
        assert [s.metadata["step"] for s in saver.list(at("b"))]
    with HybridSaver.from_conn_string(postgres_url) as stranger:
        done = stranger.threads.rewrite("compact")
        assert (done.threads, done.values, done.left) == (0, 0, 2)
