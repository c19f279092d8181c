"""Several operating-system processes, that are killed and that fork."""

import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest

from langgraph_vat import HybridSaver

WORKER = """
import sys
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph_vat import HybridSaver

config = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
with HybridSaver.from_conn_string(sys.argv[1], redis=sys.argv[2], flush_every=4) as saver:
    print("ready", flush=True)
    for step in range(int(sys.argv[3])):
        latest = saver.get_tuple(config)
        checkpoint = {**empty_checkpoint(), "id": str(uuid6())}
        version = saver.get_next_version(None, None)
        checkpoint["channel_values"] = {"a": checkpoint["id"], "kept": "kept"}
        checkpoint["channel_versions"] = {"a": version, "kept": "1"}
        new = {"a": version} if latest else checkpoint["channel_versions"]
        at = saver.put(latest.config if latest else config, checkpoint, {"step": step}, new)
        saver.put_writes(at, [("a", step)], "task")
        print(checkpoint["id"], flush=True)
"""


def _start(postgres: str, redis: str, steps: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, postgres, redis, str(steps)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def _rest(process: subprocess.Popen) -> list[str]:
    """Return what it says until it ends; unlike `communicate`, with what was read ahead."""
    with process.stdout:
        said = process.stdout.read()
    process.wait(timeout=60)
    return said.splitlines(keepends=True)


def test_processes_on_one_thread_lose_nothing_even_when_one_is_killed(postgres_url, redis_url):
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    workers = [_start(postgres_url, redis_url, 60) for _ in range(3)]
    victim = _start(postgres_url, redis_url, 10_000)
    acknowledged = [victim.stdout.readline() for _ in range(20)]
    victim.send_signal(signal.SIGKILL)
    acknowledged += _rest(victim)
    for worker in workers:
        acknowledged += _rest(worker)
        assert worker.returncode == 0
    ids = {line.strip() for line in acknowledged if len(line.strip()) == 36}
    assert len(ids) >= 200
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url) as saver:
        found = {one.checkpoint["id"]: one for one in saver.list(config)}
        latest = saver.get_tuple(config)
    assert ids <= found.keys()
    assert len(found.keys() - ids) <= 1  # what the victim had put and could not say
    assert latest.checkpoint["id"] == max(found)
    for checkpoint_id, one in found.items():
        assert one.checkpoint["channel_values"] == {"a": checkpoint_id, "kept": "kept"}
        assert one.parent_config is None or _id(one.parent_config) in found
        assert len(one.pending_writes) == 1 or checkpoint_id not in ids


def _id(config: Any) -> str:
    return config["configurable"]["checkpoint_id"]


COUNTERS = """
import operator, os, sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, TypedDict
from langgraph.graph import START, StateGraph
from langgraph_vat import HybridSaver

class State(TypedDict):
    steps: Annotated[list[int], operator.add]

class Saver(HybridSaver):
    def put(self, config, checkpoint, metadata, new_versions):
        made = super().put(config, checkpoint, metadata, new_versions)
        place = config["configurable"]["thread_id"] + "|" + config["configurable"]["checkpoint_ns"]
        line = place + " " + checkpoint["id"] + "\\n"
        os.write(1, line.encode())  # in one piece, also when threads write
        return made

def graph_on(saver):
    step = lambda state: {"steps": [len(state["steps"])]}
    inner = StateGraph(State).add_node("deep", step).add_edge(START, "deep").compile()
    builder = StateGraph(State).add_node("one", step).add_node("inner", inner)
    builder.add_conditional_edges("one", lambda state: ["one", "inner"][len(state["steps"]) > 400])
    return builder.add_edge(START, "one").compile(checkpointer=saver)

if __name__ == "__main__":
    saver = Saver.from_conn_string(
        sys.argv[1], redis=sys.argv[2], flush_every=int(sys.argv[3]), flush_after=60
    )
    saver.setup()
    graph = graph_on(saver)
    def run(number):
        config = {"configurable": {"thread_id": f"t{number}"}, "recursion_limit": 1000}
        graph.invoke({"steps": []}, config)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
"""


@pytest.mark.parametrize("flush_every", [1, 4, 16])
def test_both_tiers_lost_cost_fewer_steps_than_flush_every(
    own_directory, own_redis, postgres_url, flush_every
):
    script = own_directory / "counters.py"
    script.write_text(COUNTERS)
    command = [sys.executable, script, postgres_url, own_redis.url, str(flush_every)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = [writer.stdout.readline() for _ in range(150)]
    writer.send_signal(signal.SIGKILL)
    own_redis.kill()
    said += _rest(writer)
    shutil.rmtree(own_redis._server._data)
    own_redis.start()
    acknowledged = defaultdict(set)
    for line in said:
        if line.endswith("\n"):
            place, checkpoint_id = line.split()
            thread, _, namespace = place.partition("|")
            acknowledged[thread].add((namespace, checkpoint_id))
    assert len(acknowledged) == 3

    made: dict[str, Any] = {"__name__": "counters"}
    exec(COUNTERS, made)
    with HybridSaver.from_conn_string(
        postgres_url, redis=own_redis.url, flush_after=0.1, epoch_ttl_s=0.1
    ) as saver:
        graph = made["graph_on"](saver)
        for thread, ids in acknowledged.items():
            config: Any = {"configurable": {"thread_id": thread}}
            found = {_place(one.config): one for one in saver.list(config)}
            lost = ids - found.keys()
            assert len(lost) <= flush_every - 1
            assert all(one[0] != ns or one < (ns, i) for one in found for ns, i in lost)
            for one in found.values():
                assert one.parent_config is None or _place(one.parent_config) in found
            steps = graph.get_state(config).values["steps"]
            assert steps == list(range(len(steps)))
            done = graph.invoke(None, {**config, "recursion_limit": 1000})["steps"]
            assert done[: len(steps)] == steps
            assert len(done) > 400


def _place(config: Any) -> tuple[str, str]:
    return config["configurable"]["checkpoint_ns"], _id(config)


FORKS = """
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from langgraph.graph import START, MessagesState, StateGraph
from langgraph_vat import HybridSaver, Keyring, SemanticStore

saver = HybridSaver.from_conn_string(
    sys.argv[1], redis=sys.argv[2], keyring=Keyring.generate(), flush_after=0.2
)
index = {"dims": 2, "embed": lambda texts: [[1.0, float(len(text))] for text in texts]}
store = SemanticStore.from_conn_string(sys.argv[1], index=index)
builder = StateGraph(MessagesState).add_node("reply", lambda _: {"messages": [("ai", "x")]})
graph = builder.add_edge(START, "reply").compile(checkpointer=saver)
saver.setup()
store.setup()

def talk(thread):
    config = {"configurable": {"thread_id": thread}}
    store.put(("t",), thread, {"n": 1})
    return len(graph.invoke({"messages": [("user", "x")]}, config)["messages"])

stop = threading.Event()
def busy():  # holds locks at the moment of a fork
    while not stop.is_set():
        talk("busy")
threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads:
    thread.start()
for child in range(6):
    before = talk("parent")
    pid = os.fork()
    if pid == 0:
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(talk, [f"a{child}", f"b{child}"])) == [2, 2]
        assert talk("parent") == before + 2
        saver.flush()
        os._exit(0)
    assert talk(f"own{child}") == 2
    assert os.waitpid(pid, 0)[1] == 0
    assert talk("parent") == before + 4
stop.set()
for thread in threads:
    thread.join()
saver.close()
store.close()
print("done")
"""


READING = """
import os, signal, threading
from langgraph_vat._hot import entries

class Slow(entries.Head):
    def __init__(self):
        self._generation, self._fields = "", {}

begun = threading.Event()
def slow(generation, fields):
    begun.set()
    threading.Event().wait()
entries._parse_blobs = slow
threading.Thread(target=lambda: Slow().blobs, daemon=True).start()
begun.wait()
entries._parse_blobs = lambda generation, fields: ("read",)
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    os._exit(Slow().blobs != ("read",))
print(os.waitpid(pid, 0)[1])
"""


def test_a_child_reads_though_a_thread_was_reading_when_it_was_forked():
    command = [sys.executable, "-c", READING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "0\n", done.stderr


def test_forked_children_share_nothing_with_their_parent(postgres_url, redis_url):
    warnings = ("-W", "error", "-W", "ignore::DeprecationWarning")  # of forking with threads
    command = [sys.executable, *warnings, "-c", FORKS, postgres_url, redis_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
