"""
With a keyring, nothing that a user typed is readable in what the servers keep.

A marker goes in by every door there is; then every byte of Postgres's data
directory (WAL included) and of Redis's files is searched for it, as text and
in the encodings in which text hides. Unsealed, the same search finds it.
"""

import base64
import logging
import operator
import time
from pathlib import Path
from typing import Annotated, Any, TypedDict

import psycopg
import pytest
import redis
from langchain_core.messages import HumanMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, Send, interrupt

from langgraph_vat import Keyring, Vat

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
        keys = client.keys("*")
        alive = b"".join(client.dump(key) or b"" for key in keys)
        client.bgrewriteaof()
        while client.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.05)
    # Redis compresses nothing in its append-only file but the rewritten preamble.
    files = [file for file in path.rglob("*") if file.is_file()]
    return alive + b"".join(file.read_bytes() for file in files)


def _found(haystack: bytes) -> set[str]:
    found = set()
    for door in DOORS:
        raw = marker(door).encode()
        forms = (
            raw,
            marker(door).encode("utf-16-le"),
            raw.hex().encode(),
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
    with Vat.embedded(path, keyring=keyring, flush_every=3, flush_after=60.0) as vat:
        _use_every_door(vat)
        haystack += _bytes_on_disk(path, vat)
    haystack += b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert b"thread-in-the-clear" in haystack  # the search does find things
    if is_sealed:
        assert _found(haystack) == set()
        assert "MARKER" not in caplog.text
    else:
        assert _found(haystack) == set(DOORS)
