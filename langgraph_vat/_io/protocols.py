"""
Every verb an operation may await, with its guarantee.

The verbs are few and dumb: no policy and no encoding. A driver's own
exceptions are mapped where a verb is implemented, and nowhere else:

- Postgres does not answer -> `UnavailableError`; a lock is not to be had ->
  `LockTimeoutError`; it lacks tables or rights -> `SchemaError`; it refuses
  data -> `RefusedError`
- Redis does not answer, or refuses to write -> `HotTierError`, which the
  operations turn into a detour through Postgres. It never reaches a caller.
- what a statement was to make sure of is not so -> `ChangedError`
- an embedder raises anything, or does not answer -> `EmbedderError`
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString, Protocol, TypeAlias, TypeVar

from psycopg import sql

from langgraph_vat.errors import UnavailableError

T = TypeVar("T")
Query: TypeAlias = LiteralString | sql.SQL | sql.Composed
Params: TypeAlias = Sequence[Any] | Mapping[str, Any] | None
Row: TypeAlias = tuple[Any, ...]
Arg: TypeAlias = bytes | int | str


class HotTierError(Exception):
    """Redis did not do what was asked; whether it did it is unknown."""


class EmbedderError(Exception):
    """
    An embedder failed, or did not answer in time. It never reaches a caller.

    Args:
        kind: Type of what it raised. Never what that says: it may quote a text.
        is_lasting: Whether the same call would fail again, as far as one can know.
        was_shared: Whether it was asked for somebody else's texts in the same call.
    """

    def __init__(self, kind: str, is_lasting: bool, was_shared: bool) -> None:  # noqa: FBT001
        super().__init__(kind)
        self.kind = kind
        self.is_lasting = is_lasting
        self.was_shared = was_shared


class ChangedError(Exception):
    """What a transaction relies on was changed: begin again. It never reaches a caller."""


class LockTimeoutError(UnavailableError):
    """A lock was not to be had within the time that somebody set for it."""


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the SHA-1 by which Redis caches it."""

    name: str
    source: str
    sha1: str


class Embedder(Protocol):
    """One method of an embedder; see `embedding.py`."""

    @property
    def kind(self) -> str:
        """What it takes texts for: equal texts of one kind have equal vectors."""
        ...

    @property
    def most(self) -> int:
        """How many texts it may be given."""
        ...

    def blocking(self, texts: Sequence[str], timeout_s: float, *, alone: bool) -> Any:
        """Call it for a blocking caller."""
        ...

    async def asyncio(self, texts: Sequence[str], timeout_s: float, *, alone: bool) -> Any:
        """Call it for a task."""
        ...

    def close(self) -> None:
        """Have nobody wait for it any longer."""
        ...


class Runner(Protocol):
    """Whatever can wait for something else than a tier."""

    async def run(self, work: Callable[[], T]) -> T:
        """Run what may take long: on an event loop in a thread, so that nobody else waits."""
        ...


class Session(Runner, Protocol):
    """One transaction on one connection: READ COMMITTED, rolled back on any error."""

    async def fetch(
        self, query: Query, params: Params = None, *, plan_anew: bool = False
    ) -> list[Row]:
        """
        Run `query` and return its rows. Everything sent before it has run.

        With `plan_anew` Postgres plans it for these very values, instead of once for
        all: where the best way depends on which conditions are absent.
        """
        ...

    async def execute(self, query: Query, params: Params = None) -> None:
        """
        Queue `query`, returning before it ran; its rows are dropped.

        It runs in order, before the next `fetch` returns or the transaction
        commits, and an error surfaces there. So a transaction costs a round
        trip per `fetch` and one for the commit, however many statements it has.
        """
        ...


class Durable(Protocol):
    """Postgres."""

    async def transact(self, body: Callable[[Session], Awaitable[T]]) -> T:
        """
        Run `body` in a transaction of its own; committed when this returns.

        `body` is run a second time, on another connection, when the first one
        turns out dead or is chosen as a deadlock's victim: it must be
        repeatable.

        Raises:
            UnavailableError: No connection, or it broke twice. The transaction
                may or may not have been committed.
        """
        ...

    async def fetch(
        self, query: Query, params: Params = None, *, plan_anew: bool = False
    ) -> list[Row]:
        """
        Run one statement that commits by itself and return its rows.

        Repeated once on a dead connection, like `transact`.
        """
        ...


class Hot(Protocol):
    """Redis."""

    async def script(self, script: Script, keys: Sequence[bytes], args: Sequence[Arg]) -> Any:
        """
        Run `script` atomically and return its reply: int, bytes or lists of them.

        One round trip once Redis has the script cached. All `keys` share a
        cluster slot.

        Raises:
            HotTierError: No usable answer. It may have run or not.
        """
        ...

    async def run_ids(self) -> str:
        """
        Return the ids of the server processes that hold the data.

        They change when a server restarts or another takes its place: it may
        then have an older memory than the one before.
        """
        ...

    async def read_each(self, command: str, keys: Sequence[bytes], *args: Arg) -> list[Any]:
        """Run a command that reads once for each of `keys`, in a round trip to each server."""
        ...

    async def set_each(self, entries: Mapping[bytes, bytes], ttl_s: int) -> None:
        """Set strings that expire, likewise."""
        ...


class Backend(Runner, Protocol):
    """Both tiers in one colour, with the few other things that differ by colour."""

    @property
    def durable(self) -> Durable:
        """The durable tier."""
        ...

    @property
    def hot(self) -> Hot | None:
        """The hot tier, if there is one."""
        ...

    @property
    def cache(self) -> Hot | None:
        """The same Redis for what can do without it: it is not waited for."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    async def embed(
        self, embedder: Embedder, texts: Sequence[str], *, timeout_s: float, alone: bool = False
    ) -> Any:
        """
        Return what an embedder gives for texts, unchecked, by its blocking or asyncio method.

        The call is shared with others who need it at the same time, unless `alone`.

        Raises:
            EmbedderError: It failed, or did not answer in so many seconds.
        """
        ...
