"""
What travels between a saver's callers and its two tiers. Plain data, no behaviour.

A value appears as the serializer left it: a type tag and bytes, sealed if
sealing is on. A version appears as text, as Postgres keeps it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from langgraph_vat.settings import Retention

_GENERATION = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Fence(NamedTuple):
    """
    Which life of a thread a record belongs to.

    A deleted thread's id may be used again: that is another generation.
    Pruning or deleting runs keeps the generation and raises the history.
    """

    generation: str
    history: int

    @property
    def text(self) -> str:
        """The form both tiers compare."""
        return f"{self.generation}:{self.history}"

    @classmethod
    def parse(cls, text: str) -> "Fence":
        """
        Read the form that `text` writes.

        Raises:
            ValueError: It is another.
        """
        generation, _, history = text.rpartition(":")
        if not _GENERATION.fullmatch(generation):
            raise ValueError("not a fence")
        return cls(generation, int(history))


class Core(NamedTuple):
    """A checkpoint without its channel values, and its metadata."""

    checkpoint: bytes
    """JSON, as the column `checkpoints.checkpoint` holds it."""
    metadata: bytes
    """JSON of what may be read and filtered in the clear, as in `checkpoints.metadata`."""
    exact_type: str
    """Type tag of `exact`; empty when the JSON above already says everything."""
    exact: bytes
    """The metadata, and what else a checkpoint carried, as the serializer left them."""


class Blob(NamedTuple):
    """The value of a channel at one version. `data` is None where the channel is empty."""

    channel: str
    version: str
    type: str
    data: bytes | None
    base: str = ""
    """The version that it builds on, if it is a patch."""
    mark: bytes = b""
    """What a head knows a large value by; or the one that a patch is made for."""


class Write(NamedTuple):
    """One pending write of a task."""

    task_id: str
    idx: int
    task_path: str
    channel: str
    type: str
    data: bytes
    base: str = ""
    """The version of the channel that it builds on, if Postgres keeps it as a patch."""


class ThreadInfo(NamedTuple):
    """What is told of a thread without reading any of its checkpoints."""

    thread_id: str
    created_at: datetime
    updated_at: datetime
    """When its last step, or write, came to Postgres; or when it was read, if that counts."""
    steps: int
    """Checkpoints, of all namespaces."""
    bytes: int
    """About how large its values are, as they are stored."""
    head_id: str
    """Id of the newest checkpoint of the root namespace; empty if it has none."""
    metadata: dict[str, Any]
    """The newest value of each key that `Settings.thread_metadata` names."""
    retention: Retention | None
    """Its own policy, if it has one."""


class Swept(NamedTuple):
    """What a sweep let go of, or would."""

    threads: int
    checkpoints: int
    bytes: int


class Rotated(NamedTuple):
    """What became of the data keys."""

    rotated: int
    """Wrapped anew, by the keyring's primary key. Others were already."""
    left: int
    """That no key of the keyring opens."""


class Resealed(NamedTuple):
    """What was sealed anew."""

    keys: int
    """Data keys that were replaced."""
    values: int
    """Rows that were sealed anew."""
    kept: int
    """Data keys that still have the ones behind them that they replaced."""
    left: int
    """Rows, or data keys, that could not be opened."""


class Sealed(NamedTuple):
    """What was in the clear, and is sealed now."""

    keys: int
    """Data keys that were made: of threads, or of roots of a store."""
    values: int
    """Rows that were sealed."""
    left: int
    """Threads, or roots, that are in the clear as before."""


class Pending(NamedTuple):
    """What waits for its vectors."""

    items: int
    """That are stored, and not found by meaning yet."""
    since: datetime | None
    """For how long the oldest of them does; None if none does."""
    error: str
    """The type of what the embedder, or opening an item, raised last; empty if none waits."""


class Rewritten(NamedTuple):
    """What was stored in another form."""

    threads: int
    values: int
    """Of channels, and pending writes."""
    left: int
    """Values that could not be opened, or threads whose key is not here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PutEntry:
    """One acknowledged `put`. `needs` and `kept` are (channel, version) pairs."""

    uid: bytes
    fence: Fence
    checkpoint_ns: str
    checkpoint_id: str
    parent_id: str
    run_id: str
    core: Core
    blobs: tuple[Blob, ...]
    kept: frozenset[str]
    """Channels in `blobs` whose version is not new: stored only where missing."""
    needs: tuple[tuple[str, str], ...]
    """Values this checkpoint names without bringing them: they must be stored already."""

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        return sum(map(len, self.core)) + sum(len(blob.data or b"") for blob in self.blobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class WritesEntry:
    """One acknowledged `put_writes`."""

    uid: bytes
    fence: Fence
    epoch: int
    """The tiers' epoch it was taken under: tells later writes that went past Redis from earlier."""
    checkpoint_ns: str
    checkpoint_id: str
    run_id: str
    writes: tuple[Write, ...]

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        return sum(len(write.data) for write in self.writes)


Entry = PutEntry | WritesEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One stored checkpoint with all that belongs to it, from either tier."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str
    parent_id: str
    checkpoint: dict[str, Any]
    metadata: dict[str, Any]
    exact_type: str
    exact: bytes
    inline: Mapping[str, Any]
    """Channel values that PostgresSaver keeps inside the checkpoint's JSON."""
    blobs: tuple[Blob, ...]
    writes: tuple[Write, ...]
    sends: tuple[Write, ...] = ()
    """What checkpoints before version 4 left among the writes of their parent."""
    bases: tuple[Blob, ...] = ()
    """What the values and writes build on that are kept as patches."""
