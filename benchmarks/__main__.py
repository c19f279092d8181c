"""
``make bench``: microseconds per super-step of a real graph, saver beside saver.

Ten super-steps, three channels, ``durability="sync"``, at 1 and 32 concurrent
threads, on one Postgres (fsync on) and one Redis. The savers take turns, round
by round; each figure is the median of its rounds. Ratios within a run are what
counts: absolute times are the machine's.
"""

import asyncio
import operator
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Annotated, Any, TypedDict

import psycopg
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.graph import START, StateGraph
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from langgraph_vat import HybridSaver, Keyring
from langgraph_vat.embedded import EmbeddedServers

ROUNDS = 5
STEPS = 10
PEER = "AsyncPostgresSaver"


class State(TypedDict):
    """Three channels: one that grows, one that is replaced, one that counts."""

    log: Annotated[list[str], operator.add]
    text: str
    n: int


def _step(state: State) -> dict[str, Any]:
    return {"log": ["x" * 100], "text": "y" * 50, "n": state["n"] + 1}


def _builder() -> StateGraph[Any]:
    builder: StateGraph[Any] = StateGraph(State)
    for number in range(STEPS):
        builder.add_node(f"n{number}", _step)
        builder.add_edge(START if number == 0 else f"n{number - 1}", f"n{number}")
    return builder


async def _round(saver: Any, threads: int) -> float:
    graph = _builder().compile(checkpointer=saver)

    async def run() -> None:
        config: Any = {"configurable": {"thread_id": str(uuid.uuid4())}}
        await graph.ainvoke({"log": [], "text": "", "n": 0}, config, durability="sync")

    begun = time.perf_counter()
    await asyncio.gather(*(run() for _ in range(threads)))
    return (time.perf_counter() - begun) / threads / STEPS * 1e6


async def _measure(savers: dict[str, Any], threads: int) -> dict[str, float]:
    rounds: dict[str, list[float]] = {name: [] for name in savers}
    for number in range(ROUNDS + 1):
        for name, saver in savers.items():
            took = await _round(saver, threads)
            if number:  # the first round warms up
                rounds[name].append(took)
    return {name: statistics.median(times) for name, times in rounds.items()}


async def _compare(servers: EmbeddedServers) -> None:
    with psycopg.connect(servers.postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE peer")
    peer_url = servers.postgres.replace("/postgres?", "/peer?")
    kwargs = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    async with AsyncConnectionPool(peer_url, max_size=16, kwargs=kwargs) as pool:
        peer: Any = AsyncPostgresSaver(pool)  # type: ignore[arg-type]
        await peer.setup()
        options: Any = {"redis": servers.redis}
        ours = {
            "HybridSaver, flush_every=8": HybridSaver.from_conn_string(servers.postgres, **options),
            "HybridSaver, flush_every=8, sealed": HybridSaver.from_conn_string(
                servers.postgres, keyring=Keyring.generate(), **options
            ),
            "HybridSaver, flush_every=1": HybridSaver.from_conn_string(
                servers.postgres, flush_every=1, **options
            ),
        }
        for saver in ours.values():
            await saver.asetup()
        savers = {"InMemorySaver": InMemorySaver(), PEER: peer, **ours}
        results = [await _measure(savers, threads) for threads in (1, 32)]
        for saver in ours.values():
            await saver.aclose()
    print("| saver | 1 thread | 32 threads | steps/s against AsyncPostgresSaver |")
    print("| --- | --- | --- | --- |")
    for name in savers:
        times = [result[name] for result in results]
        ratios = [result[PEER] / result[name] for result in results]
        print(f"| {name} | {times[0]:.0f} | {times[1]:.0f} | {ratios[0]:.2f}, {ratios[1]:.2f} |")


def main() -> None:
    """Start servers, measure, print."""
    with tempfile.TemporaryDirectory(prefix="vat-bench-") as path:
        Path(path).chmod(0o755)
        with EmbeddedServers.start(path) as servers:
            asyncio.run(_compare(servers))


if __name__ == "__main__":
    main()
