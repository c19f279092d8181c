"""
The interleavings that break a two-tier saver, each made to happen.

Two saver objects on the same servers are two processes. A faulty backend dies
between any two calls to a server: what it leaves behind must be enough.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

from langgraph_vat import ConflictError, HybridSaver, ThreadDeletedError, UnavailableError
from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._hot import scripts
from langgraph_vat._io.driver import drive
from langgraph_vat._ops.flush import flush
from langgraph_vat._ops.shared import now
from langgraph_vat._ops.tiers import degrade, refresh
from tests.fix_processes import kill


class Death(BaseException):
    """The process was killed."""


class Faulty:
    """Forwards a backend's verbs; dies before or after the n-th of them."""

    def __init__(self, backend: Any, dies_at: int, *, after: bool) -> None:
        self.backend, self.left, self.after = backend, dies_at, after
        self.durable = self._wrap(backend.durable, ("transact", "fetch"))
        self.hot = self._wrap(backend.hot, ("script", "read_each"))
        self.sleep = backend.sleep

    def _wrap(self, tier: Any, names: tuple[str, ...]) -> Any:
        return SimpleNamespace(**{name: self._verb(getattr(tier, name)) for name in names})

    def _verb(self, verb: Any) -> Any:
        async def call(*args: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise Death
            answer = await verb(*args)
            if self.left == 0:
                raise Death
            return answer

        return call


def at(thread: str = "t", checkpoint_id: str | None = None) -> Any:
    found = {"thread_id": thread, "checkpoint_ns": ""}
    return {"configurable": found | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


def put(
    saver: HybridSaver,
    parent: Any = None,
    value: Any = 0,
    thread: str = "t",
    checkpoint_id: str = "",
    kept: Any = "kept",
) -> Any:
    """Put a child of `parent` whose channel has a new value; return its config."""
    checkpoint = {**empty_checkpoint(), "id": checkpoint_id or str(uuid6())}
    versions = {"a": saver.get_next_version(None, None), "kept": "1"}
    checkpoint["channel_values"] = {"a": value, "kept": kept}
    checkpoint["channel_versions"] = versions
    new = versions if parent is None else {"a": versions["a"]}
    return saver.put(parent or at(thread), checkpoint, {"step": value, "run_id": f"r{value}"}, new)


def values(saver: HybridSaver, thread: str = "t") -> list[Any]:
    return [found.checkpoint["channel_values"]["a"] for found in saver.list(at(thread))]


def rows(url: str) -> int:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT count(*) FROM checkpoints").fetchone()[0]


def is_whole(saver: HybridSaver) -> bool:
    """Whether every checkpoint has its values and its parent."""
    found = list(saver.list(at()))
    ids = {one.checkpoint["id"] for one in found}
    return all(
        one.checkpoint["channel_values"].get("kept") == "kept"
        and (one.parent_config is None or one.parent_config["configurable"]["checkpoint_id"] in ids)
        for one in found
    )


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("flush_every", [1, 3])
def test_killed_between_any_two_calls_nothing_acknowledged_is_lost(process, flush_every, after):
    for dies_at in range(1, 200):
        thread = f"t{dies_at}"
        saver = process(flush_every=flush_every)
        faulty = Faulty(saver._life.connections.blocking(), dies_at, after=after)
        saver._life.blocking = lambda faulty=faulty: faulty
        acknowledged, config = [], None
        try:
            for step in range(4):
                config = put(saver, config, step, thread)
                acknowledged.append(step)
                saver.put_writes(config, [("a", step)], "task")
            died = False
        except Death:
            died = True
        kill(saver)
        fresh = process()
        kept = values(fresh, thread)
        assert kept[-len(acknowledged) :] == acknowledged[::-1] if acknowledged else True
        assert kept == sorted(kept, reverse=True)
        latest = fresh.get_tuple(at(thread))
        assert (latest.checkpoint["channel_values"]["a"] if latest else None) == max(
            kept, default=None
        )
        saver.close()
        fresh.close()
        if not died:
            break
    assert dies_at >= 10  # it did die at every call before


def test_redis_loses_its_memory_and_the_writers_copies_save_the_step(process, client):
    saver, other = process(), process()
    config = put(saver, None, 1)
    put(saver, config, 2)
    client.flushall()
    saver.flush()
    assert values(other) == [2, 1]
    assert other.get_tuple(at()).checkpoint["channel_values"]["a"] == 2


def test_a_head_filled_before_the_copies_arrived_is_not_served_after(process, client):
    saver, other = process(), process()
    config = put(saver, None, 1)
    saver.flush()
    put(saver, config, 2)
    client.delete(*client.keys("*}:*"))
    other._shared.state.read_at = float("-inf")
    other.get_tuple(at())  # may be 1: Redis has just lost its memory
    saver.flush()
    assert other.get_tuple(at()).checkpoint["channel_values"]["a"] == 2


def test_what_follows_a_loss_of_memory_finds_its_base_among_the_copies(process, client):
    saver, other = process(), process()
    config = put(saver, None, 1)
    client.flushall()
    config = put(saver, config, 2)
    put(saver, config, 3)  # relies on values that only the copies have
    client.delete(*client.keys("*}:h:*"))
    for one in (saver, other):
        assert one.get_tuple(at()).checkpoint["channel_values"] == {"a": 3, "kept": "kept"}
    assert values(other) == [3, 2, 1]


def test_a_late_child_of_a_deleted_thread_is_refused(process, postgres_url):
    saver, other = process(), process()
    config = put(saver, None, 1)
    other.delete_thread("t")
    for late in (lambda: put(saver, config, 2), lambda: saver.put_writes(config, [("a", 1)], "x")):
        with pytest.raises(ThreadDeletedError):
            late()
    assert saver.get_tuple(at()) is None
    saver.flush()
    assert rows(postgres_url) == 0
    put(saver, None, 3)
    assert values(other) == [3]


def test_a_late_write_is_refused_though_redis_heard_nothing_of_the_deletion(process, postgres_url):
    saver, other = process(), process()
    config = put(saver, None, 1)
    saver.flush()
    drive(degrade(other._shared, other._life.connections.blocking()))
    other.delete_thread("t")  # past Redis, where the thread is open still
    end_degradation(postgres_url, other, saver)
    with pytest.raises(ThreadDeletedError):
        saver.put_writes(config, [("a", 1)], "task")


@pytest.mark.parametrize("is_delta", [True, False])
def test_a_late_child_is_refused_though_a_late_write_came_first(process, postgres_url, is_delta):
    saver = process()
    config = put(saver, None, 1)
    saver.delete_thread("t")
    saver.get_tuple(at())  # a new conversation may begin
    saver.put_writes(config, [("a", 1)], "task")  # of a step that may still be on its way
    late = put if is_delta else with_all_values
    with pytest.raises(ThreadDeletedError):
        late(saver, config, 2)
    saver.flush()
    assert rows(postgres_url) == 0


def test_a_delete_takes_no_step_in_between(process):
    saver, other = process(), process()
    config = put(saver, None, 1)
    other.get_tuple(at())
    backend = saver._life.connections.blocking()
    late: list[type | None] = []

    async def transact(body: Any) -> Any:
        done = await backend.durable.transact(body)
        try:  # the rows are gone, and the thread is not open yet
            put(other, config, 2)
            late.append(None)
        except ThreadDeletedError as error:
            late.append(type(error))
        return done

    durable = SimpleNamespace(fetch=backend.durable.fetch, transact=transact)
    saver._life.blocking = lambda: SimpleNamespace(
        durable=durable, hot=backend.hot, sleep=backend.sleep
    )
    saver.delete_thread("t")
    assert set(late) == {ThreadDeletedError}


def test_an_emptied_redis_is_passed_by_until_the_writers_have_flushed(
    process, client, postgres_url
):
    saver = process()
    put(saver, None, 1)
    client.flushall()
    saver._shared.state.read_at = float("-inf")
    saver.get_tuple(at())
    put(saver, None, 2, "u")
    assert rows(postgres_url) == 2


@pytest.mark.parametrize("is_delta", [True, False])
def test_a_child_waits_for_a_parent_that_only_its_writer_still_has(
    process, client, postgres_url, is_delta
):
    saver, other = process(), process()
    first = put(saver, None, 1)
    other.get_tuple(at())
    second = (put if is_delta else with_all_values)(other, first, 2)
    client.flushall()
    other._shared.state.read_at = float("-inf")
    for call in (other.flush, lambda: other.get_tuple(at())):
        with pytest.raises(UnavailableError, match="another process"):
            call()  # and never an older checkpoint, or none
    assert rows(postgres_url) == 0  # never a child without its parent
    saver._shared.state.read_at = float("-inf")
    saver.flush()
    put(other, second, 3)
    assert values(other) == [3, 2, 1]
    assert is_whole(process())


def test_a_process_that_comes_new_waits_for_a_parent_that_only_its_writer_still_has(
    process, client
):
    writer, other = process(), process()
    config = put(writer, None, 1)
    client.flushall()
    flusher = threading.Timer(0.5, writer.flush)
    flusher.start()
    put(other, config, 2)
    flusher.join()
    assert values(other) == [2, 1]


@pytest.mark.parametrize("is_delta", [True, False])
def test_what_two_failures_lost_blocks_nothing_for_ever(
    process, client, postgres_url, is_delta, monkeypatch
):
    saver, other = process(), process()
    first = put(saver, None, 1)
    other.get_tuple(at())
    if is_delta:
        put(other, first, 2)
    else:
        with_all_values(other, first, 2)
    kill(saver)
    client.flushall()
    other._shared.state.read_at = float("-inf")
    with pytest.raises(UnavailableError, match="another process"):
        other.get_tuple(at())
    end_degradation(postgres_url, other)
    monkeypatch.setattr("langgraph_vat._ops.flush._BASELESS_S", 0.0)
    other.flush()
    found = list(other.list(at()))
    assert [one.parent_config for one in found] == ([] if is_delta else [None])
    config = found[0].config if found else None
    put(other, config, 3)
    assert other.get_tuple(at()).checkpoint["channel_values"] == {"a": 3, "kept": "kept"}


def with_all_values(saver: HybridSaver, parent: Any, value: Any) -> Any:
    checkpoint = {**empty_checkpoint(), "id": str(uuid6())}
    versions = {channel: saver.get_next_version(None, None) for channel in ("a", "kept")}
    checkpoint |= {"channel_values": {"a": value, "kept": "kept"}, "channel_versions": versions}
    return saver.put(parent, checkpoint, {}, versions)


def test_copies_and_journals_of_a_deleted_thread_stay_away(process, client, postgres_url):
    saver, other = process(), process()
    put(saver, None, 1)
    journal = {key: client.dump(key) for key in client.keys("*}:j:*")}
    other.delete_thread("t")
    saver.flush()  # its own copies, of the generation that is gone
    for key, dump in journal.items():  # a replica that lagged
        client.restore(key, 0, dump)
    client.zadd(saver._shared.keys.dirty("t"), {"t": 1})
    process().flush()
    assert rows(postgres_url) == 0
    assert process().get_tuple(at()) is None


def forget_flushed(url: str) -> None:
    """Have the writer not learn what others flushed of his: so much came since."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE vat_threads SET flushed = '{}'")


def test_pruned_rows_stay_away_from_older_copies(process, client, postgres_url):
    saver, other = process(), process()
    config = put(saver, None, 1)
    config = put(saver, config, 2)
    put(saver, config, 3)
    other.prune(["t"])
    assert rows(postgres_url) == 1
    forget_flushed(postgres_url)
    saver.flush()
    assert rows(postgres_url) == 1
    assert values(process()) == [3]


def test_deleted_runs_stay_away_from_older_copies(process, client, postgres_url):
    saver, other = process(), process()
    config = put(saver, None, 1)
    put(saver, config, 2)
    other.delete_for_runs(["r2"])
    assert other.get_tuple(at()).checkpoint["channel_values"]["a"] == 1
    forget_flushed(postgres_url)
    saver.flush()
    assert values(process()) == [1]


def test_runs_that_another_process_deleted_keep_nobody_waiting(process, postgres_url):
    saver, other = process(), process()
    config = put(saver, None, 1)
    config = put(saver, config, 2)
    other.flush()  # the writer does not know, and keeps its copies
    other.delete_for_runs(["r1"])
    forget_flushed(postgres_url)
    begun = time.monotonic()
    put(saver, config, 3)
    assert values(saver) == [3, 2]
    assert is_whole(saver)
    assert time.monotonic() < begun + 5


def test_a_slow_fill_does_not_set_the_head_back(process, client):
    slow, quick = process(), process()
    config = put(slow, None, 1)
    slow.flush()
    client.delete(*client.keys("*}:h:*"))
    backend = slow._life.connections.blocking()
    overtaken = []

    async def fetch(query: Any, params: Any = None) -> Any:
        found = await backend.durable.fetch(query, params)
        if "ORDER BY c.checkpoint_id DESC" in query and not overtaken:
            overtaken.append(put(quick, config, 2))  # after the fill's read, before its script
            quick.flush()
            client.delete(*client.keys("*}:h:*"))
        return found

    durable = SimpleNamespace(fetch=fetch, transact=backend.durable.transact)
    slow._life.blocking = lambda: SimpleNamespace(
        durable=durable, hot=backend.hot, sleep=backend.sleep
    )
    slow.get_tuple(at())
    assert overtaken
    assert quick.get_tuple(at()).checkpoint["channel_values"]["a"] == 2


def test_the_head_is_missing_before_every_read(process, client):
    saver, other, config = process(), process(), None
    for step in range(6):
        config = put(saver, config, step)
        for one in (other, saver):
            client.delete(*client.keys("*}:h:*"))
            assert newest(one) == step


def test_a_forks_head_never_mixes_versions(process):
    saver, other = process(), process()
    root = put(saver, None, 0)
    put(saver, root, 1)
    put(other, root, 2)
    latest = saver.get_tuple(at()).checkpoint
    assert latest["channel_values"] == {"a": 2, "kept": "kept"}
    assert len(values(process())) == 3
    assert is_whole(process())


def test_a_thread_left_closed_by_a_dead_process_opens_again(process, client):
    saver = process()
    config = put(saver, None, 1)
    meta = saver._shared.keys.meta("t")
    fence = client.hget(meta, "f")
    journal, dirty = saver._shared.keys.journal("t"), saver._shared.keys.dirty("t")
    client.eval(scripts.CLOSE.source, 3, meta, journal, dirty, fence, "t")
    put(saver, config, 2)
    assert values(process()) == [2, 1]


def test_a_thread_left_closed_is_opened_though_nobody_comes_by(process, client):
    saver, other = process(), process(flush_after=0.01)
    put(saver, None, 1)
    meta, dirty = saver._shared.keys.meta("t"), saver._shared.keys.dirty("t")
    three = meta, saver._shared.keys.journal("t"), dirty
    client.eval(scripts.CLOSE.source, 3, *three, client.hget(meta, "f"), "t")
    kill(saver)
    time.sleep(0.02)
    other._life._round()
    assert not client.exists(meta, dirty)
    assert newest(other) == 1


def test_a_torn_head_is_not_served(process, client):
    saver = process()
    config = put(saver, None, 1)
    (head,) = client.keys("*}:h:*")
    older = {name: client.hget(head, name) for name in ("n:a", "b:a")}
    put(saver, config, 2)
    client.hset(head, mapping=older)  # whole by itself, and of another checkpoint
    assert saver.get_tuple(at()).checkpoint["channel_values"]["a"] == 2


def test_a_step_that_waited_and_was_stored_by_another_process_is_forgotten(process):
    saver = process()
    saver._shared.baseless.update({b"old": now() - 700, b"new": now()})
    put(saver, None, 1)
    saver.flush()
    assert [*saver._shared.baseless] == [b"new"]


def test_redis_goes_and_comes_back(own_redis, postgres_url):
    options: Any = {"redis": own_redis.url, "flush_after": 600.0, "timeout_s": 2.0}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        saver._life._flusher.stop()  # or it may be the first to notice
        config = put(saver, None, 1)
        own_redis.kill()
        config = put(saver, config, 2)
        assert rows(postgres_url) == 2
        assert saver.get_tuple(at()).checkpoint["channel_values"]["a"] == 2
        own_redis.start()
        end_degradation(postgres_url, saver)
        assert saver.get_tuple(at()).checkpoint["channel_values"]["a"] == 2
        put(saver, config, 3)
        assert values(saver) == [3, 2, 1]


@pytest.mark.parametrize("is_flushed", [True, False])
def test_a_redis_that_went_back_in_time_is_not_believed(own_redis, postgres_url, is_flushed):
    options: Any = {"redis": own_redis.url, "flush_after": 600.0}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        saver._life._flusher.stop()
        config = put(saver, None, 1)
        with own_redis.remembering():  # what a replica that lagged has
            put(saver, config, 2)
            if is_flushed:
                saver.flush()
        with HybridSaver.from_conn_string(postgres_url, **options) as other:
            other._life._flusher.stop()
            other.get_tuple(at())  # notices
            saver._shared.state.read_at = float("-inf")
            saver.flush()
            for _ in range(2):
                assert other.get_tuple(at()).checkpoint["channel_values"]["a"] == 2
                end_degradation(postgres_url, saver, other)
            assert values(other) == [2, 1]


def end_degradation(url: str, *savers: HybridSaver) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(sql.LOCK_STATE)
        connection.execute("UPDATE vat_state SET degraded_until = now()")
    for saver in savers:
        drive(refresh(saver._shared, saver._life.connections.blocking(), may_try=True))


def newest(saver: HybridSaver, thread: str = "t") -> Any:
    return saver.get_tuple(at(thread)).checkpoint["channel_values"]["a"]


def test_a_writer_that_slept_through_a_loss_overtakes_no_head_unseen(process, client, postgres_url):
    saver, other = process(), process()
    config = put(saver, None, 1)
    saver.flush()
    put(saver, config, 2)
    client.flushall()
    other._shared.state.read_at = float("-inf")
    other.get_tuple(at())
    end_degradation(postgres_url, other)
    assert [newest(other), newest(other)] == [1, 1]
    saver.flush()  # it was frozen all the while, and knows of nothing
    assert newest(other) == 2


def trust_before_next_transaction(saver: HybridSaver, other: HybridSaver, url: str) -> None:
    """Have `other` trust Redis again, and fill a head, when `saver` was about to go past it."""
    backend = saver._life.connections.blocking()
    seen: list[Any] = []

    async def transact(body: Any) -> Any:
        if not seen:
            end_degradation(url, other)
            seen.append(newest(other))
        return await backend.durable.transact(body)

    durable = SimpleNamespace(fetch=backend.durable.fetch, transact=transact)
    late = SimpleNamespace(durable=durable, hot=backend.hot, sleep=backend.sleep)
    saver._life.blocking = lambda: late


def test_nobody_goes_past_a_redis_that_is_trusted_again(process, postgres_url):
    saver, other = process(), process()
    config = put(saver, None, 1)
    saver.flush()
    drive(degrade(saver._shared, saver._life.connections.blocking()))
    trust_before_next_transaction(saver, other, postgres_url)
    put(saver, config, 2)
    assert newest(other) == 2


@pytest.mark.parametrize("is_deletion", [True, False])
def test_no_history_is_changed_past_a_redis_that_is_trusted_again(
    process, postgres_url, is_deletion
):
    saver, other = process(), process()
    config = put(saver, None, 1)
    put(saver, config, 2)
    saver.flush()
    drive(degrade(saver._shared, saver._life.connections.blocking()))
    trust_before_next_transaction(saver, other, postgres_url)
    if is_deletion:
        saver.delete_thread("t")
        assert other.get_tuple(at()) is None
    else:
        saver.delete_for_runs(["r2"])
        assert newest(other) == 1


def test_a_journal_from_before_redis_failed_undoes_no_later_write(process, postgres_url):
    saver = process()
    config = put(saver, None, 1)
    saver.put_writes(config, [("__resume__", "first")], "task")
    drive(degrade(saver._shared, saver._life.connections.blocking()))
    saver.put_writes(config, [("__resume__", "second")], "task")  # past Redis
    end_degradation(postgres_url, saver)
    saver.flush()  # the journal that Redis still has
    for found in (saver.get_tuple(at()), *process().list(at())):
        assert found.pending_writes == [("task", "__resume__", "second")]


def test_a_frozen_postgres_is_not_waited_for_for_ever(own_postgres, redis_url):
    options: Any = {"redis": redis_url, "timeout_s": 0.5, "flush_every": 3, "flush_after": 600.0}
    with HybridSaver.from_conn_string(own_postgres.url, **options) as saver:
        saver._life._flusher.stop()
        config = put(saver, put(saver, None, 1), 2)
        own_postgres.pause()
        config = put(saver, config, 3)  # a flush is due, and has to wait
        with pytest.raises(UnavailableError, match="Timeout"):
            list(saver.list(at()))
        own_postgres.resume()
        put(saver, config, 4)
        assert values(saver) == [4, 3, 2, 1]


def test_a_frozen_process_holds_no_thread_for_ever(process, postgres_url, redis_url):
    frozen, saver = process(), process()
    config = put(saver, None, 1)
    options: Any = {"redis": redis_url, "timeout_s": 0.3, "flush_after": 600.0}
    hasty = HybridSaver.from_conn_string(postgres_url, **options)

    async def freeze(session: Any) -> None:
        await session.fetch("SELECT FROM vat_threads FOR UPDATE")
        saver.flush()  # waits for the frozen one's lock, until the server ends that session
        raise Death

    with pytest.raises(Death):
        drive(hasty._life.connections.blocking().durable.transact(freeze))
    hasty.close()
    frozen.put_writes(config, [("a", 1)], "task")
    assert values(frozen) == [1]


def test_postgres_goes_and_comes_back(own_postgres, redis_url):
    options: Any = {"redis": redis_url, "flush_after": 600.0, "timeout_s": 2.0, "flush_every": 2}
    with HybridSaver.from_conn_string(own_postgres.url, **options) as saver:
        saver._life._flusher.stop()
        config = put(saver, None, 1)
        own_postgres.kill()
        config = put(saver, config, 2)
        config = put(saver, config, 3)
        with pytest.raises(UnavailableError):
            list(saver.list(at()))
        own_postgres.start()
        assert values(saver) == [3, 2, 1]


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ({"max_backlog": 3}, r"3 super-steps of thread 't' \(max_backlog\)"),
        ({"max_backlog_bytes": 400}, r"bytes of this process \(max_backlog_bytes\)"),
    ],
)
def test_a_full_backlog_refuses_the_next_step_and_keeps_the_others(
    own_postgres, redis_url, limit, told
):
    options: Any = {"redis": redis_url, "flush_after": 600.0, "timeout_s": 1.0, "flush_every": 3}
    with HybridSaver.from_conn_string(own_postgres.url, **options, **limit) as saver:
        saver._life._flusher.stop()
        taken = [put(saver, None, 1)]
        own_postgres.kill()

        def go_on() -> None:
            while len(taken) < 8:
                taken.append(put(saver, taken[-1], len(taken) + 1))

        with pytest.raises(UnavailableError, match=told):
            go_on()
        with pytest.raises(UnavailableError, match=told):
            saver.put_writes(taken[-1], [("a", 1)], "task")
        assert len(taken) >= 2
        own_postgres.start()
        put(saver, taken[-1], len(taken) + 1)
        assert values(saver) == list(range(len(taken) + 1, 0, -1))


def test_a_put_waits_while_the_backlog_is_full(own_postgres, redis_url):
    options: Any = {"redis": redis_url, "flush_after": 600.0, "timeout_s": 20.0, "flush_every": 2}
    with HybridSaver.from_conn_string(own_postgres.url, max_backlog=2, **options) as saver:
        saver._life._flusher.stop()
        config = put(saver, None, 1)
        own_postgres.kill()
        config = put(saver, config, 2)
        later = threading.Timer(1.0, own_postgres.start)
        later.start()
        put(saver, config, 3)
        later.join()
        assert values(saver) == [3, 2, 1]


@pytest.mark.parametrize("is_hot", [True, False])
def test_the_second_of_two_runs_is_refused_where_forks_are(postgres_url, redis_url, is_hot):
    options: Any = {"redis": redis_url if is_hot else None, "on_conflict": "raise"}
    one, other = (HybridSaver.from_conn_string(postgres_url, **options) for _ in range(2))
    with one, other:
        config = put(one, None, 1)
        assert put(other, config, 2)
        before = [found.config for found in one.list(at())]
        with pytest.raises(ConflictError, match="went on from"):
            put(one, config, 3)
        with pytest.raises(ConflictError):
            put(one, None, 3)
        assert [found.config for found in one.list(at())] == before
        again = one.get_tuple(at())
        checkpoint, metadata = again.checkpoint, again.metadata
        one.put(again.parent_config, checkpoint, metadata, {})  # the same step, once more
        assert values(one) == [2, 1]
        put(one, again.config, 3)
        assert newest(other) == 3


def test_forks_are_refused_while_redis_is_away_too(own_redis, postgres_url):
    options: Any = {"redis": own_redis.url, "on_conflict": "raise", "timeout_s": 2.0}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        config = put(saver, None, 1)
        put(saver, config, 2)
        own_redis.kill()
        with pytest.raises(ConflictError):
            put(saver, config, 3)
        own_redis.start()


def test_no_head_of_a_redis_in_the_place_of_another_is_served(own_redis, postgres_url):
    options: Any = {"redis": own_redis.url, "flush_after": 600.0}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        saver._life._flusher.stop()
        config = put(saver, None, 1)
        with own_redis.remembering():
            put(saver, config, 2)
            saver.flush()
        saver._shared.state.read_at = now()  # the row says nothing yet, and is not asked
        assert newest(saver) == 2


def test_an_answer_that_took_longer_than_a_lease_is_not_believed(
    process, postgres_url, monkeypatch
):
    saver, other = process(), process()
    config = put(saver, None, 1)
    saver.flush()
    hot, seen = saver._life.connections.blocking().hot, []
    script = hot.script

    async def late(which: Any, *args: Any) -> Any:
        if which is scripts.GET and not seen:
            seen.append(which)
            drive(degrade(other._shared, other._life.connections.blocking()))
            put(other, config, 2)
        return await script(which, *args)

    monkeypatch.setattr(hot, "script", late)
    assert newest(saver) == 2
    assert seen


def test_a_head_from_before_an_epoch_stays_away_whatever_else_is_opened(process, postgres_url):
    """A process that could not write to Redis went past it, and then a subgraph was read."""
    saver = process()
    config = put(saver, None, 1)
    drive(degrade(saver._shared, saver._life.connections.blocking()))
    put(saver, config, 2)
    end_degradation(postgres_url, saver)
    nested: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": "nested"}}
    assert saver.get_tuple(nested) is None
    assert newest(saver) == 2


def test_a_step_that_must_be_durable_is_not_acknowledged_before(own_postgres, redis_url):
    options: Any = {"redis": redis_url, "flush_after": 600.0, "timeout_s": 1.0, "flush_every": 1}
    with HybridSaver.from_conn_string(own_postgres.url, **options) as saver:
        saver._life._flusher.stop()
        config = put(saver, None, 1)
        own_postgres.kill()
        with pytest.raises(UnavailableError):
            put(saver, config, 2)
        with pytest.raises(UnavailableError):
            saver.put_writes(config, [("a", 1)], "task")
        own_postgres.start()


def test_a_fill_counts_in_the_epoch_in_which_it_began(process, client, postgres_url, monkeypatch):
    saver, other = process(), process()
    config = put(saver, None, 1)
    saver.flush()
    client.delete(*client.keys("*}:h:*"))
    durable, seen = saver._life.connections.blocking().durable, []
    fetch = durable.fetch

    async def late(which: Any, *args: Any) -> Any:
        rows = await fetch(which, *args)
        if which is sql.SELECT_LATEST and not seen:
            seen.append(which)
            drive(degrade(other._shared, other._life.connections.blocking()))
            put(other, config, 2)
            end_degradation(postgres_url, other, saver)
            newest(other)
            drive(refresh(saver._shared, saver._life.connections.blocking()))
        return rows

    monkeypatch.setattr(durable, "fetch", late)
    saver.get_tuple(at())
    assert seen
    assert newest(saver) == 2
    assert newest(other) == 2


def test_no_process_believes_a_head_that_is_older_than_its_own_step(process, client, postgres_url):
    saver, other = process(), process()
    config = put(saver, None, 1)
    saver.flush()
    put(saver, config, 2)
    client.flushall()
    other._shared.state.read_at = float("-inf")
    other.get_tuple(at())  # notices; the writer's copies are not flushed in time
    end_degradation(postgres_url, other, saver)
    assert newest(other) == 1
    assert newest(saver) == 2
    assert newest(other) == 2


def test_a_clock_behind_another_is_counted_and_said(process, caplog):
    saver, earlier = process(), str(uuid6())
    later = put(saver, None, 2)
    put(saver, later, 1, checkpoint_id=earlier)
    assert newest(saver) == 2
    assert saver.stats.out_of_order == 1
    assert "clock" in caplog.text
    assert len(list(saver.list(at()))) == 2


@pytest.mark.parametrize(
    "policy",
    [
        *("noeviction", "allkeys-lru", "allkeys-lfu", "allkeys-random"),
        *("volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl"),
    ],
)
def test_a_full_redis_loses_nothing_whatever_its_policy(policy, client, postgres_url, redis_url):
    client.config_set("maxmemory-policy", policy)
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 2_000_000)
    evicted = client.info("stats")["evicted_keys"]
    try:
        with HybridSaver.from_conn_string(
            postgres_url, redis=redis_url, flush_every=4, epoch_ttl_s=0.05, flush_after=0.1
        ) as saver:
            for number in range(60):
                config = None
                for step in range(5):
                    config = put(saver, config, step, f"{number}", kept="x" * 100_000)
                assert newest(saver, f"{number}") == 4
            for number in range(60):
                assert newest(saver, f"{number}") == 4
            saver.flush()
            assert len(list(saver.list(None))) == 300
            is_full = client.info("stats")["evicted_keys"] > evicted or saver.stats.degraded
            assert is_full
    finally:
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")


def test_a_thread_whose_journal_was_evicted_is_not_dirty_for_ever(process, client):
    saver = process()
    put(saver, None, 1)
    client.delete(saver._shared.keys.journal("t"))
    saver.flush()
    assert not client.exists(*saver._shared.keys.buckets)
    assert values(saver) == [1]


def test_whoever_goes_past_redis_waits_for_the_longest_lease(process, client):
    patient, hasty = process(epoch_ttl_s=2.0), process(epoch_ttl_s=0.1)
    config = put(patient, None, 1)
    patient.flush()
    assert newest(patient) == 1  # and it may believe so for two seconds
    drive(degrade(hasty._shared, hasty._life.connections.blocking()))
    put(hasty, config, 2)
    assert newest(patient) == 2


def test_no_caller_waits_for_a_redis_that_failed(process, postgres_url, monkeypatch, caplog):
    saver = process(epoch_ttl_s=0.01)
    config = put(saver, None, 0)
    backend, tries = saver._life.connections.blocking(), []
    drive(degrade(saver._shared, backend))
    assert "Redis does not answer" in caplog.text
    with psycopg.connect(postgres_url) as connection:
        connection.execute("UPDATE vat_state SET degraded_until = now()")
    run_ids = backend.hot.run_ids

    async def count() -> str:
        tries.append(1)
        return await run_ids()

    monkeypatch.setattr(backend.hot, "run_ids", count)
    for step in range(1, 5):
        config = put(saver, config, step)
        assert newest(saver) == step
    assert not tries
    saver._life._round()
    assert tries
    assert "Redis is well" in caplog.text
    hits = saver.stats.hits
    assert [newest(saver), newest(saver)] == [4, 4]
    assert saver.stats.hits > hits


def test_no_put_waits_for_a_postgres_that_failed(own_postgres, redis_url, monkeypatch, caplog):
    options: Any = {"flush_every": 2, "flush_after": 600.0, "timeout_s": 1.0}
    with HybridSaver.from_conn_string(own_postgres.url, redis=redis_url, **options) as saver:
        saver._life._flusher.stop()
        config = put(saver, None, 0)
        durable, tries = saver._life.connections.blocking().durable, []
        transact = durable.transact

        async def count(body: Any) -> Any:
            tries.append(1)
            return await transact(body)

        monkeypatch.setattr(durable, "transact", count)
        own_postgres.pause()
        for step in range(1, 8):
            config = put(saver, config, step)
        assert len(tries) == 1
        assert "Postgres does not answer" in caplog.text
        own_postgres.resume()
        saver._life._round()
        put(saver, put(saver, config, 8), 9)
        assert len(tries) > 1
        assert rows(own_postgres.url) >= 9
        assert "answers again" in caplog.text


@contextmanager
def sharing_the_state(url: str, holders: int, held_s: float) -> Iterator[None]:
    """Hold the row as transactions past Redis do: at every moment some of them."""
    stop = threading.Event()

    def hold(held_s: float) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            while not stop.is_set():
                with connection.transaction():
                    connection.execute(sql.SHARE_STATE)
                    stop.wait(held_s)

    # Each for another time, or the end of one would be the end of all.
    times = [held_s * (1 + at / holders) for at in range(holders)]
    threads = [threading.Thread(target=hold, args=[one]) for one in times]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_however_many_write_past_redis_it_is_trusted_again(process, postgres_url):
    saver = process(epoch_ttl_s=0.01, timeout_s=2.0)
    put(saver, None, 1)
    drive(degrade(saver._shared, saver._life.connections.blocking()))
    with sharing_the_state(postgres_url, holders=4, held_s=0.2):
        time.sleep(0.5)
        drive(refresh(saver._shared, saver._life.connections.blocking(), may_try=True))
        assert not saver._shared.is_degraded


def test_who_holds_the_state_and_is_frozen_keeps_nobody_from_writing(process, postgres_url, caplog):
    saver, other = process(epoch_ttl_s=0.01), process(epoch_ttl_s=0.01)
    config = put(saver, None, 1)
    drive(degrade(saver._shared, saver._life.connections.blocking()))
    with psycopg.connect(postgres_url) as frozen:
        frozen.execute(sql.SHARE_STATE)
        with pytest.raises(UnavailableError, match="frozen"):
            drive(degrade(other._shared, other._life.connections.blocking()))
        begun = time.monotonic()
        saver._life._round()
        put(saver, config, 2)
        assert time.monotonic() < begun + 3
    assert rows(postgres_url) == 2
    assert "Postgres does not answer" not in caplog.text


@pytest.mark.parametrize("is_own", [True, False])
def test_what_a_thread_begins_with_is_not_taken_for_what_a_deleted_one_left(
    process, client, is_own
):
    saver, other = process(), process()
    put(saver, None, 1)
    saver.delete_thread("t")
    backend = saver._life.connections.blocking()

    async def script(name: Any, keys: Any, args: Any) -> Any:
        # The flush found no row to lock; now there is one.
        if name is scripts.JOURNAL and not values_begun:
            values_begun.append(put(saver if is_own else other, None, 2))
        return await backend.hot.script(name, keys, args)

    values_begun: list[Any] = []
    hot = SimpleNamespace(script=script, read_each=backend.hot.read_each)
    late = SimpleNamespace(durable=backend.durable, hot=hot, sleep=backend.sleep)
    drive(flush(saver._shared, late, ["t"], wait=False))
    assert values_begun
    kill(saver)  # either may be lost, and Redis is not
    kill(other)
    assert values(process()) == [2]


def test_a_flush_that_comes_late_does_not_put_off_the_next(process, postgres_url):
    saver = process(flush_every=4)
    backend, config, trims = saver._life.connections.blocking(), None, []

    async def script(name: Any, keys: Any, args: Any) -> Any:
        if name is scripts.TRIM:  # another flush brought the same entries a moment before
            trims.append(args)
            await backend.hot.script(name, keys, args)
            put(saver, put(saver, config, 5), 6)
        return await backend.hot.script(name, keys, args)

    for step in range(1, 4):
        config = put(saver, config, step)
    hot = SimpleNamespace(script=script, read_each=backend.hot.read_each)
    drive(flush(saver._shared, SimpleNamespace(durable=backend.durable, hot=hot), ["t"]))
    assert len(trims) == 1
    config = saver.get_tuple(at()).config
    put(saver, put(saver, config, 7), 8)
    assert rows(postgres_url) == 3 + 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_flush_beside_another_takes_nothing_for_lost(process, client, when):
    saver = process(flush_every=4)
    backend = saver._life.connections.blocking()

    async def script(name: Any, keys: Any, args: Any) -> Any:
        if name is not scripts.TRIM:
            return await backend.hot.script(name, keys, args)
        reply = await backend.hot.script(name, keys, args) if when == "after" else None
        await flush(saver._shared, backend, ["t"])  # before the first one has ended
        return reply or await backend.hot.script(name, keys, args)

    put(saver, put(saver, None, 1), 2)
    hot = SimpleNamespace(script=script, read_each=backend.hot.read_each)
    drive(flush(saver._shared, SimpleNamespace(durable=backend.durable, hot=hot), ["t"]))
    assert client.exists(saver._shared.keys.head("t", ""))
    misses = saver.stats.misses
    assert newest(saver) == 2
    assert saver.stats.misses == misses


def test_a_flush_that_read_the_copies_before_another_dropped_them(process, client, monkeypatch):
    saver = process(flush_every=4)
    backend, copies = saver._life.connections.blocking(), saver._shared.copies
    dropping, dropped = copies.drop, threading.Event()

    async def script(name: Any, keys: Any, args: Any) -> Any:
        if name is scripts.JOURNAL:  # the other one ends just now
            dropping("t", [entry.uid for entry in copies.of("t")])
            client.xtrim(saver._shared.keys.journal("t"), maxlen=0)
        return await backend.hot.script(name, keys, args)

    def drop(thread_id: str, uids: Any) -> None:
        uids = list(uids)
        if uids and not dropped.is_set():  # not when it has only looked what others stored
            dropped.set()
            hot = SimpleNamespace(script=script, read_each=backend.hot.read_each)
            beside = SimpleNamespace(durable=backend.durable, hot=hot)
            drive(flush(saver._shared, beside, ["t"]))
        dropping(thread_id, uids)

    put(saver, put(saver, None, 1), 2)
    monkeypatch.setattr(copies, "drop", drop)
    saver.flush()
    assert dropped.is_set()
    assert client.exists(saver._shared.keys.head("t", ""))
    assert newest(saver) == 2


def special(saver, config, value):
    saver.put_writes(config, [("__resume__", value)], "task")


def test_what_another_process_flushed_is_not_stored_again(process, postgres_url):
    """A copy of one's own step is older than what others made of it since."""
    saver, other = process(), process()
    first = put(saver, at())
    config = put(saver, first)
    special(saver, config, "first")
    other.flush()
    special(other, config, "second")
    checkpoint = saver.get_tuple(config).checkpoint
    other.put(first, checkpoint, {"by": "other"}, {})
    other.flush()
    flushed = saver.stats.flushed_steps
    saver.flush()
    assert saver.stats.flushed_steps == flushed
    assert not saver._shared.copies.of("t")
    for reader in (saver, other, process()):
        for found in (reader.get_tuple(at()), reader.get_tuple(config), next(reader.list(at()))):
            assert [value for _, _, value in found.pending_writes] == ["second"]
            assert found.metadata["by"] == "other"


def test_a_copy_brings_no_pruned_parent_back(process):
    saver, other = process(), process()
    put(saver, put(saver, at()))
    other.prune(["t"], strategy="keep_latest")
    saver.flush()
    found = saver.get_tuple(at())
    assert found.parent_config is None
    assert list(other.list(at())) == [found]


def test_of_two_processes_in_turn_each_step_is_flushed_once(process):
    savers = process(flush_every=3), process(flush_every=3)
    config = at()
    for number in range(40):
        config = put(savers[number % 2], config)
    for saver in savers:
        saver.flush()
    assert sum(saver.stats.flushed_steps for saver in savers) == 40
