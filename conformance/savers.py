"""The matrix of savers, and one run of every suite over a cell of it."""

import itertools
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import redis
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate

from conformance.faces import Face
from conformance.specs import SPECS
from langgraph_vat import HybridSaver, Keyring

_numbers = itertools.count()


@dataclass(frozen=True)
class Cell:
    """One configuration of the matrix."""

    sealing: str
    flush_every: int
    hot_tier: str
    face: str


@dataclass
class Outcome:
    """How many specs of each capability passed, and which failed."""

    passed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)

    def note(self, capability: str, passed: int, failures: list[str]) -> None:
        """Add a result."""
        self.passed[capability] = self.passed.get(capability, 0) + passed
        if failures:
            self.failed.setdefault(capability, []).extend(failures)


def matrix() -> list[Cell]:
    """Return every cell."""
    axes = ("plain", "sealed"), (1, 8), ("warm", "evicted", "absent"), ("async", "sync")
    return [Cell(*values) for values in itertools.product(*axes)]


@contextmanager
def saver_for(cell: Cell, postgres: str, redis_url: str) -> Iterator[Face]:
    """Make the cell's saver on a database and a key prefix of its own."""
    name = f"conformance_{next(_numbers)}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(f"CREATE DATABASE {name}")
    saver = HybridSaver.from_conn_string(
        postgres.replace("/postgres?", f"/{name}?"),
        redis=None if cell.hot_tier == "absent" else redis_url,
        keyring=Keyring.generate() if cell.sealing == "sealed" else None,
        flush_every=cell.flush_every,
        key_prefix=name,
    )
    client = redis.Redis.from_url(redis_url)

    def evict() -> None:
        for pattern in (f"{{{name}:*}}:h:*", f"{{{name}:*}}:m:*"):
            for key in client.scan_iter(pattern, count=10_000):
                client.delete(key)

    with client:
        for key in client.scan_iter(f"{{{name}:*}}:*", count=10_000):
            client.delete(key)
        saver.setup()
        before_read = evict if cell.hot_tier == "evicted" else lambda: None
        yield Face(saver, is_sync=cell.face == "sync", before_read=before_read)
        saver.close()
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def run_suites(saver: BaseCheckpointSaver[Any]) -> Outcome:
    """Run LangGraph's suite, then our own specs."""
    outcome = Outcome()

    @checkpointer_test(name=type(saver).__name__)
    async def factory() -> AsyncGenerator[BaseCheckpointSaver[Any], None]:
        yield saver

    report = await validate(factory)
    for capability, result in report.results.items():
        skipped = [] if result.detected else ["not implemented"]
        outcome.note(capability, result.tests_passed, result.failures + skipped)
    for capability, specs in SPECS.items():
        for spec in specs:
            try:
                await spec(saver)
            except Exception as error:
                outcome.note(capability, 0, [f"{spec.__name__}: {error!r}"])
            else:
                outcome.note(capability, 1, [])
    return outcome
