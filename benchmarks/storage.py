"""
``python -m benchmarks.storage``: what 500 turns of a conversation cost in Postgres.

Two graphs, each on PostgresSaver and on HybridSaver, sealed and not: a chat, whose
list of messages grows by 1.5 kB a turn, and a document of 200 kB of which a little
changes at each step. Sizes are those of all tables with their indexes; times are
of whole turns at the end, and of reading any of the states that were.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypedDict

import psycopg
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import START, MessagesState, StateGraph

from langgraph_vat import HybridSaver, Keyring
from langgraph_vat.embedded import EmbeddedServers

TURNS = int(os.environ.get("TURNS", "500"))
SIZE = """
SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND n.nspname = 'public'
"""
_dice = random.Random(7)
_WORDS = ["".join(_dice.choices("etaoinshrdlu", k=_dice.randint(2, 9))) for _ in range(5000)]


def text(size: int) -> str:
    """Return words, as people and models write them, and never the same."""
    found: list[str] = []
    while sum(map(len, found)) + len(found) < size:
        found.append(_dice.choice(_WORDS))
    return " ".join(found)[:size]


class Document(TypedDict):
    """One large value."""

    text: str


def _chat() -> Any:
    builder = StateGraph(MessagesState)
    builder.add_node("model", lambda _: {"messages": [AIMessage(text(1000))]})
    builder.add_edge(START, "model")
    return builder, lambda: {"messages": [HumanMessage(text(500))]}


def _edit(state: Document) -> Document:
    at = _dice.randrange(len(state["text"]))
    return {"text": state["text"][:at] + text(200) + state["text"][at + 200 :]}


def _document() -> Any:
    builder = StateGraph(Document)
    builder.add_node("edit", _edit)
    builder.add_edge(START, "edit")
    first = [{"text": text(200_000)}]
    return builder, lambda: first.pop() if first else {}


def _run(made: Any, saver: Any, url: str) -> dict[str, Any]:
    builder, turn = made
    graph = builder.compile(checkpointer=saver)
    config: Any = {"configurable": {"thread_id": "t"}}
    times, sizes = [], {}
    for number in range(1, TURNS + 1):
        begun = time.perf_counter()
        graph.invoke(turn(), config)
        times.append(time.perf_counter() - begun)
        if number in (TURNS // 5 - 20, TURNS // 5, TURNS - 20, TURNS):
            getattr(saver, "flush", lambda: None)()
            with psycopg.connect(url) as connection:
                sizes[number] = connection.execute(SIZE).fetchone()[0]
    ids = [found.config for found in list(graph.get_state_history(config))]
    _dice.shuffle(ids)
    reads = []
    for one in ids[:200]:
        begun = time.perf_counter()
        saver.get_tuple(one)
        reads.append(time.perf_counter() - begun)
    early, late = TURNS // 5, TURNS
    return {
        "MB": sizes[late] / 1e6,
        "kB/turn early": (sizes[early] - sizes[early - 20]) / 20e3,
        "kB/turn late": (sizes[late] - sizes[late - 20]) / 20e3,
        "ms/turn late": 1e3 * statistics.median(times[-20:]),
        "ms/read": 1e3 * statistics.median(reads),
    }


def main() -> None:
    """Start servers, measure, print."""
    with tempfile.TemporaryDirectory(prefix="vat-bench-") as path:
        Path(path).chmod(0o755)
        servers = EmbeddedServers.start(Path(path))
        try:
            _compare(servers)
        finally:
            servers.stop()


def _compare(servers: EmbeddedServers) -> None:
    for graph, make in (("chat", _chat), ("document", _document)):
        for name in ("PostgresSaver", "HybridSaver", "HybridSaver, sealed"):
            with psycopg.connect(servers.postgres, autocommit=True) as connection:
                connection.execute("DROP DATABASE IF EXISTS storage")
                connection.execute("CREATE DATABASE storage")
            url = servers.postgres.replace("/postgres?", "/storage?")
            if name == "PostgresSaver":
                with PostgresSaver.from_conn_string(url) as saver:
                    saver.setup()
                    found = _run(make(), saver, url)
            else:
                options: Any = {"key_prefix": f"{graph}{name[-1]}", "redis": servers.redis}
                if "sealed" in name:
                    options["keyring"] = Keyring.generate()
                with HybridSaver.from_conn_string(url, **options) as ours:
                    found = _run(make(), ours, url)
            columns = " ".join(f"{key} {value:8.2f}" for key, value in found.items())
            sys.stdout.write(f"{graph:9} {name:20} {columns}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
