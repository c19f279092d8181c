"""
Run one coroutine to its end without an event loop.

Operations are written once, as `async def` over the verbs of `protocols.py`.
Asyncio callers await them. Blocking callers run the same coroutine here: on
the blocking backend no verb ever suspends, so a single ``send(None)`` carries
it from its first line to its return. A coroutine that does suspend awaited
something other than a backend verb; that is a bug, and it is raised as one.
"""

from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """
    Return what `coroutine` returns; raise what it raises.

    Raises:
        RuntimeError: The coroutine suspended, so it cannot be run blocking.
    """
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    msg = f"{coroutine!r} awaited something that is not a backend verb"
    raise RuntimeError(msg)
