"""
What this process acknowledged and Postgres has not confirmed: its own copies.

If Redis loses its memory they are the only ones. A copy is dropped on the
evidence of Postgres alone: our own commit of that very entry, or a fence that
says the entry is no longer wanted.
"""

import threading
import time
from collections.abc import Iterable

from langgraph_vat._io.forks import renew_after_fork
from langgraph_vat._records import Entry, PutEntry


class Copies:
    """
    Entries by thread, in the order in which they were acknowledged.

    Attributes:
        size: About how many bytes they hold together.
    """

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Hold none: after a fork the parent still has its own."""
        self._lock = threading.Lock()
        self._threads: dict[str, dict[bytes, tuple[float, Entry]]] = {}
        self.size = 0

    def add(self, thread_id: str, entry: Entry) -> None:
        """Keep `entry` until it is dropped."""
        with self._lock:
            self._threads.setdefault(thread_id, {})[entry.uid] = (time.monotonic(), entry)
            self.size += entry.size

    def of(self, thread_id: str) -> list[Entry]:
        """Return the copies of one thread."""
        with self._lock:
            return [entry for _, entry in self._threads.get(thread_id, {}).values()]

    def steps(self, thread_id: str) -> int:
        """Return how many super-steps of a thread are here."""
        return sum(isinstance(entry, PutEntry) for entry in self.of(thread_id))

    def drop(self, thread_id: str, uids: Iterable[bytes]) -> None:
        """Forget entries that Postgres has, or that must not reach it."""
        with self._lock:
            kept = self._threads.get(thread_id)
            if kept is None:
                return
            for uid in uids:
                if uid in kept:
                    self.size -= kept.pop(uid)[1].size
            if not kept:
                del self._threads[thread_id]

    def older_than(self, seconds: float) -> list[str]:
        """Return the threads whose oldest copy has at least this age, in seconds."""
        latest = time.monotonic() - seconds
        with self._lock:
            return [
                thread_id
                for thread_id, kept in self._threads.items()
                if next(iter(kept.values()))[0] <= latest
            ]
