"""
Whether Redis may be trusted right now.

One row in Postgres, (epoch, hot tier, degraded until), is what every process
agrees on. A head counts only under the current epoch, and a process serves
one only if it has read the row within the last `epoch_ttl_s` seconds. So a
process that cannot reach Redis raises the epoch, waits that long, and may
then write past Redis: no head from before is served by anyone, whoever dies
in between. The same happens when another Redis process holds the data than
the row says: it may remember less than the one before. While
`degraded_until` lies ahead every process commits each step in Postgres and
neither serves nor fills heads.
"""

import logging
import uuid

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._hot import scripts
from langgraph_vat._io.protocols import Arg, Backend, Hot, HotTierError
from langgraph_vat._ops.shared import Shared, now
from langgraph_vat.errors import ConfigurationError, UnavailableError

logger = logging.getLogger("langgraph_vat")

# For so many times `epoch_ttl_s` nobody tries a Redis that failed.
_DEGRADED_TTLS = 5


async def hot_to_write(shared: Shared, backend: Backend) -> Hot | None:
    """Return Redis, or None to write past it. The row's last reading will do: a put cannot lie."""
    if shared.state.read_at == float("-inf"):
        await refresh(shared, backend)
    return await _unless_degraded(shared, backend)


async def hot_to_read(shared: Shared, backend: Backend) -> Hot | None:
    """Return Redis, or None to read past it, after making sure the row was read just now."""
    if now() - shared.state.read_at >= shared.settings.epoch_ttl_s:
        await refresh(shared, backend)
    return await _unless_degraded(shared, backend)


async def _unless_degraded(shared: Shared, backend: Backend) -> Hot | None:
    if not shared.is_degraded:
        return backend.hot
    await _until_obeyed(shared, backend)
    return None


async def _until_obeyed(shared: Shared, backend: Backend) -> None:
    """Wait until no process serves a head, or takes a step, under an earlier epoch."""
    left = shared.state.obeyed_at - now()
    if left > 0:
        await backend.sleep(left)


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
            f"no answer from Redis at {address}. Nothing was written. Check the address, the"
            " credentials and that the server runs; or leave out redis= to use Postgres alone."
        )
        raise UnavailableError(msg) from error


async def refresh(shared: Shared, backend: Backend) -> None:
    """
    Read the row, and look whether Redis is still the one it names.

    Raises:
        ConfigurationError: The database belongs to another Redis, or this
            Redis to another database.
        UnavailableError: Postgres does not answer.
    """
    read_at = now()
    epoch, hot_tier, hot_runs, degraded_s = (await backend.durable.fetch(sql.SELECT_STATE))[0]
    if backend.hot is None and hot_tier is not None:
        msg = (
            "this database has a hot tier: other processes keep steps in Redis that are not in"
            " Postgres yet, so nothing was read or written without it. Pass its redis= URL."
        )
        raise ConfigurationError(msg)
    if epoch != shared.state.epoch:
        shared.state.obeyed_at = read_at + shared.settings.epoch_ttl_s
    shared.state.epoch, shared.state.degraded_until = epoch, read_at + degraded_s
    if backend.hot is not None and degraded_s <= 0:
        try:
            await _attach(shared, backend, backend.hot, hot_tier, hot_runs)
        except HotTierError:
            await degrade(shared, backend)
    shared.state.read_at = read_at


async def _attach(
    shared: Shared, backend: Backend, hot: Hot, hot_tier: str | None, hot_runs: str | None
) -> None:
    is_start = shared.state.read_at == float("-inf")
    if is_start:
        await _note_policy(shared, hot)
    runs = await hot.run_ids()
    found = await hot.script(scripts.IDENTIFY, [shared.keys.identity], ["", 0])
    if found is not None and hot_tier is None:
        # Another process may have claimed both since the row was read.
        _, hot_tier, hot_runs, _ = (await backend.durable.fetch(sql.SELECT_STATE))[0]
    if found is not None:
        _refuse_foreign(found, hot_tier)
    if hot_tier is None:
        ours = {"hot_tier": str(uuid.uuid4()), "hot_runs": runs}
        await backend.durable.fetch(sql.CLAIM_HOT_TIER, ours)
        hot_tier = (await backend.durable.fetch(sql.SELECT_STATE))[0][1]
    elif found is None or runs != hot_runs:
        # Redis lost its memory, or one with an older memory took its place:
        # heads may be stale, and others may hold steps that only they have.
        has_others = not (is_start and shared.is_first)
        wait_s = shared.settings.flush_after + shared.settings.epoch_ttl_s if has_others else 0
        await _raise_epoch(shared, backend, wait_s, runs)
        if has_others:
            logger.warning(
                "Redis was restarted, replaced or emptied: for %.0f s steps go to Postgres, and"
                " every process flushes what it holds. Nothing that was acknowledged is lost.",
                wait_s,
            )
    if found is None:
        arguments: list[Arg] = [str(hot_tier), 1]
        found = await hot.script(scripts.IDENTIFY, [shared.keys.identity], arguments)
        _refuse_foreign(found, hot_tier)


def _refuse_foreign(found: bytes, hot_tier: str | None) -> None:
    if hot_tier is None or found != hot_tier.encode():
        msg = (
            "this Redis is the hot tier of another database (under the same key_prefix), so nothing"
            " was read or written. Use another Redis, or another key_prefix."
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
    await _until_obeyed(shared, backend)


async def _raise_epoch(
    shared: Shared, backend: Backend, seconds: float, hot_runs: str | None
) -> None:
    params = {"seconds": seconds, "hot_runs": hot_runs}
    epoch = (await backend.durable.fetch(sql.RAISE_EPOCH, params))[0][0]
    state, known_at = shared.state, now()
    state.epoch, state.degraded_until = epoch, known_at + seconds
    state.obeyed_at = known_at + shared.settings.epoch_ttl_s
