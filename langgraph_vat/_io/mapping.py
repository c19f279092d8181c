"""What each driver's exceptions mean to us. Used by the verbs, and nowhere else."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import redis
import redis.asyncio

from langgraph_vat._io.pool import AnswerTimeoutError, PoolTimeoutError
from langgraph_vat._io.protocols import ChangedError, HotTierError, LockTimeoutError
from langgraph_vat.errors import ConfigurationError, RefusedError, SchemaError, UnavailableError

# Redis answers, but cannot take a write or does not know the data: replies of
# a full server, a replica, a failed save, a cluster without its majority. Up
# to Redis 6 a script's own reply is quoted in another; later it is the reply,
# and of some the driver makes classes and cuts off their names.
_HOT_REFUSALS = (
    "OOM",
    "READONLY",
    "MISCONF",
    "NOREPLICAS",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "BUSY",
    "LOADING",
)
_HOT_LOST = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.RedisClusterException,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.NoPermissionError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    OSError,
)
# What the driver raises when a connection, or the server behind it, is gone.
LOST = (
    psycopg.OperationalError,
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.ReadOnlySqlTransaction,  # no longer the primary
)
# The tables' trigger: they have a hot tier since this process looked.
_REFUSED = "LGV01"
# The server ended this session, or this transaction in favour of another.
_ENDED = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    psycopg.errors.AdminShutdown,
    psycopg.errors.CrashShutdown,
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.ReadOnlySqlTransaction,
)


def is_repeatable(error: psycopg.Error) -> bool:
    """
    Whether running the same transaction again may succeed at once.

    Without a SQLSTATE the connection itself failed. Timeouts are the
    exception: they have just waited as long as they may.
    """
    if isinstance(error, _ENDED):
        return True
    is_timeout = isinstance(error, PoolTimeoutError | AnswerTimeoutError)
    return error.sqlstate is None and not is_timeout


@contextmanager
def map_postgres() -> Iterator[None]:
    """Raise `UnavailableError` where Postgres is away, others by what it says; never its own."""
    refused = None
    try:
        yield
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
        msg = (
            f"Postgres lacks this version's tables ({error.diag.message_primary})."
            " Postgres took nothing; steps that Redis took wait there. Run setup() once, with a"
            " role that may create tables."
        )
        raise SchemaError(msg) from error
    except psycopg.errors.InsufficientPrivilege as error:
        msg = (
            f"the Postgres role lacks a right ({error.diag.message_primary})."
            " Postgres took nothing; steps that Redis took wait there. Grant it, or run setup()"
            " once with a role that has it."
        )
        raise SchemaError(msg) from error
    except psycopg.errors.LockNotAvailable as error:
        msg = (
            "somebody holds a lock in Postgres for longer than the role's lock_timeout. The"
            " operation did not happen there; repeat it."
        )
        raise LockTimeoutError(msg) from error
    except LOST as error:
        msg = (
            f"Postgres cannot be used now ({type(error).__name__}). The operation happened whole"
            " or not at all; repeat it once the server is well."
        )
        raise UnavailableError(msg) from error
    except psycopg.DatabaseError as error:
        if error.sqlstate == _REFUSED:
            raise ConfigurationError(f"{error.diag.message_primary} Pass redis=.") from error
        refused = _refused(error)
    if refused is not None:
        raise refused from None  # what Postgres says may quote the row


def _refused(error: psycopg.DatabaseError) -> RefusedError | ChangedError:
    if isinstance(error, psycopg.errors.InvalidArgumentForLogarithm):  # only `items.PUT` asks
        return ChangedError()
    where = [
        f"{kind} {name!r}"
        for kind, name in (
            ("constraint", error.diag.constraint_name),
            ("table", error.diag.table_name),
        )
        if name
    ]
    return RefusedError(
        f"Postgres refuses the data ({', '.join([type(error).__name__, *where])}). It took nothing"
        " of this operation; steps that Redis took wait there. Look at the constraints and triggers"
        " of the tables."
    )


def every_primary(client: Any) -> dict[str, str]:
    """Return the argument that sends a command to all primaries, which only a cluster takes."""
    is_cluster = isinstance(client, redis.RedisCluster | redis.asyncio.RedisCluster)
    return {"target_nodes": "primaries"} if is_cluster else {}


def run_ids(info: dict[str, Any]) -> str:
    """Return the ids of server processes from what INFO said: of one, or by node."""
    nodes = [info] if "run_id" in info else info.values()
    return ",".join(sorted(node["run_id"] for node in nodes))


def answers(found: Sequence[Any]) -> list[Any]:
    """Return what commands answered that were sent together; nothing for a key of another type."""
    for one in found:
        if isinstance(one, Exception) and "WRONGTYPE" not in str(one):
            raise one
    return [[] if isinstance(one, Exception) else one for one in found]


@contextmanager
def map_redis() -> Iterator[None]:
    """Raise `HotTierError` where Redis is away or refuses to write."""
    try:
        yield
    except _HOT_LOST as error:
        raise HotTierError(type(error).__name__) from error
    except redis.exceptions.ResponseError as error:
        if any(refusal in str(error) for refusal in _HOT_REFUSALS):
            raise HotTierError(str(error)) from error
        raise
