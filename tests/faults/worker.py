"""
A process that runs real graphs and writes down what it was told.

Arguments: log file, name, Postgres, Redis, flush_every, seed, clock skew in seconds.
Each line of the log is one operation of the saver, written after it returned or
raised; times are of the monotonic clock, which all processes of a machine share.
"""

import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, TypedDict

SKEW_NS = int(float(sys.argv[7]) * 1e9)
_real_time_ns = time.time_ns
time.time_ns = lambda: _real_time_ns() + SKEW_NS  # the clock of checkpoint ids

import operator  # noqa: E402

from langgraph.graph import START, StateGraph  # noqa: E402
from langgraph.types import Command, interrupt  # noqa: E402

from langgraph_vat import HybridSaver, ThreadDeletedError, VatError  # noqa: E402
from tests.faults.checker import digest  # noqa: E402

SETTINGS: Any = {"flush_after": 0.4, "epoch_ttl_s": 0.2, "timeout_s": 1.0, "pool_size": 8}
TURNS = 8
SHARED = 4


class Recorder:
    def __init__(self, path: str, name: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._name = name

    def note(self, op: str, start: int, **what: Any) -> None:
        end = time.monotonic_ns()
        line = {"op": op, "who": self._name, "start": start, "end": end, **what}
        os.write(self._file, (json.dumps(line) + "\n").encode())


class Saver(HybridSaver):
    """Notes what was acknowledged, and what was read."""

    recorder: Recorder

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        start = time.monotonic_ns()
        where = _where(config)
        values = digest(checkpoint["channel_values"])
        made = super().put(config, checkpoint, metadata, new_versions)
        self.recorder.note("put", start, **where, id=checkpoint["id"], values=values)
        return made

    def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        start = time.monotonic_ns()
        super().put_writes(config, writes, task_id, task_path)
        channels = sorted({channel for channel, _ in writes})
        found = config["configurable"]["checkpoint_id"]
        self.recorder.note(
            "writes", start, **_where(config), id=found, task=task_id, channels=channels
        )

    def get_tuple(self, config: Any) -> Any:
        start = time.monotonic_ns()
        found = super().get_tuple(config)
        if not config["configurable"].get("checkpoint_id"):
            newest = found.checkpoint["id"] if found else None
            self.recorder.note("get", start, **_where(config), id=newest)
        return found

    def delete_thread(self, thread_id: str) -> None:
        start = time.monotonic_ns()
        outcome = "unknown"
        try:
            super().delete_thread(thread_id)
            outcome = "done"
        finally:
            self.recorder.note("delete", start, thread=thread_id, outcome=outcome)


def _where(config: Any) -> dict[str, str]:
    found = config["configurable"]
    return {"thread": found["thread_id"], "ns": found.get("checkpoint_ns", "")}


class State(TypedDict):
    thread: str
    log: Annotated[list[str], operator.add]
    size: int


def _graph(saver: Saver) -> Any:
    # A thread that another worker deletes before it is resumed begins without values.
    def first(state: State) -> Any:
        return {"log": ["x" * state.get("size", 0)]}

    def ask(state: State) -> Any:
        return {"log": [interrupt("?")] if state.get("size", 1) % 3 == 0 else []}

    def last(state: State) -> Any:
        return {"log": [state.get("thread", "")]}

    inner = StateGraph(State).add_node("inside", last).add_edge(START, "inside").compile()
    builder = StateGraph(State).add_node(first).add_node(ask).add_node("nested", inner)
    builder.add_edge(START, "first").add_edge("first", "ask").add_edge("ask", "nested")
    return builder.compile(checkpointer=saver)


def _turn(graph: Any, saver: Saver, rng: random.Random, thread: str) -> None:
    config: Any = {"configurable": {"thread_id": thread}}
    start = time.monotonic_ns()
    try:
        if rng.random() < 0.04:
            saver.delete_thread(thread)
            return
        state = {"thread": thread, "log": [], "size": rng.randrange(300)}
        done = graph.invoke(state, config, durability=rng.choice(["sync", "async"]))
        if "__interrupt__" in done:
            graph.invoke(Command(resume="yes"), config)
        if done.get("thread", thread) != thread:
            saver.recorder.note("foreign", start, thread=thread)
    except ThreadDeletedError:
        saver.recorder.note("refused", start, thread=thread)
    except VatError as error:
        saver.recorder.note("error", start, thread=thread, kind=type(error).__name__)
        time.sleep(0.05)
    except Exception as error:
        said = f"{type(error).__module__}.{type(error).__name__}: {error}"[:300]
        saver.recorder.note("crash", start, thread=thread, kind=said)


def _talk(saver: Saver, name: str, seed: str, stop: threading.Event) -> None:
    rng, graph, number = random.Random(seed), _graph(saver), 0
    while not stop.is_set():
        number += 1
        own = f"{name}-{seed}-{number}"
        for _ in range(TURNS):
            shared = f"shared-{rng.randrange(SHARED)}-{int(time.monotonic()) // 20}"
            _turn(graph, saver, rng, shared if rng.random() < 0.2 else own)
            if stop.is_set():
                return


def _tell_oldest(saver: Saver, path: str) -> None:
    """Say again and again until when this process has confirmed everything."""
    while True:
        with saver._shared.copies._lock:
            kept = [next(iter(c.values()))[0] for c in saver._shared.copies._threads.values()]
            oldest = min(kept, default=time.monotonic())
        fresh = Path(f"{path}.new")
        fresh.write_text(str(oldest))
        fresh.replace(path)
        time.sleep(0.02)


def main() -> None:
    log, name, postgres, redis, flush_every, seed, _ = sys.argv[1:]
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # says where it hangs
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    saver = Saver.from_conn_string(postgres, redis=redis, flush_every=int(flush_every), **SETTINGS)
    saver.recorder = Recorder(log, name)
    while not stop.is_set():
        try:
            saver.setup()
            break
        except VatError:
            time.sleep(0.05)
    threading.Thread(target=_tell_oldest, args=(saver, f"{log}.oldest"), daemon=True).start()
    talkers = [
        threading.Thread(target=_talk, args=(saver, name, f"{seed}.{i}", stop)) for i in range(3)
    ]
    for talker in talkers:
        talker.start()
    for talker in talkers:
        while talker.is_alive():
            talker.join(0.2)  # not for ever: signals are for this thread
    saver.close()


if __name__ == "__main__":
    main()
