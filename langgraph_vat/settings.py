"""What can be tuned, with units in the names; checked when it is set."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from math import inf
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from langgraph_vat._plain import is_plain
from langgraph_vat.errors import ConfigurationError

# Longer than anybody waits, and short enough for the servers' own clocks.
_DAY_S = 86_400
_YEAR_S = 365 * _DAY_S
STORAGES = ("compact", "compatible")
RANKINGS = ("vector", "lexical", "hybrid")
# What pgvector takes.
_MOST_EF_SEARCH, _MOST_SCAN_TUPLES = 1_000, 2**31 - 1
# A thousand years.
_MOST_MINUTES = 525_600_000
T = TypeVar("T", "Retention", "Settings")


def _now() -> datetime:
    return datetime.now(UTC)


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


def _kinds(annotation: Any) -> tuple[type, ...]:
    """Return the types that a setting may have; a whole number is a float, too."""
    named = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kinds = [get_origin(one) or one for one in named]
    return (*kinds, int) if float in kinds else tuple(kinds)


def search_fault(name: str, value: Any) -> str:
    """Return what is wrong with an option of a search; nothing if it is well, or None."""
    most = {"ef_search": _MOST_EF_SEARCH, "max_scan_tuples": _MOST_SCAN_TUPLES}.get(name)
    if value is None:
        return ""
    if most is not None and not (type(value) is int and 1 <= value <= most):
        return f"{name} must be None, or a whole number from 1 to {most:,}"
    if name == "ranking" and value not in RANKINGS:
        return f"ranking must be None, or one of {', '.join(RANKINGS)}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "min_score" and not (is_number and abs(value) < inf):
        return "min_score must be None, or a finite number"
    return ""


def _made(kind: type[T], given: Mapping[str, Any]) -> T:
    names = [one.name for one in fields(kind)]
    unknown = sorted(given.keys() - set(names))
    _require(not unknown, f"no setting is called {unknown}; there are {', '.join(names)}")
    return kind(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """
    For how long threads are kept; the names are those of ``ttl`` in langgraph.json.

    A thread expires when it was idle for `default_ttl`, or is `max_age` old: choose
    more than a single step of a run may take.
    Apart from that, of a thread that has more than `keep_last` checkpoints the
    older ones go. Without any of the three everything is kept for ever.

    Attributes:
        default_ttl: Minutes after a thread's last step; None for ever.
        max_age: Minutes after a thread's first step; None for ever.
        keep_last: Newest checkpoints of each namespace to keep; None for all.
        strategy: What becomes of a thread that expired: ``delete`` it, or keep
            its newest checkpoints (``keep_latest``).
        metadata: Only of threads whose metadata has these; see
            `Settings.thread_metadata`.
        refresh_on_read: Whether reading a thread's newest checkpoint counts as a step.
        sweep_interval_minutes: Minutes between two sweeps, of which one process of all
            does each; None to sweep only when `Threads.sweep` is called.
    """

    default_ttl: float | None = None
    max_age: float | None = None
    keep_last: int | None = None
    strategy: str = "delete"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    refresh_on_read: bool = False
    sweep_interval_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("default_ttl", "max_age", "keep_last", "sweep_interval_minutes"):
            value, kinds = getattr(self, name), (int,) if name == "keep_last" else (int, float)
            _require(
                value is None or (type(value) in kinds and 0 < value <= _MOST_MINUTES),
                f"{name} must be None, or a number from more than 0 to {_MOST_MINUTES:,}",
            )
        _require(
            self.strategy in ("delete", "keep_latest"),
            "strategy must be 'delete' or 'keep_latest'",
        )
        _require(
            isinstance(self.metadata, Mapping) and is_plain(dict(self.metadata)),
            "metadata must be a mapping of names to what JSON can hold",
        )
        object.__setattr__(self, "metadata", dict(self.metadata))
        _require(type(self.refresh_on_read) is bool, "refresh_on_read must be True or False")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Retention":
        """
        Return the policy that a mapping describes, such as ``ttl`` of langgraph.json.

        Raises:
            ConfigurationError: There is no such name, or it cannot work.
        """
        return _made(cls, given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """
    Limits and times of one pair of tiers.

    Attributes:
        flush_every: Super-steps of a thread that may wait in Redis; 1 commits
            every step in Postgres before it is acknowledged.
        flush_after: Seconds that a step may wait in Redis.
        head_ttl_s: Seconds that an idle thread stays hot.
        max_backlog: Super-steps of a thread that a process may have waiting
            in Redis while Postgres does not answer. Then `put` waits for
            `timeout_s`, and raises.
        max_backlog_bytes: Likewise of all threads of a process together.
        on_conflict: What becomes of a step whose parent is no longer the
            thread's newest checkpoint: ``fork`` keeps both branches, as
            LangGraph's savers do; ``raise`` refuses it with `ConflictError`,
            so that two runs on one thread cannot both go on. Resuming from
            an older checkpoint is refused then, too.
        storage: ``compact`` compresses values, and keeps what grows or changes a
            little as patches; ``compatible`` stores what PostgresSaver can read.
        thread_metadata: Keys of a checkpoint's metadata by which threads can be
            searched, such as ``("user_id",)``. Their values are readable in
            Postgres where the rest is sealed.
        filterable_metadata: Keys of sealed metadata by which ``list(filter=)`` finds
            checkpoints in Postgres: beside them stands a keyed hash of a value that is a
            string, a number or a boolean. Who reads the database sees which are equal.
        filterable_fields: Likewise of items of a sealed store, on their first level, for
            ``search(filter=)`` of equality within one first label of a namespace.
        accept_plaintext: Until when a saver or store with a keyring still reads threads, and
            first labels of a store, that have no data key: a `datetime` with a time zone. They
            stay as they are until ``seal_existing()``; new ones are sealed at once. Meanwhile
            whoever writes to the database can put others there. None for never.
        text_search: The Postgres text search configuration by whose words items of a store are
            found, such as ``"english"``, or ``"simple"`` for several languages; None to find them
            by meaning alone. The same for all processes of a database; not with a keyring, since
            the words are readable.
        ranking: How a store's search with a query orders what it finds, unless it says so itself:
            ``vector`` by meaning, ``lexical`` by words, ``hybrid`` by both. None for ``vector``
            if there is an index, else ``lexical`` if there is a `text_search`.
        ef_search: Candidates that a search by an HNSW index keeps, from 1 to 1,000: more find
            more of the nearest, and take longer. None for pgvector's setting.
        max_scan_tuples: Vectors that such a search visits before it compares all instead. None
            for pgvector's setting.
        retention: For how long threads are kept: a `Retention`, or a mapping like
            ``ttl`` in langgraph.json; None for ever. A thread may have its own.
        max_head_bytes: A state larger than this is not kept hot.
        pool_size: Most Postgres connections of a process, for blocking callers
            together and for each event loop.
        timeout_s: Seconds to wait for a connection or an answer.
        embed_timeout_s: Seconds for which a put or a search waits for the embedder, however often
            it is asked; for a batch with many texts, for every 128 of them.
        embedding_cache_bytes: About how much of Redis's memory vectors of texts may take that were
            embedded before, a week ago at most; 0 for none.
        epoch_ttl_s: Seconds for which a process may trust its last look at
            Postgres before it serves another read from Redis. When Redis fails,
            everyone waits once for the longest that any process uses.
        key_prefix: First word of every Redis key.
    """

    flush_every: int = 8
    flush_after: float = 2.0
    head_ttl_s: int = 86_400
    max_backlog: int = 1_000
    max_backlog_bytes: int = 256 * 2**20
    on_conflict: str = "fork"
    storage: str = "compact"
    thread_metadata: tuple[str, ...] = ()
    filterable_metadata: tuple[str, ...] = ()
    filterable_fields: tuple[str, ...] = ()
    accept_plaintext: datetime | None = None
    text_search: str | None = None
    ranking: str | None = None
    ef_search: int | None = None
    max_scan_tuples: int | None = None
    retention: Retention | None = None
    max_head_bytes: int = 16 * 2**20
    pool_size: int = 16
    timeout_s: float = 10.0
    embed_timeout_s: float = 30.0
    embedding_cache_bytes: int = 64 * 2**20
    epoch_ttl_s: float = 1.0
    key_prefix: str = "vat"

    def __post_init__(self) -> None:
        for one in fields(self):
            kinds = _kinds(one.type)
            value = getattr(self, one.name)
            names = " or ".join("None" if k is NoneType else k.__name__ for k in kinds)
            _require(
                type(value) in kinds, f"{one.name} must be {names}, not {type(value).__name__}"
            )
        _require(self.flush_every >= 1, "flush_every must be at least 1 super-step")
        _require(self.max_backlog >= self.flush_every, "max_backlog must be at least flush_every")
        _require(self.max_backlog_bytes >= 1, "max_backlog_bytes must be at least 1 byte")
        _require(self.on_conflict in ("fork", "raise"), "on_conflict must be 'fork' or 'raise'")
        _require(self.storage in STORAGES, f"storage must be one of {STORAGES}")
        for name in ("thread_metadata", "filterable_metadata", "filterable_fields"):
            keys = getattr(self, name)
            _require(
                all(type(key) is str and key and is_plain(key) and "%" not in key for key in keys),
                f"{name} must be names, without NULs, lone surrogates or '%'",
            )
        _require(
            not {*self.thread_metadata} & {*self.filterable_metadata},
            "what thread_metadata names is readable: leave it out of filterable_metadata",
        )
        _require(
            "vat_blind" not in self.thread_metadata, "thread_metadata must not name 'vat_blind'"
        )
        for name in ("ranking", "ef_search", "max_scan_tuples"):
            fault = search_fault(name, getattr(self, name))
            _require(not fault, fault)
        _require(
            self.text_search is None or (self.text_search and is_plain(self.text_search)),
            "text_search must be None, or the name of a text search configuration",
        )
        until = self.accept_plaintext
        _require(
            until is None or until.utcoffset() is not None,
            "accept_plaintext must have a time zone, as datetime.now(UTC) has",
        )
        _require(
            self.retention is None or self.retention.metadata.keys() <= {*self.thread_metadata},
            "a policy's metadata must be among thread_metadata: by other keys it finds no thread",
        )
        _require(0 < self.flush_after <= _YEAR_S, "flush_after must be 0 seconds to a year")
        _require(1 <= self.head_ttl_s <= 10 * _YEAR_S, "head_ttl_s must be 1 second to 10 years")
        _require(self.max_head_bytes >= 0, "max_head_bytes must not be negative")
        _require(self.embedding_cache_bytes >= 0, "embedding_cache_bytes must not be negative")
        _require(self.pool_size >= 1, "pool_size must be at least 1 connection")
        _require(0 < self.timeout_s <= _DAY_S, "timeout_s must be more than 0 seconds, up to a day")
        _require(0 < self.embed_timeout_s <= _DAY_S, "embed_timeout_s must be 0 s to a day")
        _require(0 < self.epoch_ttl_s <= _DAY_S, "epoch_ttl_s must be more than 0 s, up to a day")
        _require(
            self.key_prefix.isidentifier(),
            "key_prefix must be letters, digits and underscores, and start with a letter",
        )

    @property
    def is_plaintext_accepted(self) -> bool:
        """Whether the time of `accept_plaintext` has not come yet."""
        return self.accept_plaintext is not None and _now() < self.accept_plaintext

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Settings":
        """
        Return the settings that keyword arguments of a caller name.

        Raises:
            ConfigurationError: There is no such setting, or it cannot work.
        """
        if isinstance(given.get("retention"), Mapping):
            given = {**given, "retention": Retention.of(given["retention"])}
        return _made(cls, given)
