"""
What a forked child must not share with its parent: sockets, locks, copies of steps.

A server under gunicorn or multiprocessing makes its saver, uses it, and forks.
The child has all objects and none of the threads; a lock that another thread
held stays locked in it, and a socket used by both garbles both.
"""

import os
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

T = TypeVar("T")


class Renewable(Protocol):
    """Can begin anew in a child."""

    def renew(self) -> None:
        """Let go of what belongs to the parent, without closing it."""
        ...


class made_once(Generic[T]):  # noqa: N801 - used as functools.cached_property is
    """
    A property that is made when it is first asked for, and kept.

    Without a lock. Python 3.11's own has one for all instances: a child that was forked while
    another thread made one would wait for it for ever. Two threads may make one each; the
    first is kept.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._name = make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, owner: Any, kind: type | None = None) -> T:
        made: T = vars(owner).setdefault(self._name, self._make(owner))
        return made


_objects: WeakSet[Renewable] = WeakSet()


def renew_after_fork(renewable: Renewable) -> None:
    """Have `renewable` renewed in every child that this process forks."""
    _objects.add(renewable)


def _renew_all() -> None:
    for renewable in list(_objects):
        renewable.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
