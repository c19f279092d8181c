"""What a worker is told to do."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Order:
    """
    Where a worker writes, and what.

    Attributes:
        log: File of its records.
        name: Its name, first word of its threads' ids.
        postgres: Connection string.
        redis: URL.
        seed: Of its random choices.
        skew_s: Seconds that its clock is ahead of others.
        talkers: How many threads of it run graphs; every third in an event loop.
        keeps: Whether the graphs' threads are left when they are done, or deleted.
        settings: Of the saver.
    """

    log: str
    name: str
    postgres: str
    redis: str
    seed: str
    skew_s: float = 0.0
    talkers: int = 3
    keeps: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
