"""
Calls of an embedder, shared by all who need it at the same time.

1. Who comes while nothing is under way calls at once. Others gather for the next call,
   which begins when one ends, or after a few milliseconds for each that is under way: an
   embedder that hangs is called less and less often.
2. Nobody waits longer than he said, and who gives up takes nothing away from the others.
   A call that all gave up is forgotten. It may go on for ever: it runs in a daemon thread,
   which neither a caller nor the end of the interpreter waits for.
3. Of what an embedder raises only the type is kept: its message may quote a text.
"""

import asyncio
import contextvars
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from langchain_core.embeddings import Embeddings
from langgraph.store.base.embed import EmbeddingsLambda

from langgraph_vat._io.driver import drive
from langgraph_vat._io.forks import renew_after_fork
from langgraph_vat._io.protocols import EmbedderError

# Texts of one call.
MOST_TEXTS = 128
# Seconds that the next call waits for company, for each that is under way.
_GATHER_S = 0.005
# Seconds after which a thread that has nothing to do ends.
_IDLE_S = 10.0
# What will be raised again if the same is asked again; of HTTP's errors those of the client, but
# for these: a timeout, a conflict, too early, too many requests.
_LASTING = (TypeError, ValueError, LookupError, AttributeError, ImportError, NotImplementedError)
_CLIENT_ERRORS, _PASSING = range(400, 500), (408, 409, 425, 429)

Texts: TypeAlias = Sequence[str]
Blocking: TypeAlias = Callable[[list[str]], Any]
Suspending: TypeAlias = Callable[[list[str]], Awaitable[Any]]


class _Outcome(NamedTuple):
    """What came of a call."""

    vectors: Any = None
    kind: str = ""
    """The type of what was raised, if anything was."""
    is_lasting: bool = False
    is_shared: bool = False


class _Call:
    """One call, and how many wait for what comes of it."""

    def __init__(self, texts: Texts, gate: Any) -> None:
        self.texts = dict.fromkeys(texts)
        self.gate = gate
        """Set when it need not wait for company any more."""
        self.callers = 0
        self.is_shared = False
        self.may_be_joined = True
        self.has_begun = False
        self.task: asyncio.Task[None] | None = None
        self.outcome: Future[_Outcome] = Future()
        self.outcome.set_running_or_notify_cancel()  # it cannot be cancelled from now on

    def settle(self, outcome: _Outcome) -> None:
        """Tell everybody what came of it, unless they were told."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class _Calls(ABC):
    """The calls of one method that are under way, or gather; its lock guards plain memory."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._calls: list[_Call] = []
        self._is_closed = False

    @abstractmethod
    def gate(self) -> Any:
        """Return an event that `wait` waits for."""

    @abstractmethod
    async def wait(self, gate: Any, seconds: float) -> None:
        """Wait for an event, so long at most."""

    @abstractmethod
    async def ask(self, texts: list[str]) -> Any:
        """Call the embedder."""

    @abstractmethod
    def start(self, call: _Call, wait_s: float) -> None:
        """Have `run` run."""

    def join(self, texts: Texts, *, alone: bool) -> _Call:
        """Return a call that has these texts; one of their own if they are to be alone."""
        with self._lock:
            call = None if alone else self._joined(texts)
            wait_s = None
            if call is None:
                is_full = alone or len(texts) >= self._most
                wait_s = 0.0 if is_full else _GATHER_S * len(self._calls)
                call = _Call(texts, self.gate())
                call.may_be_joined = not alone
                self._calls.append(call)
                if self._is_closed:
                    call.settle(_CLOSED)
            call.callers += 1
        if wait_s is not None:
            self.start(call, wait_s)
        return call

    def _joined(self, texts: Texts) -> _Call | None:
        for call in self._calls:
            wanted = call.texts.keys() | texts
            has_room = not call.has_begun and len(wanted) <= self._most
            if call.may_be_joined and (has_room or len(wanted) == len(call.texts)):
                call.texts.update(dict.fromkeys(texts))
                call.is_shared = True
                if len(call.texts) == self._most and not call.has_begun:
                    call.gate.set()
                return call
        return None

    def leave(self, call: _Call) -> None:
        """Wait no longer. Whoever gives up may know that it hangs: no others join it then."""
        with self._lock:
            call.callers -= 1
            if call.outcome.done():
                return
            call.may_be_joined = False
            if call.callers == 0 and call in self._calls:
                self._calls.remove(call)
                call.gate.set()
                if call.task is not None:
                    call.task.cancel()

    async def run(self, call: _Call, wait_s: float) -> None:
        """Gather, ask, and tell what came of it."""
        outcome = _Outcome()
        try:
            if wait_s:
                await self.wait(call.gate, wait_s)
            with self._lock:
                call.has_begun = True
                is_awaited = call.callers and not call.outcome.done()
                texts = list(call.texts) if is_awaited else []
            if texts:
                outcome = _Outcome(await self.ask(texts))
        except BaseException as error:  # noqa: BLE001 - an embedder may raise anything
            outcome = _failed(error)
        self._end(call, outcome)

    def _end(self, call: _Call, outcome: _Outcome) -> None:
        with self._lock:
            if call in self._calls:
                self._calls.remove(call)
            for other in self._calls:
                if not other.has_begun:
                    other.gate.set()
        if call.is_shared:  # as it stays: nobody can join it any more
            outcome = _divided(call, outcome)
        with self._lock:
            call.settle(outcome)

    def close(self) -> None:
        """Have nobody wait any longer, now and later."""
        with self._lock:
            self._is_closed = True
            for call in self._calls:
                call.settle(_CLOSED)


_CLOSED = _Outcome(kind="closed", is_lasting=True)
_LATE = _Outcome(kind="TimeoutError")


class _ThreadCalls(_Calls):
    """Calls of a blocking method, for whoever waits: threads, and tasks of any loop."""

    def __init__(self, method: Blocking, most: int) -> None:
        super().__init__(most)
        self._method = method

    def gate(self) -> threading.Event:
        return threading.Event()

    async def wait(self, gate: threading.Event, seconds: float) -> None:
        gate.wait(seconds)

    async def ask(self, texts: list[str]) -> Any:
        return self._method(texts)

    def start(self, call: _Call, wait_s: float) -> None:
        context = contextvars.copy_context()  # of whoever came first: traces need it
        try:
            _workers.start(lambda: context.run(lambda: drive(self.run(call, wait_s))))
        except RuntimeError as error:  # the interpreter ends
            self._end(call, _failed(error))


class _LoopCalls(_Calls):
    """Calls of an asyncio method, for the tasks of one loop."""

    def __init__(self, method: Suspending, most: int) -> None:
        super().__init__(most)
        self._method = method

    def gate(self) -> asyncio.Event:
        return asyncio.Event()

    async def wait(self, gate: asyncio.Event, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await gate.wait()

    async def ask(self, texts: list[str]) -> Any:
        return await self._method(texts)

    def start(self, call: _Call, wait_s: float) -> None:
        call.task = asyncio.get_running_loop().create_task(self.run(call, wait_s))


class SharedCalls:
    """
    One method of an embedder, called for all who need it at the same time.

    Args:
        kind: What it takes texts for.
        blocking: The method.
        suspending: Its asyncio twin; None if it has none of its own.
        most: Texts of one call.
    """

    def __init__(
        self, kind: str, blocking: Blocking, suspending: Suspending | None, most: int
    ) -> None:
        self.kind = kind
        self.most = most
        self._blocking = blocking
        self._suspending = suspending
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin without any call, as after a fork."""
        self._lock = threading.Lock()
        self._threads = _ThreadCalls(self._blocking, self.most)
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopCalls] = WeakKeyDictionary()
        self._is_closed = False

    def blocking(self, texts: Texts, timeout_s: float, *, alone: bool) -> Any:
        """
        Return what the embedder gives for these texts.

        Raises:
            EmbedderError: It failed, or took too long.
        """
        calls = self._threads
        call = calls.join(texts, alone=alone)
        try:
            outcome = call.outcome.result(timeout_s)
        except TimeoutError:
            outcome = _LATE
        finally:
            calls.leave(call)
        return _own(outcome, texts)

    async def asyncio(self, texts: Texts, timeout_s: float, *, alone: bool) -> Any:
        """Likewise, for a task."""
        calls = self._calls_of_loop()
        call = calls.join(texts, alone=alone)
        try:
            async with asyncio.timeout(timeout_s):
                outcome = await asyncio.wrap_future(call.outcome)
        except TimeoutError:
            outcome = _LATE
        finally:
            calls.leave(call)
        return _own(outcome, texts)

    def _calls_of_loop(self) -> _Calls:
        if self._suspending is None:
            return self._threads
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._loops:
                self._loops[loop] = _LoopCalls(self._suspending, self.most)
                if self._is_closed:
                    self._loops[loop].close()
            return self._loops[loop]

    def close(self) -> None:
        """Have nobody wait for the embedder any longer."""
        with self._lock:
            self._is_closed = True
            every = [self._threads, *self._loops.values()]
        for calls in every:
            calls.close()


def documents(embeddings: Embeddings) -> SharedCalls:
    """Return what embeds documents."""
    suspending = embeddings.aembed_documents if _is_own(embeddings, "aembed_documents") else None
    return SharedCalls("document", _blocking(embeddings), suspending, MOST_TEXTS)


def queries(embeddings: Embeddings) -> SharedCalls:
    """Return what embeds queries: many at once where a function takes them for documents."""
    if isinstance(embeddings, EmbeddingsLambda):
        return documents(embeddings)

    async def suspending(texts: list[str]) -> list[list[float]]:
        return [await embeddings.aembed_query(text) for text in texts]

    def blocking(texts: list[str]) -> list[list[float]]:
        return [embeddings.embed_query(text) for text in texts]

    is_own = _is_own(embeddings, "aembed_query")
    return SharedCalls("query", blocking, suspending if is_own else None, 1)


def _is_own(embeddings: Embeddings, name: str) -> bool:
    """Whether an asyncio method is more than the blocking one in a thread of the loop's."""
    if isinstance(embeddings, EmbeddingsLambda):
        return hasattr(embeddings, "afunc")
    return getattr(type(embeddings), name) is not getattr(Embeddings, name)


def _blocking(embeddings: Embeddings) -> Blocking:
    """Return what blocks; an `async` function has a loop of its own there."""
    if isinstance(embeddings, EmbeddingsLambda) and not hasattr(embeddings, "func"):
        return lambda texts: asyncio.run(embeddings.aembed_documents(texts))
    return embeddings.embed_documents


def _divided(call: _Call, outcome: _Outcome) -> _Outcome:
    """Return what came of a call by its texts; if that is unknown, whoever asks alone will see."""
    if not outcome.kind:
        try:
            found = dict(zip(call.texts, outcome.vectors, strict=True))
        except Exception as error:  # noqa: BLE001 - the embedder's own types may raise anything
            outcome = _failed(error)
        else:
            outcome = _Outcome(found)
    return outcome._replace(is_shared=True)


def _own(outcome: _Outcome, texts: Texts) -> Any:
    """Return a caller's part of what came of a call, as the embedder gave it."""
    if outcome.kind:
        raise EmbedderError(outcome.kind, outcome.is_lasting, outcome.is_shared)
    return [outcome.vectors[text] for text in texts] if outcome.is_shared else outcome.vectors


def _failed(error: BaseException) -> _Outcome:
    return _Outcome(kind=type(error).__name__, is_lasting=_is_lasting(error))


def _is_lasting(error: BaseException) -> bool:
    """Whether the same call would fail again, as far as one can know."""
    status = None
    with suppress(Exception):  # properties of somebody's
        source = error if hasattr(error, "status_code") else getattr(error, "response", None)
        status = getattr(source, "status_code", None)
    if isinstance(status, int):
        return status in _CLIENT_ERRORS and status not in _PASSING
    return isinstance(error, _LASTING)


class _Workers:
    """Daemon threads, kept for a while: what embeds may have set up something for its thread."""

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Have no thread yet, as after a fork."""
        self._lock = threading.Lock()
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._idle = 0

    def start(self, work: Callable[[], None]) -> None:
        """
        Run `work` at once, in a thread that is idle or new.

        Raises:
            RuntimeError: There can be no new ones: the interpreter ends.
        """
        with self._lock:
            is_promised = self._idle > 0
            self._idle -= is_promised
        if not is_promised:
            threading.Thread(target=self._run, name="langgraph-vat embedder", daemon=True).start()
        self._work.put(work)

    def _run(self) -> None:
        while True:
            try:
                work = self._work.get(timeout=_IDLE_S)
            except Empty:
                with self._lock:
                    if self._idle:
                        self._idle -= 1
                        return
                continue  # it was promised to somebody just now
            work()
            del work  # it has the texts
            with self._lock:
                self._idle += 1


_workers = _Workers()
