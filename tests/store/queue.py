"""What tests of the embedder and of those who wait for it have in common."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

SECRET = "marker-7f3a"
HERE = ("a", "b")
VECTORS = "SELECT key, field_name FROM store_vectors ORDER BY 1, 2"
PENDING = "SELECT key, paths, attempts, error FROM vat_store_pending ORDER BY 1"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


async def soon(condition: Callable[[], object]) -> None:
    """Likewise, while other tasks go on."""
    async with asyncio.timeout(60):
        while True:
            if condition():
                return
            await asyncio.sleep(0.002)


def callers(calls: Any) -> int:
    """How many wait for an answer of the embedder."""
    return sum(call.callers for call in calls._calls)
