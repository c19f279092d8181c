"""
The same calls to HybridSaver and to LangGraph's InMemorySaver get the same answers.

    HYPOTHESIS_PROFILE=long python -m pytest tests/test_saver_model.py

runs 2,000 examples instead of the few of every day. Where InMemorySaver is
itself wrong (the order of `list` across namespaces) or silent (prune, copy),
the model below says what is right.
"""

import itertools
import math
import random
from typing import Any

import pytest
import redis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver

from langgraph_vat import HybridSaver, Keyring
from langgraph_vat._durable import packing
from langgraph_vat._ops import patches

THREADS = ("one", "two:{x}%*")
NAMESPACES = ("", "sub:1", "sub")
CHANNELS = ("a", "b", "messages", "c:|")
# Kept as patches of one another.
LONG = " ".join(f"word {n}" for n in range(150))
VALUES = (
    0, -1, 2**62, 1.5, math.inf, True, None, "", "text", "nul \0", "🦊", b"", b"\0\xff",
    [], [1, [2]], {"k": {"deep": [None]}}, HumanMessage("hi", id="m1"),
    LONG, f"{LONG} and more", f"{LONG[:700]} not {LONG[700:]}", [LONG, LONG[::-1]], LONG[::-1],
)  # fmt: skip
SPECIAL = ("__interrupt__", "__error__", "__resume__")
_runs = itertools.count()


class Model(RuleBasedStateMachine):
    """Drives both savers."""

    saver: HybridSaver
    redis_url: str | None

    def __init__(self) -> None:
        super().__init__()
        self.name = f"r{next(_runs)}-"
        self.oracle = InMemorySaver()
        # Per thread and namespace: (checkpoint id, versions, values) of what is there.
        self.known: dict[tuple[str, str], list[tuple[str, dict[str, str], dict[str, Any]]]] = {}
        self.stashed = [str(uuid6()) for _ in range(2)]
        self.copies = itertools.count()

    # --- writes ----------------------------------------------------------

    @rule(
        thread=st.sampled_from(THREADS),
        ns=st.sampled_from(NAMESPACES),
        back=st.integers(0, 3),
        changed=st.sets(st.sampled_from(CHANNELS), max_size=3),
        values=st.lists(st.sampled_from(VALUES), min_size=4, max_size=4),
        emptied=st.booleans(),
        step=st.integers(-1, 3),
        is_old=st.integers(0, 5),
        early=st.booleans(),
    )
    def put(self, thread, ns, back, changed, values, emptied, step, is_old, early):
        thread = self.name + thread
        there = self.known.setdefault((thread, ns), [])
        parent = there[-1 - back] if len(there) > back else None
        parent_id, versions, kept = parent or (None, {}, {})
        new = {c: self.saver.get_next_version(versions.get(c), None) for c in sorted(changed)}
        held = {**kept, **dict(zip(sorted(changed), values, strict=False))}
        if emptied and changed:
            held.pop(min(changed))
        checkpoint_id = self.stashed.pop() if is_old == 0 and self.stashed else str(uuid6())
        checkpoint = {
            "v": 4,
            "id": checkpoint_id,
            "ts": "2026-01-01T00:00:00+00:00",
            "channel_values": held,
            "channel_versions": {**versions, **new},
            "versions_seen": {"node": dict(versions)},
            "updated_channels": sorted(changed),
        }
        config = self._config(thread, ns, parent_id)
        metadata = {"source": "loop", "step": step, "parents": {}, "tag": values[0]}
        if early:
            ahead = self._config(thread, ns, checkpoint_id)
            if parent_id is not None or self._exists(thread):
                self._both("put_writes", ahead, [("a", "early")], "early-task", "~0")
        self._both("put", config, checkpoint, metadata, new)
        there.append((checkpoint_id, checkpoint["channel_versions"], held))

    @precondition(lambda self: any(self.known.values()))
    @rule(
        data=st.data(),
        task=st.sampled_from(("t1", "t2")),
        path=st.sampled_from(("", "~1", "~2")),
        writes=st.lists(
            st.tuples(st.sampled_from((*CHANNELS, *SPECIAL)), st.sampled_from(VALUES)), max_size=3
        ),
    )
    def put_writes(self, data, task, path, writes):
        thread, ns, checkpoint_id = data.draw(st.sampled_from(self._all()))
        self._both("put_writes", self._config(thread, ns, checkpoint_id), writes, task, path)

    # --- retention -------------------------------------------------------

    @rule(thread=st.sampled_from(THREADS))
    def delete_thread(self, thread):
        self._both("delete_thread", self.name + thread)
        self._forget(self.name + thread)

    @rule(thread=st.sampled_from(THREADS), strategy=st.sampled_from(("keep_latest", "delete")))
    def prune(self, thread, strategy):
        thread = self.name + thread
        self.saver.prune([thread], strategy=strategy)
        if strategy == "delete":
            self.oracle.delete_thread(thread)
            self._forget(thread)
            return
        for ns, stored in self.oracle.storage.get(thread, {}).items():
            if not stored:
                continue
            newest = max(stored)
            for gone in [i for i in stored if i != newest]:
                del stored[gone]
                self.oracle.writes.pop((thread, ns, gone), None)
            checkpoint, metadata, parent = stored[newest]
            stored[newest] = (checkpoint, metadata, parent if parent in stored else None)
            there = self.known.get((thread, ns), [])
            there[:] = [entry for entry in there if entry[0] == newest]

    @precondition(lambda self: any(self.known.values()))
    @rule(data=st.data())
    def copy_thread(self, data):
        source = data.draw(st.sampled_from(self._all()))[0]
        target = f"{self.name}copy{next(self.copies)}"
        self.saver.copy_thread(source, target)
        for ns, stored in list(self.oracle.storage[source].items()):
            self.oracle.storage[target][ns].update(stored)
            self.known[target, ns] = list(self.known.get((source, ns), []))
        for kept in (self.oracle.writes, self.oracle.blobs):
            for key, value in list(kept.items()):
                if key[0] == source:
                    kept[(target, *key[1:])] = value.copy() if isinstance(value, dict) else value

    # --- what must not be noticed ------------------------------------------

    @rule()
    def flush(self):
        self.saver.flush()

    @rule(seed=st.integers(0, 2**16), share=st.sampled_from((0.3, 1.0)))
    def evict(self, seed, share):
        if self.redis_url is None:
            return
        chosen = random.Random(seed)
        with redis.Redis.from_url(self.redis_url) as client:
            for key in sorted(client.keys("{vat:*}:[hm]:*")):
                if chosen.random() < share:
                    client.delete(key)

    # --- reads -----------------------------------------------------------

    @rule(thread=st.sampled_from(THREADS), ns=st.sampled_from(NAMESPACES))
    def get_latest(self, thread, ns):
        self._compare_one(self._config(self.name + thread, ns, None))

    @precondition(lambda self: any(self.known.values()))
    @rule(data=st.data())
    def get_one(self, data):
        self._compare_one(self._config(*data.draw(st.sampled_from(self._all()))))

    @rule(
        data=st.data(),
        thread=st.sampled_from(THREADS),
        ns=st.sampled_from((*NAMESPACES, None)),
        step=st.sampled_from((None, None, 0, 1)),
        tag=st.sampled_from(("-", "-", *VALUES)),
        limit=st.sampled_from((None, 0, 1, 2)),
    )
    def list_some(self, data, thread, ns, step, tag, limit):
        config: Any = {"configurable": {"thread_id": self.name + thread}}
        if ns is not None:
            config["configurable"]["checkpoint_ns"] = ns
        filters = {k: v for k, v in (("step", step), ("tag", tag)) if v is not None and v != "-"}
        everything = self._all()
        before = data.draw(st.sampled_from([None, *everything]))
        options: Any = {"filter": filters, "before": self._config(*before) if before else None}
        expected = sorted(
            map(_normal, self.oracle.list(config, **options)),
            key=lambda found: (found["id"], found["ns"]),
            reverse=True,
        )
        if "tag" in filters:
            expected = [e for e in expected if _same_kind(e["metadata"].get("tag"), filters["tag"])]
        actual = [_normal(found) for found in self.saver.list(config, limit=limit, **options)]
        assert actual == expected[:limit]

    def teardown(self) -> None:
        for thread, ns in self.known:
            self._compare_one(self._config(thread, ns, None))

    # --- helpers ---------------------------------------------------------

    def _both(self, name: str, *args: Any) -> None:
        getattr(self.saver, name)(*args)
        getattr(self.oracle, name)(*args)

    def _compare_one(self, config: Any) -> None:
        actual, expected = self.saver.get_tuple(config), self.oracle.get_tuple(config)
        assert (actual and _normal(actual)) == (expected and _normal(expected))

    def _all(self) -> list[tuple[str, str, str]]:
        return [(*place, entry[0]) for place, there in self.known.items() for entry in there]

    def _exists(self, thread: str) -> bool:
        return any(there for (name, _), there in self.known.items() if name == thread)

    def _forget(self, thread: str) -> None:
        for place in [place for place in self.known if place[0] == thread]:
            del self.known[place]

    @staticmethod
    def _config(thread: str, ns: str, checkpoint_id: str | None) -> Any:
        found = {"thread_id": thread, "checkpoint_ns": ns}
        return {"configurable": found | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


def _same_kind(one: Any, other: Any) -> bool:
    """JSON's equality: True is not 1."""
    return isinstance(one, bool) == isinstance(other, bool)


def _normal(found: Any) -> dict[str, Any]:
    config, parent = found.config["configurable"], found.parent_config
    return {
        "thread": config["thread_id"],
        "ns": config.get("checkpoint_ns", ""),
        "id": found.checkpoint["id"],
        "parent": parent["configurable"]["checkpoint_id"] if parent else None,
        "checkpoint": found.checkpoint,
        "metadata": found.metadata,
        "writes": found.pending_writes,
    }


@pytest.mark.parametrize(
    ("is_hot", "is_sealed", "flush_every"),
    [(True, False, 3), (True, True, 8), (True, False, 1), (False, False, 1)],
    ids=["hot", "hot-sealed", "hot-every-step", "durable"],
)
@pytest.mark.timeout(3_600)
def test_answers_are_those_of_in_memory_saver(
    postgres_url, redis_url, is_hot, is_sealed, flush_every, monkeypatch
):
    monkeypatch.setattr(packing, "_LONGEST", 6)  # or no example is long enough to begin anew
    monkeypatch.setattr(packing, "_FEW", 1)  # or none is large enough to be sent as a patch
    monkeypatch.setattr(patches, "_LEAST", 500)
    url = redis_url if is_hot else None
    keyring = Keyring.generate() if is_sealed else None
    options = {"redis": url, "keyring": keyring, "flush_every": flush_every, "flush_after": 30.0}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        machine = type("Machine", (Model,), {"saver": saver, "redis_url": url})
        run_state_machine_as_test(machine)
