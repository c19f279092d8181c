"""
What a caller may name: thread ids, namespaces, checkpoint ids, channels.

Each is checked against every limit of Postgres before anything is written:
what fails only at flush time would be a step acknowledged and not storable.
All keys of a row together fit one B-tree page, so each part has its limit.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from langgraph_vat._plain import is_text
from langgraph_vat.errors import InvalidInputError

# A stored thread id that begins so belongs to a tenant's view.
TENANTS = "vat-tenant:"

_MOST_BYTES = {
    "thread_id": 1024,
    "checkpoint_ns": 1024,
    "checkpoint_id": 128,
    "task_id": 128,
    "channel name": 256,
    "channel version": 128,
    "task_path": 8192,
    "tenant": 256,
    "run_id": 1024,
}


def check(name: str, value: Any, *, may_be_empty: bool = False) -> str:
    """
    Return `value` if it can be stored under the limits of `name`.

    Raises:
        InvalidInputError: It is missing, empty, not a string, too long, or
            has a character that Postgres cannot hold.
    """
    most = _MOST_BYTES[name]
    if value is None:
        raise InvalidInputError(
            f"{name} is missing from config['configurable']; nothing was written"
        )
    if not isinstance(value, str):
        raise InvalidInputError(
            f"{name} must be a string, not {type(value).__name__}; nothing was written."
            " Pass str(...)"
        )
    if not value and not may_be_empty:
        raise InvalidInputError(f"{name} must not be empty; nothing was written")
    if not is_text(value):
        raise InvalidInputError(
            f"{name} has a NUL or a lone surrogate, which Postgres cannot hold; nothing was written"
        )
    if len(value.encode()) > most:
        raise InvalidInputError(
            f"{name} has {len(value.encode())} bytes and may have {most}; nothing was written"
        )
    return value


def check_channels(versions: Mapping[str, Any]) -> None:
    """Check the names and versions of channels."""
    for channel, version in versions.items():
        check("channel name", channel)
        check("channel version", str(version))


def check_run_ids(run_ids: Iterable[str]) -> list[str]:
    """Check a sequence of run ids."""
    if isinstance(run_ids, str):
        raise InvalidInputError("run_ids must be a sequence of run ids, not one string")
    return [check("run_id", run_id) for run_id in run_ids]


class View:
    """
    The threads that a saver may touch: all that belong to no tenant, or one tenant's.

    A tenant's threads are stored under an injective prefix, so that no thread
    id, whatever it contains, leads into another view.
    """

    def __init__(self, tenant: str | None) -> None:
        self.is_scoped = tenant is not None
        self.tenant = tenant or ""
        self.prefix = TENANTS
        if tenant is not None:
            self.prefix += f"{len(check('tenant', tenant))}:{tenant}:"

    def stored(self, thread_id: Any) -> str:
        """Return the id under which a thread is stored."""
        checked = check("thread_id", thread_id)
        if self.is_scoped:
            return self.prefix + checked
        if checked.startswith(TENANTS):
            msg = f"thread_id must not begin with {TENANTS!r}; use scoped(tenant) for its threads"
            raise InvalidInputError(msg)
        return checked

    def shown(self, stored: str) -> str:
        """Return the id by which the caller knows a stored thread."""
        return stored[len(self.prefix) :] if self.is_scoped else stored
