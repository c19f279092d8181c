"""One database, used in turn by PostgresSaver and by `HybridSaver(redis=None)`."""

import operator
import random
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, Send, interrupt
from redis import Redis

from langgraph_vat import HybridSaver, Keyring

STEPS = 200


@pytest.fixture(params=["theirs first", "ours first"])
def savers(request, postgres_url):
    ours = HybridSaver.from_conn_string(postgres_url, storage="compatible")
    with PostgresSaver.from_conn_string(postgres_url) as theirs:
        for saver in (theirs, ours) if request.param == "theirs first" else (ours, theirs):
            saver.setup()
        yield [theirs, ours]
    ours.close()


def at(thread_id: str, namespace: str = "") -> Any:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": namespace}}


VALUES = (
    lambda n: n,
    lambda n: f"text {n}",
    lambda n: {"a": [n, None, 1.5], "b": b"bytes"},
    lambda n: [HumanMessage(f"hi {n}", id=f"h{n}"), AIMessage("there", id=f"a{n}")],
    lambda n: None,
    lambda n: {1, 2, n},
)


def _shown(found: Any) -> Any:
    return found and (
        found.config["configurable"],
        found.checkpoint,
        found.metadata,
        found.parent_config and found.parent_config["configurable"],
        sorted(found.pending_writes, key=repr),
    )


def test_steps_of_either_are_equal_for_both_and_for_memory(savers):
    rng, oracle = random.Random(7), InMemorySaver()
    made: list[Any] = []
    for step in range(STEPS):
        parent = rng.choice([None, *made[-3:], *made[-3:]]) if step % 9 else None
        namespace = parent["configurable"]["checkpoint_ns"] if parent else rng.choice(["", "a|b:1"])
        config = parent or at("t", namespace)
        before = oracle.get_tuple(config) if parent else None
        checkpoint = {**empty_checkpoint(), **(before.checkpoint if before else {})}
        checkpoint["id"] = empty_checkpoint()["id"]
        checkpoint["channel_values"] = dict(checkpoint["channel_values"])
        checkpoint["channel_versions"] = dict(checkpoint["channel_versions"])
        new = {}
        for channel in rng.sample(["x", "y", "z"], rng.randrange(1, 4)):
            value = rng.choice(VALUES)(step)
            version = oracle.get_next_version(checkpoint["channel_versions"].get(channel), None)
            checkpoint["channel_values"][channel] = value
            new[channel] = checkpoint["channel_versions"][channel] = version
        metadata = {"source": "loop", "step": step, "more": {"n": step}}
        saver = rng.choice(savers)
        expected = oracle.put(config, checkpoint, metadata, new)
        assert saver.put(config, checkpoint, metadata, new) == expected
        made.append(expected)
        target, writes = rng.choice(made[-4:]), [("x", step), ("__error__", f"no {step}")]
        for one in (oracle, rng.choice(savers)):
            one.put_writes(target, writes[: 1 + step % 2], f"task {step % 5}", "~path")
        for one in savers:
            assert _shown(one.get_tuple(target)) == _shown(oracle.get_tuple(target))
            assert _shown(one.get_tuple(at("t"))) == _shown(oracle.get_tuple(at("t")))
    for config in made:
        for one in savers:
            assert _shown(one.get_tuple(config)) == _shown(oracle.get_tuple(config))
    for namespace in ("", "a|b:1"):
        everything = [_shown(found) for found in oracle.list(at("t", namespace))]
        for one in savers:
            assert [_shown(found) for found in one.list(at("t", namespace))] == everything


class State(TypedDict):
    log: Annotated[list[str], operator.add]


def _graph() -> StateGraph[Any]:
    def ask(state: State) -> Any:
        return {"log": [f"answer {interrupt('?')}"]}

    inner = StateGraph(State).add_node("deep", lambda _: {"log": ["deep"]}).add_edge(START, "deep")
    builder = StateGraph(State).add_node(ask).add_node("inner", inner.compile())
    return builder.add_edge(START, "ask").add_edge("ask", "inner")


def test_a_run_that_one_began_the_other_resumes(savers):
    graphs = [_graph().compile(checkpointer=saver) for saver in savers]
    oracle = _graph().compile(checkpointer=InMemorySaver())
    for turn in range(6):
        for graph in (oracle, graphs[turn % 2]):
            assert "__interrupt__" in graph.invoke({"log": [f"in {turn}"]}, at("t"))
        for graph in (oracle, graphs[(turn + 1) % 2]):
            graph.invoke(Command(resume=turn), at("t"))
    states = [
        [(s.values, s.next, s.metadata["step"]) for s in graph.get_state_history(at("t"))]
        for graph in (oracle, *graphs)
    ]
    assert states[0] == states[1] == states[2]


def test_what_one_deletes_is_gone_for_the_other(savers):
    for first, second in (savers, savers[::-1]):
        config = first.put(at("t"), empty_checkpoint(), {"step": 0}, {})
        second.put_writes(config, [("x", 1)], "task")
        second.delete_thread("t")
        assert first.get_tuple(at("t")) is None
        first.put(at("t"), empty_checkpoint(), {"step": 1}, {})
        assert second.get_tuple(at("t")).metadata["step"] == 1
        first.delete_thread("t")
        assert second.get_tuple(at("t")) is None


@pytest.mark.parametrize("is_hot", [False, True])
def test_what_old_checkpoints_sent_is_opened_where_it_is_sealed(postgres_url, redis_url, is_hot):
    options: Any = {"redis": redis_url if is_hot else None, "keyring": Keyring.generate()}
    with HybridSaver.from_conn_string(postgres_url, flush_every=1, **options) as saver:
        parent = saver.put(at("t"), empty_checkpoint(), {"step": 0}, {})
        saver.put_writes(parent, [("__pregel_tasks", Send("worker", {"n": 1}))], "task")
        saver.put(parent, {**empty_checkpoint(), "v": 3}, {"step": 1}, {})
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        if is_hot:
            with Redis.from_url(redis_url) as client:
                client.flushall()
        for _ in range(2):
            values = saver.get_tuple(at("t")).checkpoint["channel_values"]
            assert values == {"__pregel_tasks": [Send("worker", {"n": 1})]}


@pytest.mark.parametrize("is_hot", [False, True])
def test_what_old_checkpoints_sent_is_not_lost(postgres_url, redis_url, is_hot):
    sends = [Send("worker", {"n": 1}), Send("worker", HumanMessage("two", id="2"))]
    with PostgresSaver.from_conn_string(postgres_url) as theirs:
        theirs.setup()
        parent = theirs.put(at("t"), empty_checkpoint(), {"step": 0}, {})
        for number, send in enumerate(sends):
            theirs.put_writes(parent, [("x", 0), ("__pregel_tasks", send)], f"task {number}")
        old = {**empty_checkpoint(), "v": 3, "channel_values": {"x": 1}}
        old["channel_versions"] = {"x": theirs.get_next_version(None, None)}
        config = theirs.put(parent, old, {"step": 1}, old["channel_versions"])
        expected = theirs.get_tuple(config)
        assert expected.checkpoint["channel_values"]["__pregel_tasks"] == sends

        redis = redis_url if is_hot else None
        ours = HybridSaver.from_conn_string(postgres_url, redis=redis, flush_every=1)
        if is_hot:
            ours.enable_hot()
        with ours:
            for _ in range(2):
                assert _shown(ours.get_tuple(config)) == _shown(expected)
                assert _shown(ours.get_tuple(at("t"))) == _shown(expected)
            assert _shown(next(ours.list(at("t")))) == _shown(expected)
            new = {**expected.checkpoint, "v": 4, "id": empty_checkpoint()["id"]}
            after = ours.put(config, new, {"step": 2}, {})
            for saver in (ours, theirs):
                values = saver.get_tuple(after).checkpoint["channel_values"]
                assert values == {"x": 1, "__pregel_tasks": sends}
