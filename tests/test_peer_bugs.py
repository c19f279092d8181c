"""
What other savers get wrong, each case by itself.

Those of stores are in `tests/store`, those of encryption in `test_forgery`,
and a late put after a delete in `test_protocol`.
"""

import asyncio
import math
import operator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypedDict

import psycopg
import pytest
import redis
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from langgraph_vat import HybridSaver, InvalidInputError, Keyring, SchemaError, UnavailableError


@pytest.fixture(params=["hot", "hot-sealed", "durable"])
def saver(request, postgres_url, redis_url):
    options: Any = {} if request.param == "durable" else {"redis": redis_url}
    if request.param == "hot-sealed":
        options["keyring"] = Keyring.generate()
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        yield saver


def at(thread: str = "t", namespace: str = "") -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": namespace}}


def checkpoint(value: Any = 0) -> Any:
    values = {"channel_values": {"a": value}, "channel_versions": {"a": "1"}}
    return {**empty_checkpoint(), "id": str(uuid6()), **values}


STRANGE = {
    "nul": "a\0b",
    "surrogate": "\ud800",
    "deep": {"x": ["?\ud800"]},
    "inf": math.inf,
    "-inf": -math.inf,
    "bytes": b"\0",
    "large": -(2**70),
    "large inside": {"x": [10**22, 1e22]},
}


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
def test_what_json_cannot_hold_comes_back_equal(saver, value):
    for number in range(2):
        saver.put(at(), checkpoint(value), {"note": value, "step": number}, {"a": "1"})
        saver.flush()  # in Redis, then in Postgres, by both ways to read
        for found in (saver.get_tuple(at()), next(iter(saver.list(at())))):
            assert found.checkpoint["channel_values"]["a"] == value
            # LangGraph itself takes a NUL out of metadata, whatever the saver.
            note = value.replace("\0", "") if isinstance(value, str) else value
            assert found.metadata == {"note": note, "step": number}


def test_a_value_that_cannot_be_serialized_is_named_and_nothing_is_written(saver):
    class Secret:
        def __repr__(self) -> str:
            return "marker"

    with pytest.raises(InvalidInputError, match=r"channel 'a': .* type Secret"):
        saver.put(at(), checkpoint(Secret()), {}, {"a": "1"})
    assert saver.get_tuple(at()) is None
    config = saver.put(at(), checkpoint(), {}, {"a": "1"})
    with pytest.raises(InvalidInputError, match="type dict"):
        saver.put_writes(config, [("a", 1), ("a", {"x": Secret()})], "task")
    assert saver.get_tuple(config).pending_writes == []


def test_metadata_may_be_named_writes(saver):
    saver.put(at(), checkpoint(), {"writes": {"node": 1}, "step": 0}, {"a": "1"})
    saver.flush()
    (found,) = saver.list(at())
    assert found.metadata == {"writes": {"node": 1}, "step": 0}


def test_get_and_list_return_messages_alike(saver):
    messages = [HumanMessage("hello", id="1"), AIMessage("hi", id="2")]
    saver.put(at(), checkpoint(messages), {}, {"a": "1"})
    (listed,) = saver.list(at())
    for found in (saver.get_tuple(at()), listed):
        assert found.checkpoint["channel_values"]["a"] == messages


def test_list_obeys_before_and_is_newest_first_across_namespaces(saver):
    configs = []
    for i in range(6):
        made = checkpoint(i) | {"channel_versions": {"a": str(i)}}
        configs.append(saver.put(at("t", "ab"[i % 2]), made, {}, {"a": str(i)}))
    everywhere = {"configurable": {"thread_id": "t"}}
    newest = [found.checkpoint["channel_values"]["a"] for found in saver.list(everywhere, limit=2)]
    assert newest == [5, 4]
    earlier = saver.list(everywhere, before=configs[3])
    assert [found.checkpoint["channel_values"]["a"] for found in earlier] == [2, 1, 0]


async def test_task_paths_are_kept_by_both_faces(saver):
    config = saver.put(at(), checkpoint(), {}, {"a": "1"})
    # The order of pending writes is by path, so a path that is lost shows.
    await saver.aput_writes(config, [("a", "late")], "1", task_path="~z")
    saver.put_writes(config, [("a", "early")], "2", task_path="~a")
    for _ in range(2):
        found = saver.get_tuple(config)
        assert [value for _, _, value in found.pending_writes] == ["early", "late"]
        saver.flush()


def _chat() -> StateGraph:
    def reply(state: MessagesState) -> Any:
        return {"messages": [AIMessage(f"{len(state['messages'])}")]}

    return StateGraph(MessagesState).add_node("reply", reply).add_edge(START, "reply")


async def test_many_runs_at_once_need_no_settings(saver):
    graph = _chat().compile(checkpointer=saver)
    runs = (graph.ainvoke({"messages": [("user", "x")]}, at(str(n))) for n in range(64))
    done = await asyncio.gather(*runs)
    assert [len(state["messages"]) for state in done] == [2] * 64
    await saver.aclose()


async def test_blocking_calls_work_on_the_loops_own_thread(saver):
    graph = _chat().compile(checkpointer=saver)
    graph.invoke({"messages": [("user", "x")]}, at())
    await graph.ainvoke({"messages": [("user", "x")]}, at())
    assert len(graph.get_state(at()).values["messages"]) == 4
    await saver.aclose()


def test_killed_connections_are_replaced_before_anybody_notices(saver, postgres_url):
    graph = _chat().compile(checkpointer=saver)

    def use() -> None:
        for number in range(8):
            graph.invoke({"messages": [("user", "x")]}, at(str(number)))
            saver.flush()

    async def use_async() -> None:
        await graph.ainvoke({"messages": [("user", "x")]}, at())
        _kill_all(postgres_url)
        await graph.ainvoke({"messages": [("user", "x")]}, at())

    with ThreadPoolExecutor(4) as pool:  # so that there are several
        list(pool.map(lambda _: list(saver.list(None)), range(8)))
    for _ in range(2):
        use()
        assert _kill_all(postgres_url)
    asyncio.run(use_async())
    use()
    assert len(graph.get_state(at("1")).values["messages"]) == 6


def _kill_all(url: str) -> int:
    with psycopg.connect(url) as connection:
        return len(
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchall()
        )


def test_a_thread_is_never_new_because_a_server_is_away(own_postgres, own_redis):
    options: Any = {"redis": own_redis.url, "timeout_s": 1.0, "flush_every": 1}
    with HybridSaver.from_conn_string(own_postgres.url, **options) as saver:
        saver.put(at(), checkpoint(7), {}, {"a": "1"})
        own_redis.kill()
        assert saver.get_tuple(at()).checkpoint["channel_values"]["a"] == 7
        own_postgres.kill()
        with pytest.raises(UnavailableError):
            saver.get_tuple(at())
        own_postgres.start()
        own_redis.start()
        assert saver.get_tuple(at()).checkpoint["channel_values"]["a"] == 7


def test_a_thread_of_more_than_ten_thousand_writes_is_deleted_whole(saver, postgres_url):
    config = saver.put(at(), checkpoint(), {}, {"a": "1"})
    for task in range(11):
        saver.put_writes(config, [("a", number) for number in range(1_000)], f"{task}")
    assert len(saver.get_tuple(config).pending_writes) == 11_000
    saver.flush()
    saver.delete_thread("t")
    assert saver.get_tuple(at()) is None
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM checkpoint_writes").fetchone() == (0,)


def test_setup_may_run_in_many_threads_at_once(postgres_url, redis_url):
    for name in ("a", "b", "c", "d", "e", "f"):
        options: Any = {"redis": redis_url, "schema": name, "key_prefix": name}
        savers = [HybridSaver.from_conn_string(postgres_url, **options) for _ in range(10)]
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(HybridSaver.setup, savers))
        savers[0].put(at(), checkpoint(), {}, {"a": "1"})
        for saver in savers:
            saver.close()


def test_setup_against_a_held_lock_names_who_holds_it(postgres_url, monkeypatch):
    monkeypatch.setattr(
        "langgraph_vat._durable.schema.LOCK_TIMEOUT", "SET LOCAL lock_timeout = 500"
    )
    with HybridSaver.from_conn_string(postgres_url) as saver:
        saver.setup()
    with psycopg.connect(postgres_url, application_name="night job") as holder:
        holder.execute("LOCK TABLE checkpoints IN ACCESS SHARE MODE")
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute("DROP TABLE vat_schema")
            late = HybridSaver.from_conn_string(postgres_url)
            with pytest.raises(SchemaError, match="night job"):
                late.setup()
            late.close()


def _wide() -> StateGraph:
    class Wide(TypedDict):
        text: str
        small: Annotated[list[int], operator.add]

    def measure(state: Wide) -> Any:
        return {"small": [len(state["text"])]}

    def shrink(state: Wide) -> Any:
        return {"small": [len(state["small"])], "text": "short"}

    builder = StateGraph(Wide).add_node(measure).add_node("again", measure).add_node(shrink)
    builder.add_edge(START, "measure").add_edge("measure", "again").add_edge("again", "shrink")
    return builder


@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_state_too_big_to_be_hot_takes_no_other_part(postgres_url, redis_url, is_sealed):
    keyring = Keyring.generate() if is_sealed else None
    options: Any = {"redis": redis_url, "max_head_bytes": 10_000, "keyring": keyring}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        states = []
        for one in (saver, InMemorySaver()):
            graph = _wide().compile(checkpointer=one)
            for turn in range(3):
                graph.invoke({"text": "x" * 20_000 * (turn % 2), "small": [turn]}, at())
            states.append([s.values for s in graph.get_state_history(at())])
            states.append(graph.get_state(at()).values)
        assert states[:2] == states[2:]
        assert saver._shared.counters.degraded == 0
        # No value stayed in a head that is only written.
        graph = _wide().compile(checkpointer=saver)
        graph.update_state(at(), {"text": "y" * 20_000, "small": []})
        with redis.Redis.from_url(redis_url) as client:
            for head in client.keys("*}:h:*"):
                assert sum(map(len, client.hvals(head))) < 10_000
        assert graph.get_state(at()).values["text"] == "y" * 20_000


def test_thousands_of_channels_and_writes(saver):
    channels = {f"c{i}": i for i in range(9_000)}
    many = checkpoint() | {
        "channel_values": channels,
        "channel_versions": dict.fromkeys(channels, "1"),
    }
    config = saver.put(at(), many, {}, dict.fromkeys(channels, "1"))
    saver.put_writes(config, [("a", i) for i in range(9_000)], "task")
    for _ in range(2):
        found = saver.get_tuple(at())
        assert found.checkpoint["channel_values"] == channels
        assert [value for _, _, value in found.pending_writes] == list(range(9_000))
        saver.flush()
