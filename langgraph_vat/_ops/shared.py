"""
What all operations of one saver share in a process, whatever their colour.

Everything here is memory, guarded by locks that are never held across an
await, and everything can be lost: it is read again from Postgres.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._hot.bases import Bases
from langgraph_vat._hot.copies import Copies
from langgraph_vat._hot.keys import Keys
from langgraph_vat._io.forks import renew_after_fork
from langgraph_vat._io.protocols import Backend, Runner, Session
from langgraph_vat._ops.keys import OpenedKeys, open_index_key, unwrap_key
from langgraph_vat._records import Fence
from langgraph_vat._seal.associated_data import associated_data
from langgraph_vat._seal.blind_index import IndexKey, Tokens
from langgraph_vat._seal.codec import Codec
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.errors import ConfigurationError, SealError, ShreddedError, UnavailableError
from langgraph_vat.keyring import KeyWrapper
from langgraph_vat.serde import codec_for
from langgraph_vat.settings import Settings

# What a codec serializes with where nothing is.
NO_SERDE = JsonPlusSerializer()
# Stands for a data key that was destroyed.
SHREDDED = b""
# Threads whose fence and data key a process remembers.
_MOST_KNOWN = 10_000


class Known(NamedTuple):
    """A thread's fence as this process last saw it, and its data key if it is sealed."""

    fence: Fence
    data_key: DataKey | None

    @property
    def is_sealed(self) -> bool:
        """Whether its values are, all of them."""
        return self.data_key is not None

    def codec(self, serde: SerializerProtocol, thread_id: str) -> Codec:
        """Return the codec of the thread's values."""
        return codec_for(serde, self.data_key, "checkpoint", thread_id, self.fence.generation)


class KnownThreads:
    """
    The fences this process last used; None for a thread it saw deleted or absent.

    This memory is how a late write to a deleted thread is recognised: whoever
    writes under a fence that is no longer the thread's is refused.
    """

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Know none."""
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Known | None] = OrderedDict()

    def get(self, thread_id: str) -> Known | None:
        """Return what is known of a thread."""
        with self._lock:
            return self._known.get(thread_id)

    def is_gone(self, thread_id: str) -> bool:
        """Whether this process deleted the thread and has not met it since."""
        with self._lock:
            return thread_id in self._known and self._known[thread_id] is None

    def set(self, thread_id: str, known: Known | None) -> None:
        """Remember; None for a thread that was deleted."""
        with self._lock:
            self._known[thread_id] = known
            self._known.move_to_end(thread_id)
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)

    def forget(self, thread_id: str) -> None:
        """Remember nothing."""
        with self._lock:
            self._known.pop(thread_id, None)


@dataclass(slots=True)
class Counters:
    """How the tiers were used so far. Approximate under threads: for people, not for decisions."""

    hits: int = 0
    """Reads that one look at Redis answered."""
    misses: int = 0
    """Reads that Postgres answered although Redis could have."""
    flushes: int = 0
    """Flush transactions committed."""
    flushed_steps: int = 0
    """Super-steps that they moved to Postgres."""
    degraded: int = 0
    """Times that Redis failed and steps went to Postgres directly."""
    out_of_order: int = 0
    """Checkpoints with a smaller id than their parent: a clock is behind another."""


@dataclass(slots=True)
class State:
    """The row on which all processes agree, as last read."""

    epoch: int = -1
    is_degraded: bool = False
    hot_runs: str = ""
    """The processes of Redis that are trusted."""
    read_at: float = float("-inf")
    lease_s: float = 0.0
    """For how long any process believes what it read, at most."""
    obeyed_at: float = float("-inf")
    """When every process has read the epoch that this one knows."""


@dataclass(slots=True)
class Shared:
    """The memory of one saver and its clones."""

    settings: Settings
    keyring: KeyWrapper | None
    keys: Keys
    copies: Copies = field(default_factory=Copies)
    bases: Bases = field(default_factory=Bases)
    threads: KnownThreads = field(default_factory=KnownThreads)
    opened: OpenedKeys = field(default_factory=OpenedKeys)
    serde: SerializerProtocol = NO_SERDE
    """That of the saver."""
    index_key: IndexKey | None = None
    """The key of the tokens of metadata, once it was needed."""
    counters: Counters = field(default_factory=Counters)
    state: State = field(default_factory=State)
    quarantine: dict[str, Exception] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    """Threads whose reading counts as a step, since the last time that it was counted."""
    baseless: dict[bytes, float] = field(default_factory=dict)
    """Since when entries wait for what they build on, by their uid."""
    is_first: bool = False
    """Whether no other process used the tiers when this one came."""
    may_evict_journals: bool = False
    """Whether Redis would drop journals when its memory is full."""
    is_durable_away: bool = False
    """Whether Postgres did not answer the last time: then only the flusher asks it for a flush."""
    is_closing: bool = False
    """Whether nobody will flush later what is acknowledged from now on."""

    @property
    def flush_every(self) -> int:
        """Super-steps of a thread that may wait in this Redis; 1 for none."""
        must_be_durable = self.may_evict_journals or self.is_closing
        return 1 if must_be_durable else self.settings.flush_every

    @property
    def may_be_plain(self) -> bool:
        """Whether threads without a data key are read, as of now."""
        return self.keyring is None or self.settings.is_plaintext_accepted

    def known(self, thread_id: str) -> Known | None:
        """Return what is remembered of a thread; nothing of a plain one that is refused now."""
        known = self.threads.get(thread_id)
        is_refused = known is not None and known.data_key is None and not self.may_be_plain
        return None if is_refused else known

    @property
    def filterable(self) -> Sequence[str]:
        """Fields of metadata that have tokens."""
        return self.settings.filterable_metadata if self.keyring is not None else ()

    @property
    def is_degraded(self) -> bool:
        """Whether some process is, or was just now, cut off from Redis."""
        return self.state.is_degraded

    @property
    def epoch(self) -> bytes:
        """The epoch in the form that scripts compare."""
        return b"%d" % self.state.epoch


async def recount(shared: Shared, session: Session, thread_id: str) -> None:
    """Bring up to date what is told of a thread, after rows came or went without a flush."""
    params = {"thread": thread_id, "shown": list(shared.settings.thread_metadata)}
    for statement in sql.RECOUNT_THREAD:
        await session.execute(statement, params)


def key_place(thread_id: str, generation: str) -> bytes:
    """Return what a thread's data key is bound to."""
    return associated_data("data key", "checkpoint", thread_id, generation)


async def open_tokens(shared: Shared, backend: Backend) -> None:
    """
    Have the key of the tokens, if metadata has any.

    Raises:
        SealError: It does not open.
        UnavailableError: Postgres, or whoever wraps keys, does not answer.
    """
    if shared.keyring is not None and shared.filterable and shared.index_key is None:
        statements = sql.SELECT_INDEX_KEY, sql.ADD_INDEX_KEY
        place = associated_data("index key", "checkpoint")
        shared.index_key = await open_index_key(backend, shared.keyring, statements, place)


def tokens(
    shared: Shared, tenant: str, metadata: Mapping[Any, Any], fields: Collection[str] | None = None
) -> Tokens:
    """Return the tokens of metadata, of these fields or of all; none before `open_tokens`."""
    if shared.index_key is None:
        return {}
    wanted = shared.filterable if fields is None else fields
    return shared.index_key.tokens(metadata, wanted, "checkpoint", tenant)


async def known_in(shared: Shared, session: Session, thread_id: str, fence: Fence) -> Known | None:
    """
    Return what is known of a thread that is locked at `fence`; None if its key is not here.

    Nor is it if whoever wraps keys does not answer, or not this process: one thread's trouble
    stops no others.
    """
    known = shared.known(thread_id)
    if known is not None and known.fence == fence:
        return known
    rows = await session.fetch(sql.FIND_THREAD, {"thread": thread_id})
    try:
        data_key = await unwrapped(shared, session, thread_id, fence.generation, rows[0][2])
    except (SealError, UnavailableError, ConfigurationError):
        return None
    return Known(fence, data_key)


async def unwrapped(
    shared: Shared, runner: Runner, thread_id: str, generation: str, wrapped: bytes | None
) -> DataKey | None:
    """
    Return a thread's data key; None if it is not sealed, and need not be.

    Raises:
        SealError: It is sealed and this saver is not, or the reverse; or it was shredded.
        UnavailableError: Whoever wraps keys does not answer.
    """
    if wrapped == SHREDDED:
        raise ShreddedError(
            f"thread {thread_id!r} was shredded: its data key is destroyed and nobody can read what"
            " it holds. Nothing was written. Delete it to use its id again."
        )
    if wrapped is None and shared.may_be_plain:
        return None
    if shared.keyring is None:
        msg = f"thread {thread_id!r} is sealed and this saver has no keyring; pass keyring="
        raise SealError(msg)
    if wrapped is None:
        msg = (
            f"thread {thread_id!r} was written without encryption and this saver has a keyring, so"
            " it is refused, not trusted; nothing was changed. Set accept_plaintext= and have"
            " threads.seal_existing() seal it, read it with a saver that has no keyring, or delete"
            " it."
        )
        raise SealError(msg)
    bound = key_place(thread_id, generation)
    return await unwrap_key(runner, shared.keyring, shared.opened, wrapped, bound)


def now() -> float:
    """Seconds on a clock that goes on while the machine sleeps: a lease must."""
    return time.clock_gettime(_CLOCK)


_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
