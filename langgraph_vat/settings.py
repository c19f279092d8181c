"""What can be tuned, with units in the names; checked when it is set."""

from dataclasses import dataclass, fields
from typing import Any, Self

from langgraph_vat.errors import ConfigurationError

# Longer than anybody waits, and short enough for the servers' own clocks.
_DAY_S = 86_400
_YEAR_S = 365 * _DAY_S


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


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
        max_head_bytes: A state larger than this is not kept hot.
        pool_size: Most Postgres connections of a process, for blocking callers
            together and for each event loop.
        timeout_s: Seconds to wait for a connection or an answer.
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
    max_head_bytes: int = 16 * 2**20
    pool_size: int = 16
    timeout_s: float = 10.0
    epoch_ttl_s: float = 1.0
    key_prefix: str = "vat"

    def __post_init__(self) -> None:
        for field in fields(self):
            kinds = (int, float) if field.type is float else (type(field.default),)
            value = getattr(self, field.name)
            names = " or ".join(kind.__name__ for kind in kinds)
            _require(
                type(value) in kinds, f"{field.name} must be {names}, not {type(value).__name__}"
            )
        _require(self.flush_every >= 1, "flush_every must be at least 1 super-step")
        _require(self.max_backlog >= self.flush_every, "max_backlog must be at least flush_every")
        _require(self.max_backlog_bytes >= 1, "max_backlog_bytes must be at least 1 byte")
        _require(self.on_conflict in ("fork", "raise"), "on_conflict must be 'fork' or 'raise'")
        _require(
            self.storage in ("compact", "compatible"), "storage must be 'compact' or 'compatible'"
        )
        _require(0 < self.flush_after <= _YEAR_S, "flush_after must be 0 seconds to a year")
        _require(1 <= self.head_ttl_s <= 10 * _YEAR_S, "head_ttl_s must be 1 second to 10 years")
        _require(self.max_head_bytes >= 0, "max_head_bytes must not be negative")
        _require(self.pool_size >= 1, "pool_size must be at least 1 connection")
        _require(0 < self.timeout_s <= _DAY_S, "timeout_s must be more than 0 seconds, up to a day")
        _require(0 < self.epoch_ttl_s <= _DAY_S, "epoch_ttl_s must be more than 0 s, up to a day")
        _require(
            self.key_prefix.isidentifier(),
            "key_prefix must be letters, digits and underscores, and start with a letter",
        )

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """
        Return the settings that keyword arguments of a caller name.

        Raises:
            ConfigurationError: There is no such setting, or it cannot work.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(given.keys() - set(names))
        _require(not unknown, f"no setting is called {unknown}; there are {', '.join(names)}")
        return cls(**given)
