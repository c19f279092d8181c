"""
What a forked child must not share with its parent: sockets, locks, copies of steps.

A server under gunicorn or multiprocessing makes its saver, uses it, and forks.
The child has all objects and none of the threads; a lock that another thread
held stays locked in it, and a socket used by both garbles both.
"""

import os
from typing import Protocol
from weakref import WeakSet


class Renewable(Protocol):
    """Can begin anew in a child."""

    def renew(self) -> None:
        """Let go of what belongs to the parent, without closing it."""
        ...


_objects: WeakSet[Renewable] = WeakSet()


def renew_after_fork(renewable: Renewable) -> None:
    """Have `renewable` renewed in every child that this process forks."""
    _objects.add(renewable)


def _renew_all() -> None:
    for renewable in list(_objects):
        renewable.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
