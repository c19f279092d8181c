"""Search threads by what is told of them, a page at a time."""

from collections.abc import Mapping
from typing import Any

import orjson

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._io.protocols import Backend
from langgraph_vat._ops.history import flush_waiting
from langgraph_vat._ops.shared import Shared
from langgraph_vat._plain import is_plain
from langgraph_vat._records import ThreadInfo
from langgraph_vat.errors import InvalidInputError
from langgraph_vat.settings import Retention

_MOST = 10_000


async def search_threads(
    shared: Shared,
    backend: Backend,
    tenant: str,
    metadata: Mapping[str, Any],
    before: ThreadInfo | None,
    limit: int,
) -> list[ThreadInfo]:
    """
    Return a page of threads with stored ids, those with the newest steps first.

    Raises:
        InvalidInputError: The metadata can be nobody's, or the limit is none.
    """
    if not isinstance(metadata, Mapping) or not all(type(key) is str for key in metadata):
        raise InvalidInputError("metadata must be a mapping of names to values")
    unknown = sorted(set(metadata) - set(shared.settings.thread_metadata))
    if unknown:
        raise InvalidInputError(
            f"threads cannot be searched by {unknown}; thread_metadata= says by what they can"
        )
    if not all(is_plain(value) for value in metadata.values()):
        raise InvalidInputError("threads can be searched by values that JSON can hold; not by this")
    if type(limit) is not int or not 1 <= limit <= _MOST:
        raise InvalidInputError(f"limit must be a number of threads from 1 to {_MOST:,}")
    if before is None:
        await flush_waiting(shared, backend, None)
    params = {
        "tenant": tenant,
        "metadata": orjson.dumps(metadata).decode(),
        "before": before.updated_at.isoformat() if before else "infinity",
        "before_id": before.thread_id if before else "",
        "limit": limit,
    }
    rows = await backend.durable.fetch(sql.SEARCH_THREADS, params, plan_anew=True)
    return [ThreadInfo._make((*told, Retention(**own) if own else None)) for *told, own in rows]
