"""Nothing is made of what is stored but types that are allowed, sealed or not."""

import dataclasses
import datetime as dt
import decimal
import enum
import json
import pathlib
import re
import sys
import uuid
from collections import deque
from typing import Any

import ormsgpack
import psycopg
import pydantic
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.types import Command, Interrupt, Send

from langgraph_vat import (
    ConfigurationError,
    EncryptedSerializer,
    HybridSaver,
    InvalidInputError,
    Keyring,
    SemanticStore,
    StrictSerializer,
    TypeNotAllowedError,
    UnreadableError,
)


@dataclasses.dataclass
class Plan:
    name: str


class Model(pydantic.BaseModel):
    name: str


class Colour(enum.Enum):
    RED = "red"


OURS: Any = [Plan("a"), Model(name="a"), Colour.RED]
SAFE: Any = [
    [HumanMessage("hi", id="1"), AIMessage("ho", id="2")],
    Send("node", {"a": 1}),
    Interrupt("why?", id="1"),
    dt.datetime.now(dt.UTC),
    {"at": dt.date(2026, 1, 1), "for": dt.timedelta(1)},
    uuid.uuid4(),
    decimal.Decimal("1.10"),
    {1, 2},
    frozenset("ab"),
    deque([1]),
    pathlib.Path("/a"),
    re.compile("a+"),
    b"bytes",
    None,
    [1, 2.5, "text", True, [None]],
]


def at(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def put(saver: HybridSaver, value: Any, thread: str = "t") -> Any:
    checkpoint = empty_checkpoint() | {"channel_values": {"a": value}, "channel_versions": {"a": 1}}
    return saver.put(at(thread), checkpoint, {"step": 0}, {"a": 1})


@pytest.fixture(params=["plain", "sealed"])
def make(request, postgres_url, redis_url):
    def made(**options: Any) -> HybridSaver:
        keyring = Keyring([("k", bytes(range(32)))]) if request.param == "sealed" else None
        saver = HybridSaver.from_conn_string(
            postgres_url, redis=redis_url, keyring=keyring, **options
        )
        savers.append(saver)
        return saver

    savers: list[HybridSaver] = []
    with made():
        yield made
        for saver in savers:
            saver.close()


@pytest.mark.parametrize("value", OURS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one], lambda one: {"k": one}])
def test_a_type_that_is_not_allowed_is_refused_before_anything_is_written(make, value, wrap):
    saver = make()
    with pytest.raises(TypeNotAllowedError, match=r"'a'.*allow=.*tests.test_strict") as refused:
        put(saver, wrap(value))
    assert type(value).__name__ in str(refused.value)
    assert saver.get_tuple(at()) is None
    with pytest.raises(TypeNotAllowedError):
        saver.put_writes(put(saver, 1), [("a", wrap(value))], "task")
    assert saver.get_tuple(at()).pending_writes == []
    pair = (type(value).__module__, type(value).__name__)
    for allowed in (type(value), pair):
        knowing = make(serde=StrictSerializer(allow=[allowed]))
        put(knowing, wrap(value), "known")
        assert knowing.get_tuple(at("known")).checkpoint["channel_values"] == {"a": wrap(value)}


DEEP: Any = [
    lambda one: {"k": [[one]]},
    lambda one: [{"a": {"b": [1, one]}}, 2],
    lambda one: Send("node", {"plan": one}),
    lambda one: Interrupt(value={"plan": [one]}, id="1"),
    lambda one: Command(update={"plan": one}),
    lambda one: deque([1, [one]]),
    lambda one: [{1, 2}, frozenset("a"), {"a": one}],
]


@pytest.mark.parametrize("value", OURS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("wrap", DEEP)
def test_at_any_depth_what_could_not_be_read_is_not_written(wrap, value):
    plain = StrictSerializer()
    for _ in range(2):  # what was refused is not taken for proven
        plain.dumps_typed(wrap([1]))  # nor are the containers around it
        with pytest.raises(TypeNotAllowedError, match="not written"):
            plain.dumps_typed(wrap(value))
    knowing = StrictSerializer(allow=[type(value)])
    typed = knowing.dumps_typed(wrap(value))
    assert typed == JsonPlusSerializer().dumps_typed(wrap(value))
    assert str(knowing.loads_typed(typed)) == str(wrap(value)) or type(value) is Model
    with pytest.raises(TypeNotAllowedError, match="not read; it is as it was"):
        plain.loads_typed(typed)


def test_within_a_message_too():
    message = AIMessage("a", additional_kwargs={"x": {"y": [Colour.RED]}})
    for value in (message, [Send("node", [message])]):
        with pytest.raises(TypeNotAllowedError, match="'Colour'"):
            StrictSerializer().dumps_typed(value)
        knowing = StrictSerializer(allow=[Colour])
        assert knowing.loads_typed(knowing.dumps_typed(value)) == value


def test_what_is_stored_already_and_not_allowed_is_named_with_its_place(make, postgres_url):
    put(make(serde=StrictSerializer(allow=[Plan])), {"k": [[Plan("a")]]})
    saver = make()
    for read in (saver.get_tuple, lambda config: list(saver.list(config))):
        with pytest.raises(TypeNotAllowedError, match=r"'Plan'.*'tests.test_strict'") as refused:
            read(at())
        assert "thread 't'" in refused.value.__notes__[0]
    clone: Any = saver.with_allowlist([(Plan.__module__, "Plan")])
    assert clone.get_tuple(at()).checkpoint["channel_values"] == {"a": {"k": [[Plan("a")]]}}
    put(clone, Plan("b"), "other")
    with pytest.raises(TypeNotAllowedError):  # the one it was taken from has not learnt it
        put(saver, Plan("b"), "other")
    with SemanticStore.from_conn_string(postgres_url, serde=clone.serde) as knowing:
        knowing.put(("a", "b"), "k", {"plan": Plan("a")})
    with (
        SemanticStore.from_conn_string(postgres_url) as store,
        pytest.raises(TypeNotAllowedError) as refused,
    ):
        store.get(("a", "b"), "k")
    assert refused.value.__notes__ == ["This is of item 'k' of namespace 'a.b'."]


class Outer:
    class Inner(pydantic.BaseModel):
        name: str

    @dataclasses.dataclass
    class Plan:
        """Another one of this name stands in the module."""

        name: str


@dataclasses.dataclass
class Counted:
    name: str
    length: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.length = len(self.name)


class Names(pydantic.RootModel[list[str]]):
    pass


def test_what_would_come_back_as_something_else_is_not_written():
    allowing = StrictSerializer(allow=[Outer.Inner, Outer.Plan, Counted, Plan, Names])
    for value in (Outer.Inner(name="a"), Outer.Plan("a"), Counted("a")):
        for wrapped in (value, [[value]]):
            with pytest.raises(InvalidInputError, match="not written") as refused:
                allowing.dumps_typed(wrapped)
            assert not isinstance(refused.value, TypeNotAllowedError)
    for kept in (Plan("a"), Names(["a", "b"])):  # JsonPlusSerializer returns a list for the latter
        assert allowing.loads_typed(allowing.dumps_typed([kept])) == [kept]


def test_a_class_that_is_gone_or_another_now_is_said(monkeypatch):
    allowing = StrictSerializer(allow=[Plan, Model])
    here = sys.modules[__name__]
    for value in (Plan("a"), Model(name="a")):
        typed = allowing.dumps_typed({"k": Send("n", value)})
        name = type(value).__name__
        with monkeypatch.context() as patch:
            patch.delattr(here, name)
            with pytest.raises(UnreadableError, match=rf"'{name}'.*\(AttributeError\)"):
                allowing.loads_typed(typed)
        assert allowing.loads_typed(typed) == {"k": Send("n", value)}
    typed = allowing.dumps_typed(Plan("a"))
    monkeypatch.setattr(here, "Plan", dataclasses.make_dataclass("Plan", ["title"]))
    with pytest.raises(UnreadableError, match=r"'Plan'.*\(TypeError\)"):
        allowing.loads_typed(typed)


def _nested(depth: int, code: int) -> bytes:
    data = ormsgpack.packb(1)
    for _ in range(depth):
        data = ormsgpack.packb(ormsgpack.Ext(code, data))
    return data


@pytest.mark.parametrize(
    ("type_", "data"),
    [
        ("msgpack", b""),
        ("msgpack", b"\x92\x01"),
        ("msgpack", b"\xc1"),
        ("msgpack", ormsgpack.packb(ormsgpack.Ext(0, b"\x01"))),
        ("msgpack", ormsgpack.packb(ormsgpack.Ext(0, ormsgpack.packb(["datetime"])))),
        ("msgpack", ormsgpack.packb(ormsgpack.Ext(0, ormsgpack.packb([["a"], "b", 1])))),
        ("msgpack", ormsgpack.packb(ormsgpack.Ext(2, ormsgpack.packb(["uuid", "UUID", 1])))),
        ("msgpack", ormsgpack.packb(ormsgpack.Ext(6, b"\x01"))),
        ("msgpack", ormsgpack.packb(ormsgpack.Ext(99, b"\x01"))),
        ("msgpack", b"\x81" * 2_000 + b"\x01"),
        ("msgpack", _nested(2_000, 7)),
        ("json", b"{"),
        ("json", b"\xff"),
        ("json", b"[" * 100_000),
    ],
)
def test_what_is_damaged_is_said_to_be(type_, data):
    with pytest.raises(UnreadableError, match=r"cannot be (parsed|made)"):
        StrictSerializer().loads_typed((type_, data))


def _envelope(path: Any, kind: str = "constructor", lc: int = 1, **more: Any) -> bytes:
    value = {"lc": lc, "type": kind, "id": path, "kwargs": more}
    return json.dumps([{"deep": value}]).encode()


def test_of_older_json_only_messages_are_made():
    strict = StrictSerializer(allow=[Plan])
    for name in (
        ["langchain", "schema", "messages", "HumanMessage"],
        ["langchain_core", "messages", "human", "HumanMessage"],
    ):
        found = strict.loads_typed(("json", _envelope(name, content="hi")))
        assert found == [{"deep": HumanMessage("hi")}]
    for forged in (
        _envelope(["langchain", "prompts", "prompt", "PromptTemplate"], template="{a}"),
        _envelope(["langchain_core", "prompts", "prompt", "PromptTemplate"], template="{a}"),
        _envelope(["OPENAI_API_KEY"], "secret"),
        _envelope(["a", "b"], "not_implemented"),
        _envelope(["os", "system"], lc=2),
        _envelope(["tests", "test_strict", "Plan"], lc=2, name="a"),
        _envelope([]),
        _envelope("os"),
    ):
        with pytest.raises(TypeNotAllowedError, match="not read"):
            strict.loads_typed(("json", forged))
    assert strict.loads_typed(("json", b'{"lc": 1, "a": [2]}')) == {"lc": 1, "a": [2]}


def test_a_user_s_data_that_look_like_langchain_s_come_back(make):
    values = [
        {"lc": 1, "type": "constructor", "id": ["langchain", "x", "Y"], "text": text}
        for text in ("a", "?\ud800")
    ]
    saver = make()
    for number, value in enumerate(values):
        put(saver, value, f"t{number}")
    found = [saver.get_tuple(at(f"t{n}")).checkpoint["channel_values"]["a"] for n in range(2)]
    assert found == [values[0], values[1] | {"text": "??"}]


def test_the_bytes_are_those_of_langgraph():
    everything = [*SAFE, *([one] for one in SAFE), {"a": SAFE[1:], 1: Command(goto=[SAFE[1]])}]
    theirs, ours = JsonPlusSerializer(), StrictSerializer()
    for value in [*everything, *everything]:
        assert ours.dumps_typed(value) == theirs.dumps_typed(value)
        assert ours.loads_typed(theirs.dumps_typed(value)) == value
    assert ours.dumps_typed(ValueError("a")) == theirs.dumps_typed(ValueError("a"))
    kinds = [type("A", (), {"__slots__": ()}), object]
    for kind in kinds:
        with pytest.raises(TypeError):
            ours.dumps_typed([kind()])


def test_what_langgraph_takes_for_safe_comes_back(make):
    saver = make()
    for number, value in enumerate(SAFE):
        put(saver, value, f"t{number}")
        assert saver.get_tuple(at(f"t{number}")).checkpoint["channel_values"]["a"] == value


@pytest.mark.parametrize("type_", ["msgpack", "pickle"])
def test_what_somebody_put_into_the_database_is_not_run(postgres_url, tmp_path, type_):
    proof = tmp_path / "was here"
    forged = ("os", "system", [f"touch '{proof}'"])
    data = ormsgpack.packb(ormsgpack.Ext(1, ormsgpack.packb(forged)))
    if type_ == "pickle":
        data = f"cos\nsystem\n(S'touch {proof}'\ntR.".encode()
    with HybridSaver.from_conn_string(postgres_url) as saver:
        put(saver, ["a", "b"])
        with psycopg.connect(postgres_url) as connection:
            connection.execute("UPDATE checkpoint_blobs SET type = %s, blob = %s", (type_, data))
        with pytest.raises(TypeNotAllowedError, match=r"'system'|pickled"):
            saver.get_tuple(at())
    assert not proof.exists()


def test_items_are_as_strict(postgres_url):
    with SemanticStore.from_conn_string(postgres_url) as store:
        with pytest.raises(TypeNotAllowedError, match="StrictSerializer"):
            store.put(("a",), "k", {"plan": Plan("a")})
        assert store.get(("a",), "k") is None


def test_the_encrypted_serializer_is_as_strict():
    keyring = Keyring.generate()
    with pytest.raises(TypeNotAllowedError):
        EncryptedSerializer(keyring).dumps_typed(Plan("a"))
    knowing = EncryptedSerializer(keyring, StrictSerializer(allow=[Plan]))
    assert knowing.loads_typed(knowing.dumps_typed(Plan("a"))) == Plan("a")


def test_a_serializer_of_the_callers_own_is_used_as_it_is(make):
    saver = make(serde=JsonPlusSerializer(allowed_msgpack_modules=True))
    put(saver, Plan("a"))
    assert saver.get_tuple(at()).checkpoint["channel_values"] == {"a": Plan("a")}


@pytest.mark.parametrize("wrong", [["Plan"], [("a",)], [Plan("a")], [("a", 1)]])
def test_what_is_no_type_cannot_be_allowed(wrong):
    with pytest.raises(ConfigurationError, match="allow"):
        StrictSerializer(allow=wrong)
