"""
A process that runs real graphs and writes down what it was told.

Its only argument is an `Order` as JSON. Each line of the log is one operation
of the saver, written after it returned or raised; times are of the monotonic
clock, which all processes of a machine share.
"""

import asyncio
import faulthandler
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict

from tests.faults.order import Order

ORDER = Order(**json.loads(sys.argv[1]))
SKEW_NS = int(ORDER.skew_s * 1e9)
_real_time_ns = time.time_ns
time.time_ns = lambda: _real_time_ns() + SKEW_NS  # the clock of checkpoint ids

import operator  # noqa: E402

from langgraph.graph import START, StateGraph  # noqa: E402
from langgraph.types import Command, interrupt  # noqa: E402

from langgraph_vat import HybridSaver, ThreadDeletedError, VatError  # noqa: E402
from langgraph_vat._hot import bases  # noqa: E402
from tests.faults.checker import digest  # noqa: E402

# A cache that takes half an hour to fill looks like a leak.
bases._MOST = 2**21
TURNS = 8
LARGE = 0.15
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
        note = self._noting_put(config, checkpoint)
        made = super().put(config, checkpoint, metadata, new_versions)
        note()
        return made

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        note = self._noting_put(config, checkpoint)
        made = await super().aput(config, checkpoint, metadata, new_versions)
        note()
        return made

    def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        note = self._noting_writes(config, writes, task_id)
        super().put_writes(config, writes, task_id, task_path)
        note()

    async def aput_writes(
        self, config: Any, writes: Any, task_id: str, task_path: str = ""
    ) -> None:
        note = self._noting_writes(config, writes, task_id)
        await super().aput_writes(config, writes, task_id, task_path)
        note()

    def get_tuple(self, config: Any) -> Any:
        note = self._noting_get(config)
        found = super().get_tuple(config)
        note(found)
        return found

    async def aget_tuple(self, config: Any) -> Any:
        note = self._noting_get(config)
        found = await super().aget_tuple(config)
        note(found)
        return found

    def delete_thread(self, thread_id: str) -> None:
        with self._noting_delete(thread_id):
            super().delete_thread(thread_id)

    async def adelete_thread(self, thread_id: str) -> None:
        with self._noting_delete(thread_id):
            await super().adelete_thread(thread_id)

    def _noting(self, op: str, **what: Any) -> Any:
        return partial(self.recorder.note, op, time.monotonic_ns(), **what)

    def _noting_put(self, config: Any, checkpoint: Any) -> Any:
        values = digest(checkpoint["channel_values"])
        return self._noting("put", **_where(config), id=checkpoint["id"], values=values)

    def _noting_writes(self, config: Any, writes: Any, task_id: str) -> Any:
        channels = sorted({channel for channel, _ in writes})
        found = config["configurable"]["checkpoint_id"]
        return self._noting("writes", **_where(config), id=found, task=task_id, channels=channels)

    def _noting_get(self, config: Any) -> Any:
        if config["configurable"].get("checkpoint_id"):
            return lambda _: None
        note = self._noting("get", **_where(config))
        return lambda found: note(id=found.checkpoint["id"] if found else None)

    @contextmanager
    def _noting_delete(self, thread_id: str) -> Iterator[None]:
        start, outcome = time.monotonic_ns(), "unknown"
        note = partial(self.recorder.note, start=start, thread=thread_id, id=str(uuid.uuid4()))
        note("deleting")  # this process may be killed meanwhile
        try:
            yield
            outcome = "done"
        finally:
            note("delete", outcome=outcome)


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
        return {"log": [str(state.get("size", 0)) * (state.get("size", 0) // 4)]}

    def ask(state: State) -> Any:
        return {"log": [interrupt("?")] if state.get("size", 1) % 3 == 0 else []}

    def last(state: State) -> Any:
        return {"log": [state.get("thread", "")]}

    inner = StateGraph(State).add_node("inside", last).add_edge(START, "inside").compile()
    builder = StateGraph(State).add_node(first).add_node(ask).add_node("nested", inner)
    builder.add_edge(START, "first").add_edge("first", "ask").add_edge("ask", "nested")
    return builder.compile(checkpointer=saver)


def _size(rng: random.Random) -> int:
    # A log with something large in it travels as a patch from then on.
    return rng.randrange(16_000, 40_000) if rng.random() < LARGE else rng.randrange(300)


async def _turn(face: Any, saver: Saver, rng: random.Random, thread: str) -> None:
    config: Any = {"configurable": {"thread_id": thread}}
    start = time.monotonic_ns()
    try:
        if rng.random() < 0.04:
            await face.delete_thread(thread)
            return
        state = {"thread": thread, "log": [], "size": _size(rng)}
        done = await face.invoke(state, config, rng.choice(["sync", "async"]))
        if "__interrupt__" in done:
            await face.invoke(Command(resume="yes"), config, None)
        if done.get("thread", thread) != thread:
            saver.recorder.note("foreign", start, thread=thread)
    except ThreadDeletedError:
        saver.recorder.note("refused", start, thread=thread)
    except VatError as error:
        saver.recorder.note("error", start, thread=thread, kind=type(error).__name__)
        await asyncio.sleep(0.05)
    except Exception as error:
        said = f"{type(error).__module__}.{type(error).__name__}: {error}"[:300]
        saver.recorder.note("crash", start, thread=thread, kind=said)


class Blocking:
    """The blocking calls of graph and saver."""

    def __init__(self, graph: Any, saver: Saver) -> None:
        self._graph, self._saver = graph, saver

    async def invoke(self, what: Any, config: Any, durability: Any) -> Any:
        return self._graph.invoke(what, config, durability=durability)

    async def delete_thread(self, thread: str) -> None:
        self._saver.delete_thread(thread)


class Asyncio(Blocking):
    """Those for an event loop."""

    async def invoke(self, what: Any, config: Any, durability: Any) -> Any:
        return await self._graph.ainvoke(what, config, durability=durability)

    async def delete_thread(self, thread: str) -> None:
        await self._saver.adelete_thread(thread)


async def _talk(face: Any, saver: Saver, seed: str, stop: threading.Event) -> None:
    rng = random.Random(seed)
    for number in itertools.count():
        own = f"{ORDER.name}-{seed}-{number}"
        is_brief = number % 4 == 0  # so that the shortest of runs deletes some
        for _ in range(2 if is_brief else TURNS):
            if stop.is_set():
                return
            shared = f"shared-{rng.randrange(SHARED)}-{int(time.monotonic()) // 20}"
            await _turn(face, saver, rng, shared if rng.random() < 0.2 else own)
        if is_brief or not ORDER.keeps:
            with suppress(VatError):
                await face.delete_thread(own)


def _talker(saver: Saver, number: int, stop: threading.Event) -> threading.Thread:
    """Return a thread that blocks, or, every third, one with an event loop."""
    kind = Asyncio if number % 3 == 2 else Blocking
    face, seed = kind(_graph(saver), saver), f"{ORDER.seed}.{number}"
    return threading.Thread(target=lambda: asyncio.run(_talk(face, saver, seed, stop)))


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


def _end(saver: Saver) -> None:
    """Close, and say what is left behind."""
    saver.close()
    links = (str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())
    sockets = sum(link.startswith("socket:") for link in links)
    names = [thread.name for thread in threading.enumerate()]
    saver.recorder.note("end", time.monotonic_ns(), sockets=sockets, threads=names)


def main() -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # says where it hangs
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    saver = Saver.from_conn_string(ORDER.postgres, redis=ORDER.redis, **ORDER.settings)
    saver.recorder = Recorder(ORDER.log, ORDER.name)
    while not stop.is_set():
        try:
            saver.setup()
            break
        except VatError:
            time.sleep(0.05)
    tell = threading.Thread(
        target=_tell_oldest, args=(saver, f"{ORDER.log}.oldest"), name="tell", daemon=True
    )
    tell.start()
    talkers = [_talker(saver, number, stop) for number in range(ORDER.talkers)]
    for talker in talkers:
        talker.start()
    for talker in talkers:
        while talker.is_alive():
            talker.join(0.2)  # not for ever: signals are for this thread
    _end(saver)


if __name__ == "__main__":
    main()
