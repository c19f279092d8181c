"""A saver or store seen from one of its sides: LangGraph's suites call async methods only."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.store.base import BaseStore

_WRITES = ("put", "put_writes", "delete_thread", "delete_for_runs", "copy_thread", "prune")
_READS = ("get_tuple", "get_delta_channel_history")


class Face(BaseCheckpointSaver[Any]):
    """
    One side of a saver.

    Args:
        saver: The saver.
        is_sync: Whether async calls are answered by its sync methods.
        before_read: Called before each read.
    """

    def __init__(
        self,
        saver: BaseCheckpointSaver[Any],
        *,
        is_sync: bool,
        before_read: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(serde=saver.serde)
        self.saver = saver
        self.is_sync = is_sync
        self.before_read = before_read

    def get_next_version(self, current: Any, channel: None) -> Any:
        return self.saver.get_next_version(current, channel)

    async def alist(self, config: Any, **options: Any) -> AsyncIterator[Any]:
        self.before_read()
        if self.is_sync:
            for found in self.saver.list(config, **options):
                yield found
        else:
            async for found in self.saver.alist(config, **options):
                yield found


def _forward(name: str, *, is_read: bool) -> Any:
    async def method(self: Face, *args: Any, **kwargs: Any) -> Any:
        if is_read:
            self.before_read()
        if self.is_sync:
            return getattr(self.saver, name)(*args, **kwargs)
        return await getattr(self.saver, f"a{name}")(*args, **kwargs)

    return method


for _name in (*_WRITES, *_READS):
    setattr(Face, f"a{_name}", _forward(_name, is_read=_name in _READS))


class SyncStoreFace(BaseStore):
    """A store whose async calls are answered by its sync method."""

    def __init__(self, store: BaseStore) -> None:
        self.store = store
        self.supports_ttl = store.supports_ttl
        self.ttl_config = store.ttl_config

    def batch(self, ops: Any) -> Any:
        return self.store.batch(ops)

    async def abatch(self, ops: Any) -> Any:
        return await asyncio.to_thread(self.store.batch, ops)
