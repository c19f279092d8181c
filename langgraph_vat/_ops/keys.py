"""
Data keys, wrapped and opened by whoever keeps the keys that wrap.

A keyring is at hand. Anybody else may be far away, and slow: what it opened is
remembered by what was wrapped, so it is asked once for each data key, and it is
asked where nobody else has to wait. What was wrapped is read from Postgres each
time, so a key that was replaced or destroyed is noticed as ever.
"""

import threading
from collections import OrderedDict
from functools import partial
from typing import LiteralString

from langgraph_vat._io.forks import renew_after_fork
from langgraph_vat._io.protocols import Backend, Runner
from langgraph_vat._seal.blind_index import IndexKey
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.keyring import Keyring, KeyWrapper

_MOST_OPENED = 10_000


class OpenedKeys:
    """The data keys that somebody else opened, those that were used last."""

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Know none."""
        self._lock = threading.Lock()
        self._opened: OrderedDict[tuple[bytes, bytes], DataKey] = OrderedDict()

    def get(self, wrapped: bytes, place: bytes) -> DataKey | None:
        """Return what was opened."""
        with self._lock:
            return self._opened.get((wrapped, place))

    def set(self, wrapped: bytes, place: bytes, data_key: DataKey) -> None:
        """Remember what was opened."""
        with self._lock:
            self._opened[wrapped, place] = data_key
            while len(self._opened) > _MOST_OPENED:
                self._opened.popitem(last=False)


async def unwrap_key(
    runner: Runner, keyring: KeyWrapper, opened: OpenedKeys, wrapped: bytes, place: bytes
) -> DataKey:
    """
    Return the data key that was wrapped for a place.

    Raises:
        SealError: It does not open here.
        UnavailableError: Whoever wrapped it does not answer.
    """
    work = partial(DataKey.unwrap, wrapped, keyring, associated_data=place)
    if isinstance(keyring, Keyring):
        return work()
    data_key = opened.get(wrapped, place)
    if data_key is None:
        data_key = await runner.run(work)
        opened.set(wrapped, place, data_key)
    return data_key


async def wrap_key(runner: Runner, keyring: KeyWrapper, data_key: DataKey, place: bytes) -> bytes:
    """
    Return a data key wrapped for a place.

    Raises:
        UnavailableError: Whoever wraps does not answer.
    """
    work = partial(data_key.wrap, keyring, associated_data=place)
    return work() if isinstance(keyring, Keyring) else await runner.run(work)


async def open_index_key(
    backend: Backend,
    keyring: KeyWrapper,
    statements: tuple[LiteralString, LiteralString],
    place: bytes,
) -> IndexKey:
    """
    Return the key of the blind indexes; one that is new is committed before it is used.

    Args:
        backend: Where to ask.
        keyring: Wraps it.
        statements: How it is selected; and added, unless somebody did, and returned.
        place: What it is bound to.

    Raises:
        SealError: It does not open here.
        UnavailableError: Postgres, or whoever wraps keys, does not answer.
    """
    select, add = statements
    rows = await backend.durable.fetch(select)
    if not rows:
        work = partial(IndexKey.generate().wrap, keyring, associated_data=place)
        wrapped = work() if isinstance(keyring, Keyring) else await backend.run(work)
        rows = await backend.durable.fetch(add, {"index_key": wrapped})
    opening = partial(IndexKey.unwrap, rows[0][0], keyring, associated_data=place)
    return opening() if isinstance(keyring, Keyring) else await backend.run(opening)
