"""Savers that stand for processes of their own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from langgraph_vat import HybridSaver, Keyring


@pytest.fixture
def keyring() -> Keyring | None:
    """That of the processes; a file whose processes seal has a fixture of its own."""
    return None


@pytest.fixture
def process(
    postgres_url: str, redis_url: str, keyring: Keyring | None
) -> Iterator[Callable[..., HybridSaver]]:
    """Make a saver that stands for a process of its own; nothing flushes it in the background."""
    made: list[HybridSaver] = []

    def start(**more: Any) -> HybridSaver:
        options = {"redis": redis_url, "flush_every": 50, "flush_after": 600.0, **more}
        saver = HybridSaver.from_conn_string(postgres_url, keyring=keyring, **options)
        saver._life._flusher.stop()
        saver.setup()
        made.append(saver)
        return saver

    yield start
    for saver in made:
        kill(saver)
        saver.close()


def kill(saver: HybridSaver) -> None:
    """Have it lose what only it holds, as a process that is killed does."""
    saver._shared.copies._threads.clear()


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    """A client of the processes' Redis."""
    with redis.Redis.from_url(redis_url) as client:
        yield client
