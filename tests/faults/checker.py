"""Compares what callers were told with what is there in the end."""

import hashlib
import json
import sys
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Window = tuple[int, int]


def digest(values: dict[str, Any]) -> str:
    """Return what tells a checkpoint's values from others."""
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:16]


def read_logs(paths: Iterable[Path]) -> list[Record]:
    """Return all whole lines; a killed worker may have left half of one."""
    records = []
    for path in paths:
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                records.append(json.loads(line))
    return sorted(records, key=lambda record: record["end"])


class Checker:
    """
    Knows every acknowledgement, and finds what contradicts one.

    Args:
        records: What the workers noted.
        uncertain: Times in which an older checkpoint may be read as the
            newest: after Redis failed, for as long as writers take to notice.
    """

    def __init__(self, records: list[Record], uncertain: Sequence[Window] = ()) -> None:
        self._of: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            self._of[record["op"]].append(record)
        self._uncertain = uncertain
        self._deletes: dict[str, list[Record]] = defaultdict(list)
        for record in (*self._of["delete"], *self._unfinished()):
            self._deletes[record["thread"]].append(record)

    def _unfinished(self) -> Iterable[Record]:
        """Return the deletes whose worker was killed before it could note how they went."""
        done = {(record["who"], record["id"]) for record in self._of["delete"]}
        for record in self._of["deleting"]:
            if (record["who"], record["id"]) not in done:
                yield {**record, "outcome": "unknown", "end": sys.maxsize}

    def counts(self) -> Counter[str]:
        """Return how many operations of each kind were noted."""
        return Counter({op: len(of) for op, of in self._of.items() if op != "deleting"})

    def violations(self, found: dict[tuple[str, str, str], Any]) -> list[str]:
        """
        Return what is wrong.

        Args:
            found: Every checkpoint that is there in the end, by thread, namespace and id.
        """
        wrong = [f"{op}: {record}" for op in ("foreign", "crash") for record in self._of[op]]
        wrong += self._lost(found)
        wrong += self._risen(found)
        wrong += self._torn(found)
        wrong += self._stale()
        return wrong

    def _lost(self, found: dict[tuple[str, str, str], Any]) -> Iterable[str]:
        for put in self._of["put"]:
            if self._may_be_deleted(put):
                continue
            one = found.get((put["thread"], put["ns"], put["id"]))
            if one is None:
                yield f"lost: {put}"
            elif digest(one.checkpoint["channel_values"]) != put["values"]:
                yield f"changed: {put}"
        for writes in self._of["writes"]:
            one = found.get((writes["thread"], writes["ns"], writes["id"]))
            if one is not None and not self._may_be_deleted(writes):
                tasks = {(task, channel) for task, channel, _ in one.pending_writes}
                if not all((writes["task"], channel) in tasks for channel in writes["channels"]):
                    yield f"lost: {writes}"

    def _risen(self, found: dict[tuple[str, str, str], Any]) -> Iterable[str]:
        for put in self._of["put"]:
            is_gone = any(
                delete["outcome"] == "done" and delete["start"] > put["end"]
                for delete in self._deletes[put["thread"]]
            )
            if is_gone and (put["thread"], put["ns"], put["id"]) in found:
                yield f"resurrected: {put}"

    def _torn(self, found: dict[tuple[str, str, str], Any]) -> Iterable[str]:
        for (thread, ns, _), one in found.items():
            parent = one.parent_config and one.parent_config["configurable"]["checkpoint_id"]
            if parent and (thread, ns, parent) not in found:
                yield f"no parent: {thread} {ns} {one.checkpoint['id']}"
            missing = one.checkpoint["channel_values"].get("thread", thread) != thread
            if missing:
                yield f"foreign values: {thread} {ns} {one.checkpoint['id']}"

    def _stale(self) -> Iterable[str]:
        best: dict[tuple[str, str], tuple[list[int], list[str]]] = defaultdict(lambda: ([], []))
        for put in self._of["put"]:  # in the order of their ends
            ends, greatest = best[put["thread"], put["ns"]]
            ends.append(put["end"])
            greatest.append(max(put["id"], greatest[-1] if greatest else ""))
        for get in self._of["get"]:
            ends, greatest = best[get["thread"], get["ns"]]
            before = bisect_left(ends, get["start"])
            is_older = before > 0 and (get["id"] or "") < greatest[before - 1]
            if is_older and not self._deletes[get["thread"]] and not self._is_uncertain(get):
                yield f"stale: {get} after {greatest[before - 1]}"

    def _may_be_deleted(self, record: Record) -> bool:
        # A delete that failed may have happened; one that came before may not have been seen.
        return any(delete["end"] > record["start"] for delete in self._deletes[record["thread"]])

    def _is_uncertain(self, record: Record) -> bool:
        # What a process wrote itself it may never miss.
        is_own = not record["thread"].startswith("shared")
        return not is_own and any(
            start <= record["end"] and record["start"] <= end for start, end in self._uncertain
        )
