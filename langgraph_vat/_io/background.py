"""A daemon thread that does one thing again and again."""

import logging
import threading
import time
from collections.abc import Callable

from langgraph_vat._io.forks import renew_after_fork
from langgraph_vat.errors import VatError

logger = logging.getLogger("langgraph_vat")

_SAY_AGAIN_S = 60.0


class Background:
    """
    Calls `work` every `interval_s` seconds, from the first `start` until `stop`.

    An error is logged, again only after a while, and the next round comes all the same.
    """

    def __init__(self, name: str, interval_s: float, work: Callable[[], object]) -> None:
        self._name = name
        self._interval_s = interval_s
        self._work = work
        self._is_stopped = False
        self._said, self._said_at = "", float("-inf")
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Have no thread yet, as after a fork."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def has_begun(self) -> bool:
        """Whether it was begun, or stopped."""
        return self._thread is not None or self._is_stopped

    def start(self) -> None:
        """Begin, unless it has begun or was stopped."""
        if self.has_begun:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End after the round under way, and wait for it."""
        self._is_stopped = True
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while not self._wake.wait(self._interval_s):
            try:
                self._work()
            except Exception as error:  # noqa: BLE001 - a round that fails must not end the thread
                self._say(error)

    def _say(self, error: Exception) -> None:
        # Our own messages never quote what a user typed; others' might.
        said = str(error) if isinstance(error, VatError) else type(error).__name__
        if said != self._said or time.monotonic() - self._said_at > _SAY_AGAIN_S:
            logger.warning("%s: %s; trying again", self._name, said)
            self._said, self._said_at = said, time.monotonic()
