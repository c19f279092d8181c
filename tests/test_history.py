"""What is had of a thread's history: without its values, or as a thread of its own."""

import operator
from typing import Annotated, Any, TypedDict

import psycopg
import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from langgraph_vat import HybridSaver, InvalidInputError, Keyring


class State(TypedDict):
    log: Annotated[list[str], operator.add]
    text: str


def graph_on(saver: Any) -> Any:
    def ask(state: State) -> Any:
        return {"log": [f"answer {interrupt('?')}"], "text": "x" * 5000}

    inner = StateGraph(State).add_node("deep", ask).add_edge(START, "deep").compile()
    builder = StateGraph(State).add_node("first", lambda s: {"log": [f"{len(s['log'])}"]})
    builder.add_node("inner", inner).add_edge(START, "first").add_edge("first", "inner")
    return builder.compile(checkpointer=saver)


def at(thread_id: str, **more: str) -> Any:
    return {"configurable": {"thread_id": thread_id, **more}}


def shown(found: Any) -> Any:
    places = [
        {key: value for key, value in (config or {"configurable": {}})["configurable"].items()
         if key != "thread_id"}
        for config in (found.config, found.parent_config)
    ]  # fmt: skip
    return *places, found.checkpoint, found.metadata, sorted(found.pending_writes, key=repr)


@pytest.fixture(params=["plain", "sealed"])
def saver(request, postgres_url, redis_url):
    keyring = Keyring.generate() if request.param == "sealed" else None
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, keyring=keyring) as saver:
        yield saver


def talk(graph: Any, turns: int) -> None:
    for turn in range(turns):
        graph.invoke({"log": [f"in {turn}"]}, at("t"))
        graph.invoke(Command(resume=turn), at("t"))


def test_a_light_list_has_everything_but_values(saver):
    talk(graph_on(saver), 3)
    for where in (None, at("t"), at("t", checkpoint_ns="")):
        whole, light = list(saver.list(where)), list(saver.list(where, values=False))
        assert len(whole) == len(light) > 5
        for one, other in zip(whole, light, strict=True):
            assert other.checkpoint == {**one.checkpoint, "channel_values": {}}
            assert other.pending_writes == []
            assert other[:1] + other[2:4] == one[:1] + one[2:4]
    assert [found.config for found in saver.list(None, filter={"step": 1}, values=False)] == [
        found.config for found in saver.list(None, filter={"step": 1})
    ]


async def test_a_light_list_is_the_same_in_a_loop(saver):
    for number in range(3):
        saver.put(at(f"t{number}", checkpoint_ns=""), empty_checkpoint(), {"step": number}, {})
    found = [one async for one in saver.alist(None, limit=2, values=False)]
    assert found == list(saver.list(None, limit=2, values=False))


def test_a_copy_of_each_checkpoint_goes_on_as_the_thread_did_from_there(saver):
    graph = graph_on(saver)
    talk(graph, 3)
    fork = next(s for s in list(graph.get_state_history(at("t")))[2:] if "first" in s.next)
    graph.invoke(None, fork.config)
    everything = list(saver.list(at("t")))
    roots = [found for found in everything if not found.config["configurable"]["checkpoint_ns"]]
    for number, root in enumerate(roots):
        checkpoint_id = root.checkpoint["id"]
        saver.copy_thread("t", f"c{number}", checkpoint_id=checkpoint_id)
        assert shown(saver.get_tuple(at(f"c{number}"))) == shown(root)
        copied = list(saver.list(at(f"c{number}", checkpoint_ns="")))
        chain, parent = [], root
        while parent is not None:
            chain.append(parent)
            before = parent.parent_config
            parent = saver.get_tuple(before) if before else None
        assert [shown(one) for one in copied] == [shown(one) for one in chain]
        theirs = graph.get_state(root.config, subgraphs=True)
        ours = graph.get_state(copied[0].config, subgraphs=True)
        assert (ours.values, ours.next) == (theirs.values, theirs.next)
        if theirs.interrupts:
            done = graph.invoke(Command(resume="x"), at(f"c{number}"))
            assert done["log"][-1].startswith("answer")
    assert [shown(found) for found in saver.list(at("t"))] == [shown(f) for f in everything]


def test_what_a_delta_channel_needs_is_copied_with_its_checkpoint(saver):
    def more(before: list[str], writes: list[list[str]]) -> list[str]:
        return [*before, *(one for some in writes for one in some)]

    class Log(TypedDict):
        log: Annotated[list[str], DeltaChannel(more)]

    builder = StateGraph(Log).add_node("say", lambda s: {"log": [f"{len(s['log'])}"]})
    graph = builder.add_edge(START, "say").compile(checkpointer=saver)
    for turn in range(4):
        graph.invoke({"log": [f"in {turn}"]}, at("t"))
    for number, state in enumerate(list(graph.get_state_history(at("t")))):
        checkpoint_id = state.config["configurable"]["checkpoint_id"]
        saver.copy_thread("t", f"c{number}", checkpoint_id=checkpoint_id)
        copied = list(graph.get_state_history(at(f"c{number}")))
        assert copied[0].values == state.values
        assert len(copied) == state.metadata["step"] + 2


@pytest.mark.parametrize("wrong", ["nothing", "", "\0", 5])
def test_a_checkpoint_that_is_not_there_is_not_copied(saver, postgres_url, wrong):
    talk(graph_on(saver), 1)
    with pytest.raises(InvalidInputError, match="checkpoint"):
        saver.copy_thread("t", "c", checkpoint_id=wrong)
    saver.flush()
    with psycopg.connect(postgres_url) as connection:
        for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes"):
            query = f"SELECT count(*) FROM {table} WHERE thread_id = 'c'"
            assert connection.execute(query).fetchone() == (0,)
    assert saver.get_tuple(at("c")) is None
