"""Nothing is made of what is stored but types that are allowed, sealed or not."""

import dataclasses
import datetime as dt
import decimal
import enum
import pathlib
import re
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
from langgraph.types import Interrupt, Send

from langgraph_vat import (
    ConfigurationError,
    EncryptedSerializer,
    HybridSaver,
    Keyring,
    SemanticStore,
    StrictSerializer,
    TypeNotAllowedError,
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


def test_what_stands_deeper_is_refused_when_it_is_read(make):
    put(make(serde=StrictSerializer(allow=[Plan])), {"k": [[Plan("a")]]})
    saver = make()
    for read in (saver.get_tuple, lambda config: list(saver.list(config))):
        with pytest.raises(TypeNotAllowedError, match=r"'Plan'.*'tests.test_strict'"):
            read(at())
    clone: Any = saver.with_allowlist([(Plan.__module__, "Plan")])
    assert clone.get_tuple(at()).checkpoint["channel_values"] == {"a": {"k": [[Plan("a")]]}}
    put(clone, Plan("b"), "other")
    with pytest.raises(TypeNotAllowedError):  # the one it was taken from has not learnt it
        put(saver, Plan("b"), "other")


def test_what_langgraph_takes_for_safe_comes_back(make):
    saver = make()
    for number, value in enumerate(SAFE):
        put(saver, value, f"t{number}")
        assert saver.get_tuple(at(f"t{number}")).checkpoint["channel_values"]["a"] == value


FORGED = ormsgpack.packb(
    ormsgpack.Ext(1, ormsgpack.packb(("os", "system", ["touch /tmp/vat-was-here"])))
)


@pytest.mark.parametrize(("type_", "data"), [("msgpack", FORGED), ("pickle", b"cos\nsystem\n.")])
def test_what_somebody_put_into_the_database_is_not_run(postgres_url, type_, data):
    with HybridSaver.from_conn_string(postgres_url) as saver:
        put(saver, ["a", "b"])
        with psycopg.connect(postgres_url) as connection:
            connection.execute("UPDATE checkpoint_blobs SET type = %s, blob = %s", (type_, data))
        with pytest.raises(TypeNotAllowedError, match=r"'system'|pickled"):
            saver.get_tuple(at())
    assert not pathlib.Path("/tmp/vat-was-here").exists()


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
