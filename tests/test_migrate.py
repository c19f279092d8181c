"""Copies between savers, and between stores, of every kind."""

import copy
import operator
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import permutations
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.base import WRITES_IDX_MAP, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.store.base import GetOp, PutOp, SearchOp
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, Send, interrupt

from langgraph_vat import (
    ConflictError,
    EncryptedSerializer,
    HybridSaver,
    InvalidInputError,
    Keyring,
    MigrationError,
    SemanticStore,
)
from langgraph_vat.migrate import (
    Progress,
    acopy_checkpoints,
    acopy_items,
    bar,
    copy_checkpoints,
    copy_items,
)
from tests.store.embedder import DIMS, embed

KINDS = ("memory", "PostgresSaver", "hybrid", "sealed")


class State(MessagesState):
    log: Annotated[list[str], operator.add]
    ids: set[int]


class Inner(TypedDict):
    log: Annotated[list[str], operator.add]


def graph(saver: Any) -> Any:
    inner = StateGraph(Inner)
    inner.add_node("deep", lambda _: {"log": ["deep"]})
    inner.add_edge(START, "deep")

    def ask(state: State) -> Any:
        answer = interrupt("which one?")
        return {"messages": [AIMessage(f"{answer}!", id="a")], "log": ["asked"], "ids": {1, 2, 300}}

    built = StateGraph(State)
    built.add_node("inner", inner.compile(checkpointer=True))
    built.add_node("ask", ask)
    built.add_node("many", lambda _: {"log": ["many"]})
    built.add_edge(START, "inner")
    built.add_conditional_edges("inner", lambda s: [Send("many", s), Send("many", s), "ask"])
    return built.compile(checkpointer=saver)


def fill(saver: Any, threads: int = 3) -> None:
    """Threads with history, subgraphs, a fork, and one run that waits for an answer."""
    app = graph(saver)
    for number in range(threads):
        config: Any = {"configurable": {"thread_id": f"t{number}"}}
        app.invoke({"messages": [HumanMessage("hello")], "log": [], "ids": set()}, config)
        if number:
            app.invoke(Command(resume="this"), config)
            app.update_state(list(app.get_state_history(config))[2].config, {"log": ["fork"]})


def shown(saver: Any) -> list[Any]:
    return sorted(
        (
            [
                one.config["configurable"],
                one.checkpoint,
                one.metadata,
                one.parent_config,
                sorted(one.pending_writes, key=lambda w: (w[0], WRITES_IDX_MAP.get(w[1], 0))),
            ]
            for one in saver.list(None)
        ),
        key=lambda one: (one[0]["thread_id"], one[0]["checkpoint_ns"], one[0]["checkpoint_id"]),
    )


@pytest.fixture
def make(postgres_url, redis_url) -> Iterator[Any]:
    """Make a saver of a kind, with tables of its own."""
    with ExitStack() as stack:

        def one(kind: str) -> Any:
            if kind == "memory":
                return InMemorySaver()
            if kind == "PostgresSaver":
                saver = stack.enter_context(PostgresSaver.from_conn_string(postgres_url))
                saver.setup()
                return saver
            options: Any = {"redis": redis_url} if kind == "hybrid" else {}
            if kind == "sealed":
                options["keyring"] = Keyring.generate()
            made = HybridSaver.from_conn_string(postgres_url, schema=kind, **options)
            return stack.enter_context(made)

        yield one


@pytest.mark.parametrize("kinds", [*permutations(KINDS, 2)])
def test_every_checkpoint_arrives_equal_and_runs_go_on(make, kinds):
    source, target = map(make, kinds)
    fill(source)
    done = copy_checkpoints(source, target)
    assert done.copied == done.done == done.total == len(shown(source))
    assert shown(target) == shown(source)
    assert copy_checkpoints(source, target).copied == 0
    waiting: Any = {"configurable": {"thread_id": "t0"}}
    ended = graph(target).invoke(Command(resume="this"), waiting)
    assert ended == graph(source).invoke(Command(resume="this"), waiting)
    assert ended["messages"][-1].content == "this!"


async def test_asyncio_savers_are_copied(make):
    source, target = make("memory"), make("hybrid")
    fill(source)
    seen: list[tuple[int, int, bool]] = []
    await acopy_checkpoints(
        source, target, report=lambda p: seen.append((p.done, p.total, p.is_done))
    )
    count = len(shown(source))
    assert shown(target) == shown(source)
    assert seen == [*((n + 1, count, False) for n in range(count)), (count, count, True)]


def test_a_copy_that_was_stopped_goes_on(make):
    source, target = make("memory"), make("hybrid")
    fill(source)

    class Stopped(BaseException):
        pass

    def stop(progress: Progress) -> None:
        if progress.copied == 7:
            raise Stopped

    with pytest.raises(Stopped):
        copy_checkpoints(source, target, report=stop)
    first = len(shown(target))
    done = copy_checkpoints(source, target)
    assert (first, done.copied) == (7, done.total - 7)
    fill(source, 1)  # what came since
    assert 0 < copy_checkpoints(source, target).copied < done.total
    assert shown(target) == shown(source)


def test_writes_that_were_not_copied_any_more_come_with_the_next_copy(make):
    source, target = make("memory"), make("hybrid")
    fill(source)

    class Dies(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Dies

    target.put_writes, kept = die, target.put_writes
    with pytest.raises(Dies):
        copy_checkpoints(source, target)
    target.put_writes = kept
    copy_checkpoints(source, target)
    assert shown(target) == shown(source)


def test_chosen_threads_alone_are_copied(make):
    source, target = make("memory"), make("hybrid")
    fill(source)
    copy_checkpoints(source, target, thread_ids=["t1"])
    assert {one.config["configurable"]["thread_id"] for one in target.list(None)} == {"t1"}


def test_a_child_with_a_smaller_id_than_its_parent_comes_after_it(make):
    source, target = make("memory"), make("hybrid")
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    for name in "cab":  # clocks behind one another
        checkpoint = {**empty_checkpoint(), "id": name, "channel_values": {"a": name}}
        checkpoint["channel_versions"] = {"a": f"{name}1"}
        config = source.put(config, checkpoint, {"step": 1}, checkpoint["channel_versions"])
    copy_checkpoints(source, target)
    assert shown(target) == shown(source)


def test_a_parent_that_was_deleted_is_none(make):
    source, target = make("memory"), make("hybrid")
    fill(source)
    ids = sorted(source.storage["t1"][""])
    del source.storage["t1"][""][ids[0]]
    copy_checkpoints(source, target)
    (first,) = (one for one in target.list(None) if one.checkpoint["id"] == ids[1])
    assert first.parent_config is None
    assert copy_checkpoints(source, target).copied == 0


@pytest.mark.parametrize("broken", ["put", "put_writes"])
def test_what_does_not_come_back_equal_is_told(make, broken):
    source = make("memory")
    fill(source)

    class Forgetful(InMemorySaver):
        def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
            if broken == "put" and "log" in new_versions:
                checkpoint["channel_values"]["log"] = ["secret", "other"]
            return super().put(config, checkpoint, metadata, new_versions)

        def put_writes(self, config: Any, writes: Any, task_id: str, path: str = "") -> None:
            if broken == "put":
                super().put_writes(config, writes, task_id, path)

    with pytest.raises(MigrationError, match="does not come back") as caught:
        copy_checkpoints(source, Forgetful())
    assert "secret" not in str(caught.value)


def test_a_source_that_shrinks_is_told(make):
    source = make("memory")
    fill(source)
    with pytest.raises(MigrationError, match="deleted from the source"):
        copy_checkpoints(source, InMemorySaver(), report=lambda _: source.storage["t0"].clear())
    with pytest.raises(MigrationError, match="deleted meanwhile"):
        copy_checkpoints(source, InMemorySaver(), report=lambda _: source.storage["t2"].clear())


class Whole(InMemorySaver):
    """Counts versions, and stores checkpoints whole: after a fork two values have one version."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: dict[str, Any] = {}

    def get_next_version(self, current: Any, channel: None) -> Any:
        return (current or 0) + 1

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        self.whole[checkpoint["id"]] = copy.deepcopy(checkpoint["channel_values"])
        return super().put(config, checkpoint, metadata, new_versions)

    def get_tuple(self, config: Any) -> Any:
        return self._whole(super().get_tuple(config))

    def list(self, config: Any, **conditions: Any) -> Any:
        return map(self._whole, super().list(config, **conditions))

    def _whole(self, found: Any) -> Any:
        if found is not None:
            found.checkpoint["channel_values"] = self.whole[found.checkpoint["id"]]
        return found


def test_versions_that_two_branches_share_are_not_mixed_up_silently(make):
    source, config = Whole(), {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    first = None
    for value in ("first", "branch one", "branch two"):
        checkpoint: Any = {
            **empty_checkpoint(),
            "id": str(uuid6()),
            "channel_values": {"a": [value]},
        }
        checkpoint["channel_versions"] = {"a": 1 if first is None else 2}
        put = source.put(first or config, checkpoint, {}, checkpoint["channel_versions"])
        first = first or put
    for kind in KINDS:
        with pytest.raises(MigrationError, match="one version for two values"):
            copy_checkpoints(source, make(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_errors_that_came_since_are_taken_over(make, kind):
    def ask(state: State) -> Any:
        if interrupt("first?") == "fail":
            raise ValueError
        return {"log": [interrupt("second?")]}

    source, target = InMemorySaver(), make(kind)
    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_node("beside", lambda _: {"log": ["beside"]})
    builder.add_edge(START, "ask")
    builder.add_edge(START, "beside")
    app = builder.compile(checkpointer=source)
    for thread in ("t", "u"):
        app.invoke({"messages": [], "log": [], "ids": set()}, at(thread))
        copy_checkpoints(source, target)
    app.invoke(Command(resume="one"), at("t"))
    with pytest.raises(ValueError):
        app.invoke(Command(resume="fail"), at("u"))
    assert copy_checkpoints(source, target).copied == 2
    app.invoke(Command(resume="two"), at("t"))
    copy_checkpoints(source, target)
    assert copy_checkpoints(source, target).copied == 0
    assert shown(target) == shown(source)


def at(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def test_what_the_target_will_not_keep_is_told(make):
    source, target = make("memory"), make("hybrid")
    fill(source, 1)
    newest = source.get_tuple(at("t0"))
    versions = newest.checkpoint["channel_versions"]
    metadata = {**newest.metadata, "run_id": "gone"}
    source.put(newest.parent_config, newest.checkpoint, metadata, versions)
    target.delete_for_runs(["gone"])
    with pytest.raises(MigrationError, match="had runs of it deleted"):
        copy_checkpoints(source, target)


def test_an_encrypting_source_is_compared_by_what_it_holds(make):
    source = InMemorySaver(serde=EncryptedSerializer(Keyring.generate()))
    fill(source)
    target = make("sealed")
    assert copy_checkpoints(source, target).copied > 0
    assert copy_checkpoints(source, target).copied == 0


class Array:
    """Is not simply equal to anything."""

    def __init__(self) -> None:
        self.numbers = [1, 2, 3]

    def __eq__(self, other: object) -> Any:
        raise ValueError("the truth value of an array is ambiguous")

    __hash__ = None


def test_values_that_are_not_simply_equal_are_copied(postgres_url):
    serde = JsonPlusSerializer(pickle_fallback=True)
    source = InMemorySaver(serde=serde)
    target = HybridSaver.from_conn_string(postgres_url, serde=serde)
    target.setup()
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    values = {"array": Array(), "nan": float("nan")}
    checkpoint: Any = {**empty_checkpoint(), "channel_values": values}
    checkpoint["channel_versions"] = {"array": "1", "nan": "1"}
    source.put(config, checkpoint, {}, checkpoint["channel_versions"])
    assert [copy_checkpoints(source, target).copied for _ in range(2)] == [1, 0]
    target.close()


def test_a_source_that_hides_namespaces_is_told(make):
    class Hiding(InMemorySaver):
        def list(self, config: Any, **conditions: Any) -> Any:
            for one in super().list(config, **conditions):
                if config is None or one.config["configurable"]["checkpoint_ns"] == "":
                    yield one

    source = Hiding()
    fill(source)
    with pytest.raises(MigrationError, match="leaves out namespaces"):
        copy_checkpoints(source, make("hybrid"))


def test_threads_that_are_not_there_are_told(make):
    source, target = make("memory"), make("hybrid")
    with pytest.raises(MigrationError, match="never was"):
        copy_checkpoints(source, target, thread_ids=["nowhere"])
    with pytest.raises(InvalidInputError, match="list of ids"):
        copy_checkpoints(source, target, thread_ids="t0")


def test_what_the_target_refuses_is_named(postgres_url):
    source = InMemorySaver()
    fill(source)
    with (
        HybridSaver.from_conn_string(postgres_url, on_conflict="raise") as target,
        pytest.raises(
            MigrationError, match=r"did not take checkpoint .*\(ConflictError\)"
        ) as caught,
    ):
        copy_checkpoints(source, target)
    assert isinstance(caught.value.__cause__, ConflictError)


ITEMS = [
    *(
        (("docs", f"u{n % 7}"), f"k{n}", {"text": f"text {n}", "n": [n, None, 1.5]})
        for n in range(450)
    ),
    (("docs",), "above", {"text": "in the namespace above"}),
    (("other", "deep", "er"), "k", {}),
]


@pytest.mark.parametrize("way", ["into", "out of", "asyncio"])
async def test_every_item_arrives_equal(postgres_url, way):
    index: Any = {"embed": embed, "dims": DIMS, "fields": ["text"]}
    with SemanticStore.from_conn_string(postgres_url, index=index) as ours:
        source, target = (ours, InMemoryStore()) if way == "out of" else (InMemoryStore(), ours)
        for namespace, key, value in ITEMS:
            source.put(namespace, key, value)
        target.put(("docs",), "above", {"text": "older"})
        if way == "asyncio":
            done = await acopy_items(source, target)
        else:
            done = copy_items(source, target)
        assert done.copied == done.total == len(ITEMS)
        for namespace, key, value in ITEMS:
            assert target.get(namespace, key).value == value
        assert copy_items(source, target).copied == 0
        if way != "out of":
            assert ours.search((), query="in the namespace above", limit=1)[0].key == "above"


def test_pages_of_a_source_without_an_order_lack_nothing():
    class Shuffled(InMemoryStore):
        def batch(self, ops: Any) -> Any:
            answers = super().batch(
                [
                    op._replace(limit=10_000, offset=0) if isinstance(op, SearchOp) else op
                    for op in ops
                ]
            )
            for op, found in zip(ops, answers, strict=True):
                if isinstance(op, SearchOp):
                    dice.shuffle(found)
                    found[:] = found[op.offset : op.offset + op.limit]
            return answers

    dice, source, target = random.Random(7), Shuffled(), InMemoryStore()
    for namespace, key, value in ITEMS:
        source.put(namespace, key, value)
    assert copy_items(source, target).copied == len(ITEMS)


def test_an_item_that_does_not_come_back_equal_is_told():
    class Forgetful(InMemoryStore):
        def batch(self, ops: Any) -> Any:
            return super().batch([op for op in ops if not isinstance(op, PutOp)] or [GetOp((), "")])

    source = InMemoryStore()
    source.put(("docs",), "k", {"text": "secret"})
    with pytest.raises(MigrationError, match="'k'") as caught:
        copy_items(source, Forgetful())
    assert "secret" not in str(caught.value)


def test_the_bar_tells_how_far_it_is(capsys):
    bar(Progress(total=4, done=1, copied=1))
    bar(Progress(done=4, copied=2))
    bar(Progress(total=4, done=4, copied=2, is_done=True))
    lines = capsys.readouterr().err.split("\r")[1:]
    assert lines == [
        f"[{'#' * 7:<30}] 1 of 4 looked at, 1 copied",
        f"[{'#' * 30}] 4 looked at, 2 copied",
        f"[{'#' * 30}] 4 of 4 looked at, 2 copied\n",
    ]


@dataclass
class Bag:
    things: set[str]


def test_a_set_within_an_object_may_come_back_in_another_order(make):
    class Reordering(InMemorySaver):
        def get_tuple(self, config: Any) -> Any:
            found = super().get_tuple(config)
            if found is not None:
                things = found.checkpoint["channel_values"]["bag"].things
                found.checkpoint["channel_values"]["bag"].things = {*reversed(list(things))}
            return found

    source, target = make("memory"), Reordering()
    checkpoint = {**empty_checkpoint(), "channel_values": {"bag": Bag({"8", "0"})}}
    checkpoint["channel_values"]["bag"].things = {8, 0}  # of the same bucket: by insertion
    checkpoint["channel_versions"] = {"bag": "1"}
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    source.put(config, checkpoint, {"step": 1}, {"bag": "1"})
    assert copy_checkpoints(source, target).copied == 1
