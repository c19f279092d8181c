"""
With a keyring, nothing that a user typed is readable in what the servers keep.

A marker goes in by every door there is; then every byte of Postgres's data
directory (WAL included) and of Redis's files is searched for it, as text and
in the encodings in which text hides. Unsealed, the same search finds it.
"""

import base64
import logging
import operator
import traceback
from pathlib import Path
from typing import Annotated, Any, TypedDict

import psycopg
import pytest
import redis
from langchain_core.messages import HumanMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, Send, interrupt

from langgraph_vat import Keyring, SealError, Vat

DOORS = (
    "message", "channel", "metadata", "configurable", "interrupt", "resume", "send", "exception",
    "store-value", "store-field", "update-state", "write",
)  # fmt: skip


def marker(door: str) -> str:
    return f"MARKER-{door}-7f3a91c4"


class State(MessagesState):
    text: str
    seen: Annotated[list[str], operator.add]


class Task(TypedDict):
    word: str


def _graph(vat: Vat) -> Any:
    def split(state: State) -> Any:
        return Command(
            goto=[Send("work", {"word": marker("send")})], update={"text": marker("channel")}
        )

    def work(task: Task) -> Any:
        return {"seen": [marker("write")]}

    def ask(state: State) -> Any:
        return {"seen": [interrupt(marker("interrupt"))]}

    def remember(state: State) -> Any:
        vat.store.put(
            ("who",), "k", {"field": {marker("store-field"): 1}, "note": marker("store-value")}
        )
        return {}

    def fail(state: State) -> Any:
        raise ValueError(marker("exception"))

    builder = StateGraph(State)
    for node in (split, work, ask, remember, fail):
        builder.add_node(node)
    builder.add_edge(START, "split")
    builder.add_edge("work", "ask")
    builder.add_edge("ask", "remember")
    builder.add_edge("remember", "fail")
    builder.add_edge("fail", END)
    return builder.compile(checkpointer=vat.checkpointer, store=vat.store)


def _use_every_door(vat: Vat) -> None:
    graph = _graph(vat)
    config: Any = {
        "configurable": {"thread_id": "thread-in-the-clear", "note": marker("configurable")},
        "metadata": {"note2": marker("metadata")},
    }
    graph.invoke({"messages": [HumanMessage(marker("message"))], "text": "", "seen": []}, config)
    with pytest.raises(ValueError, match="MARKER"):
        graph.invoke(Command(resume=marker("resume")), config)
    graph.update_state(config, {"text": marker("update-state")})
    state = graph.get_state(config).values
    assert marker("resume") in state["seen"]
    assert state["messages"][0].content == marker("message")


def _bytes_on_disk(path: Path, vat: Vat) -> bytes:
    with psycopg.connect(vat.postgres, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
        connection.execute("SELECT pg_switch_wal()")
        connection.execute("CHECKPOINT")
    with redis.Redis.from_url(vat.redis) as client:
        # The file holds every command as it was sent; only a rewrite would compress it.
        assert client.info("persistence")["aof_enabled"]
    files = [file for file in path.rglob("*") if file.is_file()]
    return b"".join(file.read_bytes() for file in files)


def _files(path: Path, directory: str) -> bytes:
    return b"".join(
        file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and any(directory in part for part in file.relative_to(path).parts)
    )


def _found(haystack: bytes) -> set[str]:
    found = set()
    for door in DOORS:
        raw = marker(door).encode()
        forms = (
            raw,
            marker(door).encode("utf-16-le"),
            marker(door).encode("utf-16-be"),
            raw.hex().encode(),
            raw.hex().upper().encode(),
            *(base64.b64encode(b"x" * pad + raw)[4:-4] for pad in range(3)),
        )
        if any(form in haystack for form in forms):
            found.add(door)
    return found


@pytest.mark.parametrize("is_sealed", [True, False], ids=["sealed", "unsealed"])
def test_markers_are_nowhere_in_the_clear(own_directory, caplog, is_sealed):
    caplog.set_level(logging.DEBUG)
    keyring = Keyring.generate() if is_sealed else None
    path = own_directory / "v"
    haystack = b""
    found_by = {"filterable_metadata": ("note", "note2"), "filterable_fields": ("note",)}
    with Vat.embedded(path, keyring=keyring, flush_every=3, flush_after=60.0, **found_by) as vat:
        _use_every_door(vat)
        note = {"note": marker("store-value")}
        assert [one.key for one in vat.store.search(("who",), filter=note)] == ["k"]
        noted = vat.checkpointer.list(None, filter={"note2": marker("metadata")})
        assert len(list(noted)) > 1
        haystack += _bytes_on_disk(path, vat)
        if not is_sealed:
            # Either server's files alone give it away: both are really searched.
            assert _found(_files(path, "appendonly")) >= {"message", "channel", "interrupt", "send"}
            assert _found(_files(path, "pg_wal")) >= set(DOORS) - {"update-state"}
    haystack += b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert b"thread-in-the-clear" in haystack  # the search does find things
    if is_sealed:
        assert _found(haystack) == set()
        assert "MARKER" not in caplog.text
    else:
        assert _found(haystack) == set(DOORS)


def test_a_refusal_repeats_nothing_that_was_typed(postgres_url, caplog):
    caplog.set_level(logging.DEBUG)
    keyring = Keyring.generate()
    with Vat.connect(postgres_url, keyring=keyring) as vat:
        _use_every_door(vat)
    with psycopg.connect(postgres_url) as connection:
        for table, column in (("checkpoint_blobs", "blob"), ("store", "vat_value")):
            connection.execute(f"UPDATE {table} SET {column} = {column} || '\\x00'")
    caplog.clear()
    config: Any = {"configurable": {"thread_id": "thread-in-the-clear"}}
    with Vat.connect(postgres_url, keyring=keyring) as vat:
        refused = [_error(lambda: vat.checkpointer.get_tuple(config))]
        refused += [_error(lambda: vat.store.get(("who",), "k"))]
        refused += [_error(lambda: vat.store.search(("who",)))]
    with Vat.connect(postgres_url) as vat:
        refused += [_error(lambda: vat.checkpointer.get_tuple(config))]
        refused += [_error(lambda: vat.store.get(("who",), "k"))]
    assert all(isinstance(error, SealError) for error in refused)
    shown = "".join(line for error in refused for line in traceback.format_exception(error))
    assert "MARKER" not in shown + caplog.text


def _error(operation: Any) -> BaseException:
    with pytest.raises(SealError) as raised:
        operation()
    return raised.value
