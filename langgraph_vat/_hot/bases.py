"""
The large values that this process put into heads whole, as they are below the seal.

A head keeps such a value under a random mark. Whoever knows what stands under
the mark may send the next version as a patch of it. What is forgotten here is
sent whole again, and nothing else comes of it.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from langgraph_vat._io.forks import renew_after_fork

# Bytes of all values together.
_MOST = 64 * 2**20


class Base(NamedTuple):
    """A value that a head holds whole."""

    mark: bytes
    version: str
    data: bytes


class Bases:
    """Bases by thread, of those threads that were used last."""

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Know none."""
        self._lock = threading.Lock()
        self._threads: OrderedDict[str, dict[tuple[str, str], Base]] = OrderedDict()
        self._size = 0

    def get(self, thread_id: str, checkpoint_ns: str, channel: str) -> Base | None:
        """Return what the head holds of a channel, as far as is known."""
        with self._lock:
            return self._threads.get(thread_id, {}).get((checkpoint_ns, channel))

    def learn(self, thread_id: str, checkpoint_ns: str, sent: Mapping[str, Base | None]) -> None:
        """Remember channels that were sent whole; None for one that is not worth it."""
        with self._lock:
            known = self._threads.setdefault(thread_id, {})
            for channel, base in sent.items():
                old = known.pop((checkpoint_ns, channel), None)
                self._size -= len(old.data) if old else 0
                if base is not None:
                    known[checkpoint_ns, channel] = base
                    self._size += len(base.data)
            self._threads.move_to_end(thread_id)
            while self._size > _MOST:
                self._drop(next(iter(self._threads)))

    def forget(self, thread_id: str) -> None:
        """Remember nothing of a thread."""
        with self._lock:
            self._drop(thread_id)

    def _drop(self, thread_id: str) -> None:
        dropped = self._threads.pop(thread_id, {})
        self._size -= sum(len(base.data) for base in dropped.values())
