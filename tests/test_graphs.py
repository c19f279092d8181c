"""Real compiled graphs leave and find the same state as with LangGraph's InMemorySaver."""

import asyncio
import contextlib
import importlib
import operator
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt

from langgraph_vat import ConflictError, HybridSaver, Keyring

MODES = ("sync", "async", "exit")


@pytest.fixture(params=["hot", "hot-sealed", "durable"])
def saver(request, postgres_url, redis_url):
    options: Any = {} if request.param == "durable" else {"redis": redis_url, "flush_every": 3}
    if request.param == "hot-sealed":
        options["keyring"] = Keyring.generate()
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        yield saver


class State(TypedDict):
    log: Annotated[list[str], operator.add]
    n: int


def _approval() -> StateGraph:
    def first(state: State) -> Any:
        return {"log": ["first"], "n": state["n"] + 1}

    def ask(state: State) -> Any:
        return {"log": [f"answer {interrupt({'question': state['n']})}"]}

    def last(state: State) -> Any:
        return {"log": ["last"]}

    builder = StateGraph(State).add_node(first).add_node(ask).add_node(last)
    return builder.add_edge(START, "first").add_edge("first", "ask").add_edge("ask", "last")


def _config(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread}}


def _history(graph: Any, config: Any) -> list[Any]:
    return [
        (s.values, s.next, s.metadata["step"], s.metadata["source"], [t.name for t in s.tasks])
        for s in graph.get_state_history(config)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_interrupt_and_resume(saver, mode):
    histories = []
    for one in (saver, InMemorySaver()):
        graph = _approval().compile(checkpointer=one)
        stopped = graph.invoke({"log": ["in"], "n": 1}, _config(), durability=mode)
        assert stopped["__interrupt__"][0].value == {"question": 2}
        done = graph.invoke(Command(resume="yes"), _config(), durability=mode)
        assert done["log"] == ["in", "first", "answer yes", "last"]
        histories.append(_history(graph, _config()))
    assert histories[0] == histories[1]


@pytest.mark.parametrize("mode", MODES)
async def test_interrupt_and_resume_async(saver, mode):
    graph = _approval().compile(checkpointer=saver)
    await graph.ainvoke({"log": ["in"], "n": 1}, _config(), durability=mode)
    done = await graph.ainvoke(Command(resume="yes"), _config(), durability=mode)
    assert done["log"] == ["in", "first", "answer yes", "last"]
    history = [s async for s in graph.aget_state_history(_config())]
    assert history[0].values == done
    await saver.aclose()


def test_time_travel_and_forks(saver):
    histories = []
    for one in (saver, InMemorySaver()):
        graph = _approval().compile(checkpointer=one)
        graph.invoke({"log": ["in"], "n": 1}, _config())
        graph.invoke(Command(resume="yes"), _config())
        past = next(s for s in graph.get_state_history(_config()) if s.next == ("ask",))
        fork = graph.update_state(past.config, {"log": ["forked"], "n": 10})
        again = graph.invoke(Command(resume="no"), fork)
        assert again["log"] == ["in", "first", "forked", "answer no", "last"]
        assert graph.get_state(_config()).values == again
        replay = graph.invoke(None, past.config)
        assert replay["__interrupt__"]
        histories.append(_history(graph, _config()))
    assert histories[0] == histories[1]


def test_subgraphs_keep_their_own_namespaces(saver):
    def inner_step(state: State) -> Any:
        return {"log": [f"inner {interrupt('inner?')}"]}

    states = []
    for one in (saver, InMemorySaver()):
        inner = StateGraph(State).add_node(inner_step).add_edge(START, "inner_step").compile()
        kept = StateGraph(State).add_node("count", lambda s: {"n": s["n"] + 1})
        kept = kept.add_edge(START, "count").compile(checkpointer=True)
        outer = StateGraph(State).add_node("inner", inner).add_node("kept", kept)
        outer.add_edge(START, "inner").add_edge("inner", "kept").add_edge("kept", END)
        graph = outer.compile(checkpointer=one)
        graph.invoke({"log": ["a"], "n": 0}, _config())
        inside = graph.get_state(_config(), subgraphs=True).tasks[0].state
        assert inside.next == ("inner_step",)
        done = graph.invoke(Command(resume="ok"), _config())
        done = graph.invoke({"log": [], "n": done["n"]}, _config())
        states.append((done["log"], done["n"], _history(graph, _config())))
    assert states[0] == states[1]


def test_send_fans_out(saver):
    class Fan(TypedDict):
        items: list[int]
        out: Annotated[list[int], operator.add]

    def spread(state: Fan) -> Any:
        return [Send("square", {"x": x}) for x in state["items"]]

    states = []
    for one in (saver, InMemorySaver()):
        builder = StateGraph(Fan).add_node("square", lambda task: {"out": [task["x"] ** 2]})
        builder.add_conditional_edges(START, spread, ["square"])
        graph = builder.compile(checkpointer=one)
        done = graph.invoke({"items": list(range(12)), "out": []}, _config())
        assert done["out"] == [x * x for x in range(12)]
        states.append(_history(graph, _config()))
    assert states[0] == states[1]


def _append(state: list[str] | None, writes: list[Any]) -> list[str]:
    return [*(state or []), *(item for write in writes for item in write)]


def test_delta_channels_are_rebuilt(saver):
    class Delta(TypedDict):
        log: Annotated[list[str], DeltaChannel(_append, snapshot_frequency=3)]

    states = []
    for one in (saver, InMemorySaver()):
        builder = StateGraph(Delta)
        for number in range(4):
            builder.add_node(
                f"n{number}", lambda s, number=number: {"log": [f"{number}:{len(s['log'])}"]}
            )
            builder.add_edge(START if number == 0 else f"n{number - 1}", f"n{number}")
        graph = builder.compile(checkpointer=one)
        for turn in range(3):
            graph.invoke({"log": [f"in {turn}"]}, _config())
        history = [s.values for s in graph.get_state_history(_config())]
        past = list(graph.get_state_history(_config()))[5]
        forked = graph.invoke({"log": ["fork"]}, past.config)
        one.prune(["t"]) if one is saver else None
        states.append((history, forked, graph.get_state(_config()).values))
    assert states[0] == states[1]


def test_an_error_is_kept_with_its_checkpoint(saver):
    calls = []

    def flaky(state: State) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("first time")
        return {"log": ["flaky"]}

    graph = StateGraph(State).add_node(flaky).add_edge(START, "flaky").compile(checkpointer=saver)
    with pytest.raises(RuntimeError):
        graph.invoke({"log": ["in"], "n": 0}, _config())
    assert "first time" in graph.get_state(_config()).tasks[0].error
    assert graph.invoke(None, _config())["log"] == ["in", "flaky"]


def test_threads_are_copied_and_go_on_apart(saver):
    graph = _approval().compile(checkpointer=saver)
    graph.invoke({"log": ["in"], "n": 1}, _config("one"))
    saver.copy_thread("one", "two")
    assert _history(graph, _config("two")) == _history(graph, _config("one"))
    assert graph.invoke(Command(resume="2"), _config("two"))["log"][-2:] == ["answer 2", "last"]
    assert graph.get_state(_config("one")).next == ("ask",)


def test_one_object_serves_eight_threads_and_two_event_loops(postgres_url, redis_url, monkeypatch):
    monkeypatch.setenv("LANGGRAPH_VAT_POSTGRES", postgres_url)
    monkeypatch.setenv("LANGGRAPH_VAT_REDIS", redis_url)
    monkeypatch.delitem(sys.modules, "tests.import_time", raising=False)
    application = importlib.import_module("tests.import_time")
    saver, graph = application.saver, application.graph
    saver.setup()
    threads = [str(uuid.uuid4()) for _ in range(8)]

    def talk(thread: str) -> None:
        for turn in range(5):
            graph.invoke({"messages": [("user", f"{thread} {turn}")]}, _config(thread))

    async def talk_async() -> None:
        async def one(thread: str) -> None:
            for turn in range(3):
                await graph.ainvoke({"messages": [("user", f"{turn}")]}, _config(thread))

        await asyncio.gather(*map(one, threads))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(talk, threads))
    asyncio.run(talk_async())
    asyncio.run(talk_async())
    talk(threads[0])
    for thread in threads:
        turns = 11 + 5 * (thread == threads[0])
        state = graph.get_state(_config(thread))
        assert [m.content for m in state.values["messages"][1::2]] == [
            str(2 * turn + 1) for turn in range(turns)
        ]
        assert len(list(graph.get_state_history(_config(thread)))) == 3 * turns
    saver.close()
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url) as fresh:
        assert len(list(fresh.list(None))) == 3 * (8 * 11 + 5)


@pytest.mark.parametrize("is_hot", [True, False])
def test_where_forks_are_refused_one_of_two_runs_ends_and_the_history_is_a_line(
    postgres_url, redis_url, is_hot
):
    meeting = threading.Barrier(2, timeout=20)

    def meet(state: State) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait()
        return {"log": ["met"], "n": state["n"]}

    builder = StateGraph(State).add_node(meet).add_edge(START, "meet")
    options: Any = {"redis": redis_url if is_hot else None, "on_conflict": "raise"}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        graph = builder.compile(checkpointer=saver)

        def run(number: int) -> str:
            try:
                graph.invoke({"log": [str(number)], "n": number}, _config(), durability="sync")
            except ConflictError:
                meeting.abort()
                return "refused"
            return "done"

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(run, (1, 2))) == ["done", "refused"]
        parents = [s.parent_config and s.parent_config["configurable"]["checkpoint_id"]
                   for s in graph.get_state_history(_config())]  # fmt: skip
        assert len(parents) == len(set(parents))
