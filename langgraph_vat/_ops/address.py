"""
What a caller may name: thread ids, namespaces, checkpoint ids, channels.

And the form of what names them: configs, checkpoints, writes.

Each is checked against every limit of Postgres before anything is written:
what fails only at flush time would be a step acknowledged and not storable.
All keys of a row together fit one B-tree page, so each part has its limit.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langgraph_vat._plain import is_text
from langgraph_vat.errors import InvalidInputError

# A stored thread id, or first label of a namespace, that begins so belongs to a tenant's view.
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


# Where an argument comes from that is not part of something else.
_ARGUMENTS = "the arguments"


def check(name: str, value: Any, *, may_be_empty: bool = False, within: str = _ARGUMENTS) -> str:
    """
    Return `value` if it can be stored under the limits of `name`.

    Args:
        name: What it is.
        value: What was given.
        may_be_empty: Whether "" is one.
        within: Where it must be, for who left it out.

    Raises:
        InvalidInputError: It is missing, empty, not a string, too long, or
            has a character that Postgres cannot hold.
    """
    most = _MOST_BYTES[name]
    if value is None:
        raise InvalidInputError(f"{name} is missing from {within}; nothing was written")
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


def check_mapping(name: str, value: Any, *, has_names: bool = False) -> Mapping[Any, Any]:
    """
    Return `value` if it is a mapping.

    Args:
        name: What it is.
        value: What was given.
        has_names: Whether its keys must be strings.
    """
    if not isinstance(value, Mapping):
        raise InvalidInputError(
            f"{name} must be a mapping, not {type(value).__name__}; nothing was written"
        )
    if has_names and not all(isinstance(key, str) for key in value):
        raise InvalidInputError(f"the keys of {name} must be strings; nothing was written")
    return value


def check_config(config: Any) -> Mapping[str, Any]:
    """Return the 'configurable' of a config."""
    if "configurable" not in check_mapping("config", config):
        raise InvalidInputError("config has no 'configurable' with a thread_id in it")
    return check_mapping("config['configurable']", config["configurable"], has_names=True)


def check_before(before: Any) -> str | None:
    """Return the checkpoint id of the config that a list ends before; None if it names none."""
    if not before:
        return None
    found = check_config(before).get("checkpoint_id")
    return None if found is None or found == "" else check("checkpoint_id", found)


def check_limit(limit: Any) -> None:
    """Check how many are wanted at most; None for all."""
    if limit is not None and (type(limit) is not int or limit < 0):
        raise InvalidInputError(
            "limit must be a whole number that is not negative, or None for all; nothing was read"
        )


def check_checkpoint(checkpoint: Any) -> None:
    """Check that a checkpoint has all that makes it one."""
    check_mapping("checkpoint", checkpoint)
    check("checkpoint_id", checkpoint.get("id"), within="the checkpoint, as its 'id'")
    for part in ("channel_versions", "channel_values"):
        if part not in checkpoint:
            raise InvalidInputError(f"the checkpoint has no {part!r}; nothing was written")
        check_mapping(f"{part} of the checkpoint", checkpoint[part])
    check_channels("channel_versions of the checkpoint", checkpoint["channel_versions"])


def check_writes(writes: Any) -> list[tuple[str, Any]]:
    """Return writes, which may come one by one, if each is a channel and its value."""
    if not isinstance(writes, Iterable):
        raise InvalidInputError(
            f"writes must be pairs of channel and value, not {type(writes).__name__};"
            " nothing was written"
        )
    pairs = list(writes)
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:  # noqa: PLR2004 - a pair
            raise InvalidInputError(
                "each of writes must be a pair of channel and value; nothing was written"
            )
        check("channel name", pair[0], within="a pair of writes")
    return pairs


def check_channels(name: str, versions: Any) -> None:
    """Check the names and versions of channels."""
    for channel, version in check_mapping(name, versions).items():
        check("channel name", channel)
        check("channel version", str(version))


def check_run_ids(run_ids: Any) -> list[str]:
    """Check a sequence of run ids."""
    return [check("run_id", one, within="run_ids") for one in check_ids("run_ids", run_ids)]


def check_ids(name: str, ids: Any) -> Sequence[Any]:
    """Return a sequence of ids, which are still to be checked one by one."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        what = "one string" if isinstance(ids, str) else type(ids).__name__
        raise InvalidInputError(f"{name} must be a sequence of ids, not {what}; nothing was done")
    return list(ids)


def tenant_of(stored: str) -> str:
    """Return the tenant that a stored thread id belongs to; nothing if it belongs to none."""
    if not stored.startswith(TENANTS):
        return ""
    length, _, rest = stored.removeprefix(TENANTS).partition(":")
    return rest[: int(length)]


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

    def stored(self, thread_id: Any, *, within: str = _ARGUMENTS) -> str:
        """Return the id under which a thread is stored; `within` is where it must be given."""
        checked = check("thread_id", thread_id, within=within)
        if self.is_scoped:
            return self.prefix + checked
        if checked.startswith(TENANTS):
            msg = f"thread_id must not begin with {TENANTS!r}; use scoped(tenant) for its threads"
            raise InvalidInputError(msg)
        return checked

    def shown(self, stored: str) -> str:
        """Return the id by which the caller knows a stored thread."""
        return stored[len(self.prefix) :] if self.is_scoped else stored


class Space:
    """
    The namespaces that a store may touch: all that belong to no tenant, or one tenant's.

    A tenant's have a first label of their own. No tenant is a prefix of another there: a label
    ends where the next one begins, and what could end it is written otherwise.
    """

    def __init__(self, tenant: str | None) -> None:
        self.tenant = tenant
        self.root = ""
        """The first label of a tenant's namespaces, as they are stored."""
        if tenant is not None:
            name = check("tenant", tenant).replace("%", "%25").replace(".", "%2E")
            self.root = TENANTS + name

    def stored(self, namespace: tuple[str, ...]) -> tuple[str, ...]:
        """Return the namespace under which one is stored."""
        if self.root:
            return (self.root, *namespace)
        if namespace and str(namespace[0]).startswith(TENANTS):
            raise InvalidInputError(
                f"a namespace must not begin with {TENANTS!r}; nothing was done. Use"
                " scoped(tenant) for a tenant's"
            )
        return namespace

    def shown(self, namespace: tuple[str, ...]) -> tuple[str, ...]:
        """Return the namespace by which the caller knows a stored one."""
        return namespace[1:] if self.root else namespace
