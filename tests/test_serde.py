"""EncryptedSerializer is LangGraph's serializer with a seal: same values back, nothing forged."""

import copy
import operator
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypedDict
from uuid import UUID

import psycopg
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, Interrupt, Send, interrupt

from langgraph_vat import EncryptedSerializer, HybridSaver, Keyring, serde
from langgraph_vat.errors import SealError, UnknownKeyError

SUFFIX = "+aes256gcm"


@dataclass
class Note:
    title: str
    lines: list[str]


ALLOWED = [(Note.__module__, Note.__qualname__)]
VALUES = [
    None,
    True,
    0,
    -(2**63),
    1.5,
    "",
    "text \U0001f512",
    b"",
    b"\x00\xff",
    bytearray(b"\x01\x02"),
    {"a": [1, [2, 3]], "b": {"c": {1, 2}}},
    HumanMessage("hi", id="1"),
    [AIMessage("call", tool_calls=[{"name": "f", "args": {"x": 1}, "id": "c"}])],
    Send("node", {"x": 1}),
    Interrupt(value={"question": "?"}, id="i"),
    Note("t", ["l"]),
    datetime(2026, 1, 2, tzinfo=UTC),
    UUID(int=5),
]


@pytest.fixture
def ring():
    return Keyring.generate()


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_as_without_a_seal(ring, value):
    plain = JsonPlusSerializer(allowed_msgpack_modules=ALLOWED)
    sealed = EncryptedSerializer(ring, plain)
    type_, data = sealed.dumps_typed(value)
    expected = plain.dumps_typed(value)
    assert type_ == expected[0] + SUFFIX
    assert len(expected[1]) < 3 or expected[1] not in data
    back = plain.loads_typed(expected)
    assert back == value
    for form in (data, bytearray(data), memoryview(data)):
        again = sealed.loads_typed((type_, form))
        assert (again, type(again)) == (back, type(back))


def test_another_process_with_the_keyring_opens_it_and_one_without_does_not(ring):
    message = EncryptedSerializer(ring).dumps_typed("hello")
    assert EncryptedSerializer(ring).loads_typed(message) == "hello"
    assert (
        EncryptedSerializer(ring.with_key("k2").with_primary("k2")).loads_typed(message) == "hello"
    )
    with pytest.raises(UnknownKeyError, match="'k1'"):
        EncryptedSerializer(Keyring.generate("k2")).loads_typed(message)
    with pytest.raises(SealError):
        EncryptedSerializer(Keyring.generate("k1")).loads_typed(message)


def test_every_changed_bit_and_length_is_refused(ring):
    sealed = EncryptedSerializer(ring)
    type_, data = sealed.dumps_typed("hello")
    changed = [
        (int.from_bytes(data) ^ (1 << bit)).to_bytes(len(data)) for bit in range(len(data) * 8)
    ]
    changed += [data[:end] for end in range(len(data))]
    changed += [data[start:] for start in range(1, len(data))]
    changed += [data + b"\0", b"\0" + data, data + data, None]
    for reader in (sealed, EncryptedSerializer(ring)):
        for message in changed:
            with pytest.raises(SealError):
                reader.loads_typed((type_, message))
        assert reader.loads_typed((type_, data)) == "hello"


def test_relabelled_or_unsealed_data_is_refused(ring):
    sealed = EncryptedSerializer(ring)
    _, data = sealed.dumps_typed(b"\x80")
    for other in ("msgpack", "bytearray", "null", "json", "pickle", "", "bytes" + SUFFIX, "\ud800"):
        with pytest.raises(SealError):
            sealed.loads_typed((other + SUFFIX, data))
    plain = [JsonPlusSerializer().dumps_typed(v) for v in ("a", None, b"b")]
    for unsealed in [*plain, ("bytes", data), (None, data)]:
        with pytest.raises(SealError, match="must be sealed"):
            sealed.loads_typed(unsealed)


def test_parts_of_two_messages_do_not_fit_together(ring):
    one, other = EncryptedSerializer(ring), EncryptedSerializer(ring)
    (type_, left), (_, right) = one.dumps_typed("left"), other.dumps_typed("right")
    end = 2 + int.from_bytes(left[:2])
    with pytest.raises(SealError):
        one.loads_typed((type_, left[:end] + right[end:]))


def test_a_serializer_cannot_be_pickled_and_shows_no_key(ring):
    sealed = EncryptedSerializer(ring)
    for fails in (lambda: pickle.dumps(sealed), lambda: copy.deepcopy(sealed)):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            fails()
    secret = sealed._data_key._secrets[0][9:]
    shown = repr(sealed) + repr(vars(sealed))
    assert repr(secret)[2:-1] not in shown
    assert ring.export_secret_text()[3:40] not in shown


# --- allow-lists --------------------------------------------------------------------


def test_a_clone_that_admits_more_types_shares_the_data_key(ring):
    sealed = EncryptedSerializer(ring, JsonPlusSerializer(allowed_msgpack_modules=None))
    clone = sealed.with_msgpack_allowlist(ALLOWED)
    assert clone is not sealed
    assert clone._data_key is sealed._data_key
    assert clone._opened is sealed._opened
    assert clone.keyring is ring
    message = sealed.dumps_typed(Note("t", []))
    assert clone.loads_typed(message) == Note("t", [])
    assert sealed.loads_typed(clone.dumps_typed("both ways")) == "both ways"
    assert sealed.serde is not clone.serde
    assert clone.with_msgpack_allowlist(ALLOWED) is clone


def test_a_serializer_that_is_not_langgraphs_is_left_alone(ring):
    class Bare:
        dumps_typed = loads_typed = None

    sealed = EncryptedSerializer(ring, Bare())
    assert sealed.with_msgpack_allowlist(ALLOWED) is sealed


def test_a_saver_that_admits_more_types_shares_its_state(ring, postgres_url, redis_url):
    inner = JsonPlusSerializer(allowed_msgpack_modules=None)
    serializer = EncryptedSerializer(ring, inner)
    options: Any = {"redis": redis_url, "serde": serializer, "flush_every": 3}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        clone: Any = saver.with_allowlist(ALLOWED)
        assert clone is not saver
        assert clone._shared is saver._shared
        assert clone.serde._data_key is serializer._data_key
        graph = _graph(saver)
        graph.invoke({"messages": [HumanMessage("hi")]}, CONFIG)
        assert clone.get_tuple(CONFIG) == saver.get_tuple(CONFIG)


# --- in LangGraph's savers ------------------------------------------------------------

CONFIG: Any = {"configurable": {"thread_id": "t"}}


class State(MessagesState):
    seen: Annotated[list[str], operator.add]


class Task(TypedDict):
    word: str


def _graph(saver):
    def split(state: State) -> Any:
        return Command(goto=[Send("work", {"word": word}) for word in ("alpha", "beta")])

    def work(task: Task) -> Any:
        return {"seen": [task["word"]]}

    def ask(state: State) -> Any:
        return {"seen": [interrupt("who-goes-there")]}

    builder = StateGraph(State).add_node(split).add_node(work).add_node(ask)
    builder.add_edge(START, "split").add_edge("work", "ask")
    return builder.compile(checkpointer=saver)


def _run(saver) -> Any:
    graph = _graph(saver)
    stopped = graph.invoke({"messages": [HumanMessage("opening-line", id="1")]}, CONFIG)
    assert stopped["__interrupt__"][0].value == "who-goes-there"
    graph.invoke(Command(resume="a-friend"), CONFIG)
    return [(s.values, s.next) for s in graph.get_state_history(CONFIG)]


WORDS = ("opening-line", "alpha", "beta", "who-goes-there", "a-friend")


def test_in_langgraphs_memory_saver(ring):
    expected = _run(InMemorySaver())
    saver = InMemorySaver(serde=EncryptedSerializer(ring))
    assert _run(saver) == expected
    kept = repr((dict(saver.blobs), dict(saver.writes), dict(saver.storage)))
    assert SUFFIX in kept
    assert not [word for word in WORDS if word in kept]
    plain = InMemorySaver()
    _run(plain)
    assert all(word in repr((dict(plain.blobs), dict(plain.writes))) for word in WORDS)


def test_in_langgraphs_postgres_saver(ring, postgres_url):
    expected = _run(InMemorySaver())
    with PostgresSaver.from_conn_string(postgres_url) as saver:
        saver.setup()
        saver.serde = EncryptedSerializer(ring)
        assert _run(saver) == expected
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        kept = connection.execute(
            "SELECT string_agg(encode(blob, 'escape') || type, ' ') FROM"
            " (SELECT blob, type FROM checkpoint_blobs WHERE type <> 'empty'"
            " UNION ALL SELECT blob, type FROM checkpoint_writes)"
        ).fetchone()[0]
        assert SUFFIX in kept
        assert not [word for word in WORDS if word in kept]
        connection.execute(
            "UPDATE checkpoint_blobs SET type = 'msgpack', blob = '\\xa466616b65'"
            " WHERE channel = 'seen'"
        )
    with PostgresSaver.from_conn_string(postgres_url) as saver:
        saver.serde = EncryptedSerializer(ring)
        with pytest.raises(SealError, match="must be sealed"):
            saver.get_tuple(CONFIG)


# --- threads ------------------------------------------------------------------------


def test_eight_threads_use_one_serializer(ring, monkeypatch):
    monkeypatch.setattr(serde, "_MOST_OPENED", 4)
    sealed = EncryptedSerializer(ring)
    others = [EncryptedSerializer(ring) for _ in range(12)]

    def work(number: int) -> None:
        for turn in range(300):
            value = [number, turn]
            assert sealed.loads_typed(others[turn % 12].dumps_typed(value)) == value
            assert sealed.loads_typed(sealed.dumps_typed(value)) == value

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(sealed._opened) <= 4 + 8
