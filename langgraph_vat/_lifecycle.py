"""
The life of a saver in a process, shared by its clones and views; and what a store does by itself.

A saver opens connections late, flushes in the background from the first put on,
and closes once: by `close`, by leaving a `with` block, or when the
interpreter exits. A store with an index embeds in the background what waits for it.
"""

import atexit
import logging
from contextlib import suppress

from langgraph_vat._durable.schema import TABLES
from langgraph_vat._hot.keys import Keys
from langgraph_vat._io.background import Background
from langgraph_vat._io.connections import Connections, closed
from langgraph_vat._io.driver import drive
from langgraph_vat._io.protocols import Backend
from langgraph_vat._ops.flush import flush, note_durable, overdue
from langgraph_vat._ops.indexing import index_pending
from langgraph_vat._ops.items import Items
from langgraph_vat._ops.shared import Shared, now
from langgraph_vat._ops.sweep import count_reads, sweep_in_turn
from langgraph_vat._ops.threads import reopen_abandoned
from langgraph_vat._ops.tiers import refresh
from langgraph_vat.errors import ConfigurationError, UnavailableError, VatError
from langgraph_vat.keyring import KeyWrapper
from langgraph_vat.settings import Retention, Settings

logger = logging.getLogger("langgraph_vat")

_TICK_S = 60.0
# Seconds after which a store looks whether items wait for vectors; more after a failure.
_INDEX_S = 5.0
_MOST_INDEX_S = 60.0
# The tables without which there is no saver.
NEEDS = frozenset(TABLES)


class Lifecycle:
    """Owns what a saver must stop: its flusher, and what is still to be flushed."""

    def __init__(
        self, connections: Connections, settings: Settings, keyring: KeyWrapper | None
    ) -> None:
        self.connections = connections
        self.shared = Shared(settings=settings, keyring=keyring, keys=Keys(settings.key_prefix))
        interval_s = min(settings.flush_after / 4, settings.epoch_ttl_s / 2)
        self._flusher = Background("langgraph-vat flusher", interval_s, self._round)
        self._sweeper = Background(
            "langgraph-vat sweeper", _tick_s(settings.retention), self._sweep
        )
        atexit.register(self._end)

    def blocking(self) -> Backend:
        """The backend for blocking callers."""
        self._refuse_closed()
        backend = self.connections.blocking(NEEDS)
        self._start()
        return backend

    async def asyncio(self) -> Backend:
        """The backend for callers on the running event loop."""
        self._refuse_closed()
        backend = await self.connections.asyncio(NEEDS)
        self._start()
        return backend

    def close(self) -> None:
        """
        Flush what this process holds, and stop flushing. Blocks; may be called again.

        No operation begins after this. One that is under way sees the mark, or is
        acknowledged before it: then its copy is among those that are flushed here.
        """
        if self.shared.is_closing:
            return
        self.shared.is_closing = True
        atexit.unregister(self._end)
        self._flusher.stop()
        self._sweeper.stop()
        waiting = self.shared.copies.older_than(0)
        if waiting:
            self._flush_last(waiting)
        if self.shared.read:
            with suppress(VatError):  # then they do not count
                drive(count_reads(self.shared, self.connections.blocking()))

    def _refuse_closed(self) -> None:
        if self.shared.is_closing:
            raise closed()

    def _start(self) -> None:
        if self.connections.is_hot:
            self._flusher.start()
        retention = self.shared.settings.retention
        if retention and (retention.sweep_interval_minutes or retention.refresh_on_read):
            self._sweeper.start()

    def _end(self) -> None:
        self.close()
        self.connections.close()

    def _flush_last(self, waiting: list[str]) -> None:
        try:
            drive(flush(self.shared, self.connections.blocking(), waiting))
        except VatError as error:
            logger.error(  # noqa: TRY400 - the type says it; a traceback may show what a user typed
                "closed with steps of %d threads in Redis only (%s): the next process flushes them",
                len(waiting),
                type(error).__name__,
            )

    def _sweep(self) -> None:
        drive(sweep_in_turn(self.shared, self.connections.blocking()))

    def _round(self) -> None:
        try:
            drive(_flush_overdue(self.shared, self.connections.blocking()))
        except UnavailableError:
            note_durable(self.shared, is_away=True)


class Indexer:
    """Embeds what waits for it, in the background: from the first use of a store until `stop`."""

    def __init__(self, connections: Connections, items: Items) -> None:
        self._connections = connections
        self._items = items
        self._background = Background("langgraph-vat indexer", _INDEX_S, self._round)
        self._pause_s = _INDEX_S
        self._not_before = 0.0

    def start(self) -> None:
        """Begin, if there is an index and it has not begun."""
        if self._items.embedding is not None and not self._background.has_begun:
            atexit.register(self.stop)
            self._background.start()

    def stop(self) -> None:
        """End, and do not wait for the embedder."""
        atexit.unregister(self.stop)
        if self._items.embedding is not None:
            self._items.embedding.close()
        self._background.stop()

    def _round(self) -> None:
        if self._connections.is_closed or now() < self._not_before:
            return
        try:
            _, failure = drive(index_pending(self._items, self._connections.blocking()))
        except UnavailableError:
            return  # whoever uses the store is told
        except ConfigurationError:
            if not self._connections.is_closed:  # just now, by a saver that shares them
                raise
            return
        self._pause_s = min(2 * self._pause_s, _MOST_INDEX_S) if failure else _INDEX_S
        self._not_before = now() + self._pause_s if failure else 0.0


def _tick_s(retention: Retention | None) -> float:
    """How often to look whether it is time to sweep: whoever ends meanwhile misses no turn."""
    minutes = retention.sweep_interval_minutes if retention else None
    return min(_TICK_S, (minutes or 60) * 60 / 2)


async def _flush_overdue(shared: Shared, backend: Backend) -> None:
    """
    Read the row that all agree on, and flush what is old: our own first, then anybody's.

    Last, look after a Redis that failed: that may take long.
    """
    await refresh(shared, backend)
    limit_s = shared.settings.flush_after
    own_s = 0 if shared.is_degraded else limit_s / 2
    threads = await overdue(shared, backend, own_s=own_s, any_s=limit_s * 3 / 4, most=64)
    await flush(shared, backend, threads, wait=False)
    await reopen_abandoned(shared, backend, threads)
    note_durable(shared, is_away=False)
    if shared.is_degraded:
        with suppress(UnavailableError):  # of Postgres the next round tells
            await refresh(shared, backend, may_try=True)
