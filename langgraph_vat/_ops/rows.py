"""The rows of a thread that are sealed one by one: how they are found, stored and bound."""

from collections.abc import Callable, Sequence
from typing import Any, LiteralString, NamedTuple

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Row, Session
from langgraph_vat._ops.values import blob_place


class Kind(NamedTuple):
    """
    Rows of one table.

    Each is selected as what it is bound to, its type tag and its value. What it is bound to
    begins with its key, whose columns `names` has.
    """

    select: LiteralString
    """Those that another data key sealed."""
    select_all: LiteralString
    """A page of all, by their keys."""
    update: LiteralString
    names: tuple[str, ...]
    place: Callable[..., tuple[str, ...]]

    def new(self, row: Row, value: tuple[str, bytes]) -> tuple[Any, ...]:
        """Return a row's key and another value of it."""
        return *row[: len(self.names)], *value


def _write_place(ns: str, checkpoint: str, task: str, idx: int, channel: str) -> tuple[str, ...]:
    return "write", ns, checkpoint, task, str(idx), channel


def exact_place(ns: str, checkpoint: str) -> tuple[str, ...]:
    """Return what the metadata of a checkpoint are bound to."""
    return "metadata", ns, checkpoint


BLOBS = Kind(
    sql.SEALED_BLOBS,
    sql.PLAIN_BLOBS,
    sql.RESEAL_BLOBS,
    ("namespaces", "channels", "versions"),
    blob_place,
)
WRITES = Kind(
    sql.SEALED_WRITES,
    sql.PLAIN_WRITES,
    sql.RESEAL_WRITES,
    ("namespaces", "ids", "tasks", "idxs"),
    _write_place,
)
EXACTS = Kind(
    sql.SEALED_EXACTS,
    sql.PLAIN_CHECKPOINTS,
    sql.RESEAL_EXACTS,
    ("namespaces", "ids"),
    exact_place,
)
KINDS = (BLOBS, WRITES, EXACTS)


async def store(
    session: Session, thread_id: str, kind: Kind, rows: Sequence[tuple[Any, ...]]
) -> None:
    """Store rows that `Kind.new` returned."""
    if rows:
        params = {"thread": thread_id, **columns(rows, *kind.names, "types", "blobs")}
        await session.execute(kind.update, params)
