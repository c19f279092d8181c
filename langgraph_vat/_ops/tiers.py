"""
Whether Redis may be trusted right now.

One row in Postgres is what every process agrees on: the epoch, whether it is
a degraded one, and which Redis holds the data.

1. A head counts only under the epoch it was made in, and a process serves one
   only if it has read the row within the last `epoch_ttl_s` seconds. The longest
   such time of any process, its lease, is in the row.
2. A process that cannot reach Redis begins a degraded epoch, and so does one
   that finds another Redis process, or an emptied one, in the place of the one
   that the row names: it may remember less. From then on every process flushes
   its own copies, and goes past Redis.
3. Past Redis means in a transaction that holds the row, and finds it in that
   very epoch. The first who does waits until everyone has read the row, so
   nobody serves a head from before, whoever dies in between.
4. After a while the first who finds Redis well begins a new epoch, in which it
   is trusted. Nothing was ever written past Redis in that one, so its heads
   cannot be overtaken unseen. Only flushers look: a server that is frozen takes
   its time to be found so, and no caller has to wait for that.
"""

import logging
import uuid
from contextlib import suppress
from typing import LiteralString

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable import schema
from langgraph_vat._hot import scripts
from langgraph_vat._io.protocols import (
    Arg,
    Backend,
    Durable,
    Hot,
    HotTierError,
    LockTimeoutError,
    Params,
    Row,
    Session,
)
from langgraph_vat._ops.schema import migrate
from langgraph_vat._ops.shared import Shared, now
from langgraph_vat.errors import ConfigurationError, SchemaError, UnavailableError

logger = logging.getLogger("langgraph_vat")

# For so many times `epoch_ttl_s` nobody tries a Redis that failed.
_DEGRADED_TTLS = 5


async def hot_to_write(shared: Shared, backend: Backend) -> Hot | None:
    """Return Redis, or None to write past it. The row's last reading will do: a put cannot lie."""
    return await _hot(shared, backend, float("inf"))


async def hot_to_read(shared: Shared, backend: Backend) -> Hot | None:
    """Return Redis, or None to read past it, after making sure the row was read just now."""
    return await _hot(shared, backend, shared.settings.epoch_ttl_s)


async def _hot(shared: Shared, backend: Backend, ttl_s: float) -> Hot | None:
    state = shared.state
    if state.is_degraded or state.epoch < 0 or now() - state.read_at >= ttl_s:
        await refresh(shared, backend)
    if not state.is_degraded:
        return backend.hot
    await _until_obeyed(shared, backend)
    return None


async def is_still(shared: Shared, backend: Backend, epoch: bytes, answer: bytes) -> bool:
    """
    Whether what Redis just answered under an epoch may be believed.

    The answer may have taken longer than a reading of the row is good for: what
    counts is that the epoch had not ended when it came.
    """
    ttl_s = 0.0 if answer == b"replaced" else shared.settings.epoch_ttl_s
    return await _hot(shared, backend, ttl_s) is not None and shared.epoch == epoch


async def _until_obeyed(shared: Shared, backend: Backend) -> None:
    """Wait until no process serves a head, or takes a step, under an earlier epoch."""
    left_s = shared.state.obeyed_at - now()
    if left_s > 0:
        await backend.sleep(left_s)


async def holds_epoch(shared: Shared, session: Session) -> bool:
    """Whether Redis may be passed by in this transaction; it may then until the commit."""
    rows = await session.fetch(sql.SHARE_STATE)
    return bool(rows) and rows[0][0] == shared.state.epoch


async def require_hot(shared: Shared, backend: Backend, address: str) -> None:
    """
    Refuse to start with a Redis that does not answer: later it may fail, but not from the first.

    Raises:
        UnavailableError: It does not answer.
    """
    if backend.hot is None:
        return
    try:
        await backend.hot.script(scripts.CLOCK, [shared.keys.identity], [])
    except HotTierError as error:
        msg = (
            f"Redis at {address} cannot be used ({error}). Nothing was written. Check the address,"
            " the credentials, the user's rights and that the server runs; or leave out redis= to"
            " use Postgres alone."
        )
        raise UnavailableError(msg) from error


async def refresh(shared: Shared, backend: Backend, *, may_try: bool = False) -> None:
    """
    Read the row, and look whether Redis is still the one it names.

    Args:
        shared: The memory of this process.
        backend: Both tiers.
        may_try: Whether to try a Redis that failed a while ago.

    Raises:
        ConfigurationError: The database belongs to another Redis, or this
            Redis to another database.
        UnavailableError: Postgres does not answer.
    """
    read_at, row = await _read_row(shared, backend)
    epoch, hot_tier, hot_runs, left_s, _, hot_prefix = row
    if backend.hot is None:
        if hot_tier is not None:
            raise _needs_hot_tier()
        shared.state.epoch, shared.state.read_at = epoch, read_at
        return
    if hot_prefix not in (None, shared.settings.key_prefix):
        raise _other_prefix(hot_prefix)
    _learn(shared, epoch, read_at, is_degraded=left_s is not None)
    if left_s is None or (left_s <= 0 and may_try):
        try:
            await _attach(shared, backend, backend.hot, hot_tier, hot_runs)
        except HotTierError:
            await _stay_past(shared, backend)
    shared.state.read_at = max(read_at, shared.state.read_at)


async def _read_row(shared: Shared, backend: Backend) -> tuple[float, Row]:
    """
    Return the row, and when it had this content at the earliest.

    Before a process believes a reading for longer than any other does, the row
    says so: who begins an epoch waits for as long.
    """
    own_s = shared.settings.epoch_ttl_s
    while True:
        read_at = now()
        row = await _select_row(backend.durable)
        shared.state.lease_s = row[4]
        if row[4] >= own_s or backend.hot is None:
            return read_at, row
        await change_row(backend, sql.LENGTHEN_LEASE, {"seconds": own_s})


async def change_row(backend: Backend, statement: LiteralString, params: Params) -> list[Row]:
    """Change the row, when the transactions that hold it have ended."""

    async def body(session: Session) -> list[Row]:
        await session.execute(sql.STATE_LOCK_TIMEOUT)
        await session.execute(sql.LOCK_STATE)
        return await session.fetch(statement, params)

    try:
        return await backend.durable.transact(body)
    except LockTimeoutError as error:
        msg = (
            "a process that is frozen, or slow, holds the row that says whether Redis may be"
            " trusted. Nothing was written; repeat it in some seconds."
        )
        raise UnavailableError(msg) from error


def _learn(shared: Shared, epoch: int, known_at: float, *, is_degraded: bool) -> None:
    """Take over an epoch, unless this process knows a later one already."""
    state = shared.state
    if epoch > state.epoch:
        state.epoch, state.is_degraded = epoch, is_degraded
        state.obeyed_at = known_at + state.lease_s


async def _attach(
    shared: Shared, backend: Backend, hot: Hot, hot_tier: str | None, hot_runs: str | None
) -> None:
    """Compare Redis with the row: go on with it, or begin another epoch."""
    is_start = shared.state.read_at == float("-inf")
    runs = await hot.run_ids()
    if is_start or runs != hot_runs:
        await _note_policy(shared, hot)
    found = await hot.script(scripts.IDENTIFY, [shared.keys.identity], ["", 0])
    if found is not None and hot_tier is None:
        # Another process may have claimed both since the row was read.
        _, hot_tier, hot_runs, *_ = await _select_row(backend.durable)
    if found is not None:
        _refuse_foreign(shared, found, hot_tier)
    is_lost = hot_tier is not None and (found is None or runs != hot_runs)
    if hot_tier is None:
        hot_tier = await _claim(shared, backend, runs, is_asked=False)
    elif is_lost and not (is_start and shared.is_first):
        # It lost its memory, or one with an older memory took its place:
        # heads may be stale, and others may hold steps that only they have.
        wait_s = shared.settings.flush_after + shared.state.lease_s
        await _raise_epoch(shared, backend, wait_s, runs)
        logger.warning(
            "Redis was restarted, replaced or emptied, or another process uses another one (all"
            " must use the same): for %.0f s steps go to Postgres, and every process flushes what"
            " it holds. What only a process that is dead had put there waits in the old one.",
            wait_s,
        )
    elif is_lost or shared.is_degraded:
        await _trust(shared, backend, runs)
    if found is None:
        arguments: list[Arg] = [str(hot_tier), 1]
        found = await hot.script(scripts.IDENTIFY, [shared.keys.identity], arguments)
        _refuse_foreign(shared, found, hot_tier)
    shared.state.hot_runs = runs


async def enable_hot(shared: Shared, backend: Backend) -> None:
    """
    Let Redis stand before a database that others wrote without it. They cannot any more.

    Raises:
        ConfigurationError: There is no Redis, or it belongs to another database.
        UnavailableError: A tier does not answer.
    """
    if backend.hot is None:
        raise ConfigurationError("enable_hot() needs a Redis: pass redis=. Nothing was changed.")
    try:
        runs = await backend.hot.run_ids()
        found = await backend.hot.script(scripts.IDENTIFY, [shared.keys.identity], ["", 0])
    except HotTierError as error:
        msg = f"Redis does not answer ({error}). Nothing was changed; repeat it."
        raise UnavailableError(msg) from error
    hot_tier = (await _select_row(backend.durable))[1]
    if found is not None:
        _refuse_foreign(shared, found, hot_tier)
    if hot_tier is None:
        arguments: list[Arg] = [await _claim(shared, backend, runs, is_asked=True), 1]
        with suppress(HotTierError):  # then it is found to know nothing, which is true
            await backend.hot.script(scripts.IDENTIFY, [shared.keys.identity], arguments)
    await refresh(shared, backend, may_try=True)


async def _claim(shared: Shared, backend: Backend, runs: str, *, is_asked: bool) -> str:
    """Return what Postgres calls its Redis from now on; this one, if it had none."""
    ours = {
        "hot_tier": str(uuid.uuid4()),
        "hot_runs": runs,
        "hot_prefix": shared.settings.key_prefix,
        "is_asked": is_asked,
    }

    async def body(session: Session) -> str | None:
        await session.execute(sql.LOCK_STATE)
        await session.execute(sql.LOCK_TABLES)
        await session.execute(sql.CLAIM_HOT_TIER, ours)
        _, hot_tier, _, _, _, hot_prefix = await _select_row(session)
        if hot_prefix not in (None, shared.settings.key_prefix):
            raise _other_prefix(hot_prefix)
        return None if hot_tier is None else str(hot_tier)

    hot_tier = await migrate(backend, body, schema.BLOCKERS)
    if hot_tier is None:
        raise ConfigurationError(
            "this database holds checkpoints that were written without Redis, perhaps by processes"
            " that still run. Nothing was read or written. Stop them, and call enable_hot() once:"
            " from then on they are refused. Until then leave out redis=."
        )
    return hot_tier


async def _trust(shared: Shared, backend: Backend, runs: str) -> None:
    params, was_degraded = {"epoch": shared.state.epoch, "hot_runs": runs}, shared.is_degraded
    rows = await change_row(backend, sql.TRUST_HOT_TIER, params)
    if rows:  # else another process did, and the next look at the row tells
        _learn(shared, rows[0][0], now(), is_degraded=False)
    if rows and was_degraded:
        logger.warning("Redis is well: steps and reads go through it again.")


async def _select_row(postgres: Durable | Session) -> Row:
    rows = await postgres.fetch(sql.SELECT_STATE)
    if not rows:
        raise SchemaError(
            "table vat_state has lost its row, so nothing was read or written. Run setup(), which"
            " puts it back; do not empty tables whose names begin with vat_."
        )
    return rows[0]


def _other_prefix(prefix: str) -> ConfigurationError:
    return ConfigurationError(
        f"the other processes of this database use key_prefix={prefix!r}, so nothing was read or"
        " written: steps under another one would be seen by nobody. Use the same."
    )


def _needs_hot_tier() -> ConfigurationError:
    return ConfigurationError(
        "this database has a hot tier: other processes keep steps in Redis that are not in"
        " Postgres yet, so nothing was read or written without it. Pass its redis= URL."
    )


def _refuse_foreign(shared: Shared, found: bytes, hot_tier: str | None) -> None:
    if hot_tier is None or found != hot_tier.encode():
        msg = (
            "this Redis is the hot tier of another database, or of what this one was before, so"
            " nothing was read or written. Use another Redis, or another key_prefix; or, if those"
            f" steps are not wanted, delete its keys: {{{shared.settings.key_prefix}:*"
        )
        raise ConfigurationError(msg)


async def _note_policy(shared: Shared, hot: Hot) -> None:
    policy = await hot.script(scripts.POLICY, [shared.keys.identity], [])
    shared.may_evict_journals = policy is not None and policy.startswith(b"allkeys-")
    if shared.may_evict_journals:
        logger.warning(
            "this Redis has maxmemory-policy %s and may evict steps that are not in Postgres yet,"
            " so every step is committed at once (flush_every=1). Set volatile-lru or noeviction.",
            policy.decode(),
        )


async def degrade(shared: Shared, backend: Backend) -> None:
    """
    Go past Redis from here on. When this returns no process serves an earlier head.

    Raises:
        UnavailableError: Postgres does not answer either: nothing may be acknowledged.
    """
    if not shared.is_degraded:
        shared.counters.degraded += 1
        await _raise_epoch(shared, backend, _DEGRADED_TTLS * shared.settings.epoch_ttl_s, None)
        logger.warning(
            "Redis does not answer, or refuses to write: until it is well every step is committed"
            " in Postgres before it is acknowledged, which is slower. Nothing is lost."
        )
    await _until_obeyed(shared, backend)


async def _stay_past(shared: Shared, backend: Backend) -> None:
    """Redis does not answer: begin a degraded epoch, or go on with the one that would end."""
    if not shared.is_degraded:
        await degrade(shared, backend)
        return
    seconds = _DEGRADED_TTLS * shared.settings.epoch_ttl_s
    params = {"epoch": shared.state.epoch, "seconds": seconds}
    await change_row(backend, sql.EXTEND_EPOCH, params)


async def _raise_epoch(
    shared: Shared, backend: Backend, seconds: float, hot_runs: str | None
) -> None:
    params = {"seconds": seconds, "hot_runs": hot_runs}
    rows = await change_row(backend, sql.RAISE_EPOCH, params)
    epoch, shared.state.lease_s = rows[0]
    _learn(shared, epoch, now(), is_degraded=True)
