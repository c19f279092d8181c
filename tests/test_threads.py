"""Threads as a whole: found unread, kept for as long as a policy says, gone for good."""

import contextlib
import itertools
import math
import operator
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Annotated, Any, TypedDict

import psycopg
import pytest
import redis
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import START, StateGraph

from langgraph_vat import (
    ConfigurationError,
    HybridSaver,
    InvalidInputError,
    Keyring,
    Retention,
    Settings,
    ThreadDeletedError,
)
from langgraph_vat._ops import flush, sweep
from langgraph_vat._records import Swept

NOTHING = Swept(0, 0, 0)
IDLE = Retention(default_ttl=60)
TENANTS = ("a", "a:b", "1:a", "ä🦊", "%_")
TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes", "vat_threads", "vat_floors")


def _makes(redis_url: str | None, postgres_url: str) -> Any:
    """Give a maker of savers that only flush when they must."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> HybridSaver:
            given = {"redis": redis_url, "flush_every": 1000, "flush_after": 600.0, **options}
            saver = HybridSaver.from_conn_string(postgres_url, **given)
            return stack.enter_context(saver)

        yield make


@pytest.fixture(params=["hot", "durable"])
def make(request, postgres_url, redis_url):
    yield from _makes(redis_url if request.param == "hot" else None, postgres_url)


@pytest.fixture
def make_hot(postgres_url, redis_url):
    yield from _makes(redis_url, postgres_url)


def at(thread: str, checkpoint_id: str | None = None, ns: str = "") -> Any:
    found = {"thread_id": thread, "checkpoint_ns": ns}
    return {"configurable": found | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


def put(saver: Any, config: Any, value: Any = "value", **metadata: Any) -> Any:
    checkpoint = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": {"a": value}}
    versions = checkpoint["channel_versions"] = {"a": saver.get_next_version(None, None)}
    return saver.put(config, checkpoint, {"step": 1, **metadata}, versions)


def grow(saver: Any, thread: str, steps: int = 3, ns: str = "", **metadata: Any) -> Any:
    """Add steps whose value grows, as a conversation does."""
    newest = saver.get_tuple(at(thread, ns=ns))
    config = newest.config if newest else at(thread, ns=ns)
    value = newest.checkpoint["channel_values"]["a"] if newest else []
    for _ in range(steps):
        value = [*value, f"message {random.random()}" * 9]
        config = put(saver, config, value, **metadata)
        saver.put_writes(config, [("a", [*value, "next"])], "task")
    return config


def states(saver: Any, thread: str) -> dict[tuple[str, str], Any]:
    return {
        (one.config["configurable"]["checkpoint_ns"], one.checkpoint["id"]): (
            one.checkpoint,
            one.metadata,
            one.pending_writes,
        )
        for one in saver.list({"configurable": {"thread_id": thread}})
    }


def ask(url: str, query: str, *params: Any) -> list[Any]:
    with psycopg.connect(url) as connection:
        cursor = connection.execute(query, params)
        return cursor.fetchall() if cursor.description else []


def age(url: str, minutes: float, *threads: str, column: str = "updated_at") -> None:
    """Let threads, or all, seem older than they are."""
    ask(
        url,
        f"UPDATE vat_threads SET {column} = now() - %s * interval '1 minute'"
        " WHERE %s OR thread_id = ANY(%s)",
        minutes,
        not threads,
        list(threads),
    )


def rows(url: str) -> dict[str, list[str]]:
    return {
        table: [row for (row,) in ask(url, f"SELECT t::text FROM {table} t ORDER BY 1")]
        for table in TABLES
    }


def names(found: Any) -> list[str]:
    return [one.thread_id for one in found]


def until(is_so: Any, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- search --------------------------------------------------------------


def test_the_thread_with_the_newest_step_comes_first(make):
    saver = make()
    for thread in ("one", "two", "three", "one"):
        put(saver, at(thread))
        saver.flush()
    found = saver.threads.search()
    assert names(found) == ["one", "three", "two"]
    assert [one.steps for one in found] == [2, 1, 1]
    assert all(one.created_at <= one.updated_at for one in found)
    assert found[0].created_at < found[2].updated_at < found[0].updated_at
    assert names(saver.threads.search(limit=2)) == ["one", "three"]


def test_steps_that_nobody_flushed_are_seen_by_every_saver(make):
    saver, other = make(), make()
    head = grow(saver, "t", 3)["configurable"]["checkpoint_id"]
    for one in (saver, other):
        (found,) = one.threads.search()
        assert (found.thread_id, found.steps, found.head_id) == ("t", 3, head)
    grow(other, "t", 1)
    assert saver.threads.search()[0].steps == 4


def test_pages_lead_through_ties_once_each_while_others_write(make, postgres_url):
    saver = make(thread_metadata=("kind",))
    threads = [f"t{number}" for number in range(40)]
    for number, thread in enumerate(threads):
        put(saver, at(thread), kind=number % 2)
    saver.flush()
    age(postgres_url, 60)
    age(postgres_url, 90, *threads[::3])
    for metadata, expected in ((None, threads), ({"kind": 1}, threads[1::2])):
        seen, last, moved = [], None, set()
        while page := saver.threads.search(metadata=metadata, before=last, limit=7):
            seen += names(page)
            assert len(seen) <= len(expected)
            last = page[-1]
            # To the front go one that was seen, one that was not, and one that is new.
            waiting = [one for one in expected if one not in moved.union(seen)]
            for thread in (seen[0], *waiting[:1]):
                put(saver, at(thread), kind=threads.index(thread) % 2)
                moved.add(thread)
            put(saver, at(f"new {len(seen)}"))
            saver.flush()
        assert len(seen) == len(set(seen)) > 3 * len(expected) / 4
        assert set(expected) - moved <= set(seen) <= set(expected)


def test_metadata_is_the_newest_that_root_checkpoints_said_of_each_key(make):
    saver = make(thread_metadata=("user", "tags"))
    first = put(saver, at("t"), user="ada", tags={"x": [1, 2]}, other=1)
    second = put(saver, first, user="bob", tags={"x": [3]})
    put(saver, at("t", ns="sub"), user="inner")
    (found,) = saver.threads.search()
    assert found.metadata == {"user": "bob", "tags": {"x": [3]}}
    older = {**empty_checkpoint(), "id": "0" * 36}
    saver.put(at("t"), older, {"step": 0, "user": "old"}, {})
    (found,) = saver.threads.search(metadata={"user": "bob"})
    assert (found.head_id, found.steps) == (second["configurable"]["checkpoint_id"], 4)
    assert names(saver.threads.search(metadata={"tags": {"x": [3]}})) == ["t"]
    for other in ({"user": "ada"}, {"user": "inner"}, {"user": "old"}, {"user": None}):
        assert not saver.threads.search(metadata=other)
    third = put(saver, second)
    put(saver, third, user="eve")
    assert saver.threads.search()[0].metadata == {"user": "eve", "tags": {"x": [3]}}
    saver.copy_thread("t", "copy")
    assert saver.threads.search()[0].metadata == {"user": "eve", "tags": {"x": [3]}}


def test_metadata_follows_when_the_newest_checkpoint_goes(make):
    saver = make(thread_metadata=("user",))
    first = put(saver, at("t"), user="ada", run_id="r1")
    put(saver, first, user="bob", run_id="r2")
    saver.delete_for_runs(["r2"])
    (found,) = saver.threads.search()
    assert found.head_id == first["configurable"]["checkpoint_id"]
    assert found.metadata == {"user": "ada"}


def test_a_copy_has_the_metadata_of_what_was_copied(make):
    saver = make(thread_metadata=("user",))
    grow(saver, "t", 2, user="ada")
    saver.copy_thread("t", "u")
    assert set(names(saver.threads.search(metadata={"user": "ada"}))) == {"t", "u"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"metadata": {"thread": 1}},
        {"metadata": {"user": 1, "other": 2}},
        {"metadata": {1: 2}},
        {"metadata": {"user": object}},
        {"metadata": {"user": math.nan}},
        {"metadata": {"user": "\0"}},
        {"metadata": {"user": "\ud800"}},
        {"metadata": {"user": 2**70}},
        *({"limit": limit} for limit in (0, -1, True, 1.5, "1", None, 2**70)),
    ],
    ids=str,
)
async def test_what_cannot_be_searched_for_is_refused(make, wrong):
    saver = make(thread_metadata=("user",))
    put(saver, at("t"), user="ada")
    with pytest.raises(InvalidInputError):
        saver.threads.search(**wrong)
    with pytest.raises(InvalidInputError):
        await saver.threads.asearch(**wrong)


def test_nobody_sees_or_sweeps_or_keeps_another_tenants_threads(make, postgres_url):
    saver = make(thread_metadata=("of",))
    views = {None: saver} | {tenant: saver.scoped(tenant) for tenant in TENANTS}
    for tenant, view in views.items():
        for thread in ("t", "u"):
            put(view, at(thread), of=tenant)
    put(saver, at("only"), of=None)
    for tenant, view in views.items():
        mine = {"t", "u"} | ({"only"} if tenant is None else set())
        assert set(names(view.threads.search())) == mine
        assert set(names(view.threads.search(metadata={"of": tenant}))) == mine
        assert not view.threads.search(metadata={"of": "another"})
        first, *rest = view.threads.search()
        assert view.threads.search(before=first) == rest
    with pytest.raises(InvalidInputError):
        saver.scoped("a").threads.retain("only", IDLE)
    saver.scoped("a").threads.retain("t", Retention())
    assert [one.thread_id for one in saver.threads.search() if one.retention] == []
    age(postgres_url, 90)
    assert saver.scoped("a:b").threads.sweep(IDLE).threads == 2
    assert saver.scoped("a").threads.sweep(IDLE).threads == 1
    assert {t: len(v.threads.search()) for t, v in views.items()} == {
        None: 3, "a": 1, "a:b": 0, "1:a": 2, "ä🦊": 2, "%_": 2
    }  # fmt: skip
    assert saver.threads.sweep(IDLE).threads == 9
    assert names(saver.scoped("a").threads.search()) == ["t"]


def test_of_sealed_metadata_only_what_was_declared_can_be_read(make, postgres_url, redis_url):
    saver = make(keyring=Keyring.generate(), thread_metadata=("user",))
    config = {**at("t"), "metadata": {"user": "ada-lovelace"}}
    put(saver, config, "hidden value", secret="hidden-note")
    assert names(saver.threads.search(metadata={"user": "ada-lovelace"})) == ["t"]
    assert saver.threads.search()[0].metadata == {"user": "ada-lovelace"}
    assert saver.get_tuple(at("t")).metadata["secret"] == "hidden-note"
    saver.flush()
    assert "ada-lovelace" in "".join(rows(postgres_url)["vat_threads"])
    everything = "".join(map("".join, rows(postgres_url).values()))
    with redis.Redis.from_url(redis_url) as client:
        everything += "".join(client.dump(key).hex() for key in client.scan_iter())
    for secret in ("hidden", "secret"):
        assert secret not in everything
        assert secret.encode().hex() not in everything


def test_without_a_declaration_nothing_of_sealed_metadata_can_be_read(make, postgres_url):
    saver = make(keyring=Keyring.generate())
    grow(saver, "t", 2, user="ada-lovelace")
    assert saver.threads.search()[0].metadata == {}
    everything = "".join(map("".join, rows(postgres_url).values()))
    assert "ada-lovelace" not in everything
    assert b"ada-lovelace".hex() not in everything


# --- what is told of a thread ----------------------------------------------


def told(saver: Any) -> dict[str, tuple[int, str]]:
    return {one.thread_id: (one.steps, one.head_id) for one in saver.threads.search(limit=1000)}


def counted(url: str) -> dict[str, tuple[int, str]]:
    query = """SELECT thread_id, count(*), coalesce(
        max(checkpoint_id COLLATE "C") FILTER (WHERE checkpoint_ns = ''), '')
        FROM checkpoints GROUP BY thread_id"""
    return {thread: (steps, head) for thread, steps, head in ask(url, query)}


PLACES = """SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints
    UNION SELECT thread_id, checkpoint_ns, NULL FROM checkpoints"""


def place(config: Any) -> tuple[str, str, str | None]:
    found = config["configurable"]
    return found["thread_id"], found["checkpoint_ns"], found.get("checkpoint_id")


@pytest.mark.parametrize("seed", range(3))
def test_steps_and_head_are_what_the_tables_say_whatever_was_done(make, postgres_url, seed):
    rng = random.Random(seed)
    savers = make(), make(flush_every=3)
    made: list[tuple[Any, ...]] = []
    early = [str(uuid6()) for _ in range(40)]
    runs, copies = itertools.count(), itertools.count()

    def step(saver: Any) -> None:
        config = at(rng.choice("tuvw"), ns=rng.choice(["", "", "sub:1"]))
        if made and rng.random() < 0.8:
            config = rng.choice(made[-6:])[0]
        new = str(uuid6()) if rng.random() < 0.85 or not early else early.pop()
        checkpoint = {**empty_checkpoint(), "id": new, "channel_values": {"a": new * 20}}
        versions = checkpoint["channel_versions"] = {"a": saver.get_next_version(None, None)}
        args = checkpoint, {"step": 1, "run_id": str(next(runs))}, versions
        made.append((saver.put(config, *args), config, args))

    def again(saver: Any) -> None:
        _, config, args = rng.choice(made[-10:])
        saver.put(config, *args)

    def write(saver: Any) -> None:
        saver.put_writes(rng.choice(made[-10:])[0], [("a", rng.random())], rng.choice("xyz"))

    rare = [
        lambda saver: saver.flush(),
        lambda saver: saver.prune([rng.choice("tuvw")]),
        lambda saver: saver.delete_for_runs([one[2][1]["run_id"] for one in made[-9::3]]),
        lambda saver: saver.copy_thread(
            rng.choice(list(counted(postgres_url)) or ["t"]), f"copy {next(copies)}"
        ),
        lambda saver: saver.delete_thread(rng.choice("tuvw")),
        lambda saver: saver.threads.sweep(Retention(keep_last=rng.randint(1, 9))),
    ]
    step(savers[0])
    for _ in range(250):
        usual = [step] * 12 + [again] * 3 * bool(made) + [write] * 6 * bool(made)
        act = rng.choice([*usual, rng.choice(rare)])
        with contextlib.suppress(InvalidInputError):  # nothing is left of what is to be copied
            act(rng.choice(savers))
        if act in rare:
            assert told(rng.choice(savers)) == counted(postgres_url)
            there = set(ask(postgres_url, PLACES))
            made[:] = [one for one in made if place(one[0]) in there and place(one[1]) in there]
    for saver in savers:
        saver.flush()
        assert told(saver) == counted(postgres_url)
    assert len(told(savers[0])) > 2


def test_a_journal_that_is_flushed_twice_is_counted_once(make_hot, postgres_url, monkeypatch):
    async def lose(*_: Any) -> None:
        """The process dies between the commit and the trim."""

    saver = make_hot()
    grow(saver, "t", 5)
    grow(saver, "t", 2, ns="sub")
    with monkeypatch.context() as patched:
        patched.setattr(flush, "_trim", lose)
        saver.flush()
    before = told(saver)
    saver.flush()
    assert told(saver) == before == counted(postgres_url)
    assert before["t"][0] == 7


def test_bytes_grow_with_what_is_stored_and_shrink_with_what_is_pruned(make, postgres_url):
    saver, sizes = make(), []

    def size() -> int:
        (found,) = saver.threads.search()
        return found.bytes

    for _ in range(3):
        put(saver, at("t"), random.randbytes(10_000))
        sizes.append(size())
    config = put(saver, at("t"), random.randbytes(10_000))
    saver.put_writes(config, [("a", random.randbytes(20_000))], "task")
    sizes.append(size())
    gained = [after - before for before, after in itertools.pairwise([0, *sizes])]
    assert all(10_000 <= gain < 13_000 for gain in gained[:3])
    assert 30_000 <= gained[3] < 35_000
    saver.prune(["t"])
    assert 30_000 <= size() < 35_000
    stored = sum(
        ask(postgres_url, f"SELECT coalesce(sum(length({column})), 0)::bigint FROM {table}")[0][0]
        for table, column in (("checkpoint_blobs", "blob"), ("checkpoint_writes", "blob"))
    )
    assert stored <= size() < stored + 3_000


@pytest.mark.parametrize("storage", ["compact", "compatible"])
def test_bytes_told_are_those_that_a_copy_and_a_sweep_count(make, storage):
    saver = make(storage=storage)
    grow(saver, "t", 40)
    before = {one.thread_id: one.bytes for one in saver.threads.search()}
    saver.copy_thread("t", "copy")
    after = {one.thread_id: one.bytes for one in saver.threads.search()}
    assert after["t"] == before["t"] == pytest.approx(after["copy"], rel=0.3)
    left = saver.threads.sweep(Retention(keep_last=1)).bytes
    kept = sum(one.bytes for one in saver.threads.search())
    assert left + kept == pytest.approx(sum(after.values()), rel=0.3)


def test_a_thread_that_postgres_saver_wrote_is_found_after_it_was_read(postgres_url):
    with PostgresSaver.from_conn_string(postgres_url) as theirs:
        theirs.setup()
        with HybridSaver.from_conn_string(postgres_url, storage="compatible") as ours:
            head = grow(theirs, "t", 4)
            put(theirs, at("t", ns="sub"))
            ours.get_tuple(at("t"))
            assert told(ours) == {"t": (5, head["configurable"]["checkpoint_id"])}
            assert ours.threads.search()[0].bytes > 0
            put(ours, head)
            assert told(ours) == counted(postgres_url)


def test_the_metadata_that_postgres_saver_wrote_is_searched_too(postgres_url):
    with PostgresSaver.from_conn_string(postgres_url) as theirs:
        theirs.setup()
        options: Any = {"storage": "compatible", "thread_metadata": ("user",)}
        with HybridSaver.from_conn_string(postgres_url, **options) as ours:
            put(theirs, at("t"), user="ada")
            ours.get_tuple(at("t"))
            assert names(ours.threads.search(metadata={"user": "ada"})) == ["t"]


# --- retention -------------------------------------------------------------


def test_a_sweep_leaves_what_others_use(postgres_url):
    with (
        PostgresSaver.from_conn_string(postgres_url) as theirs,
        HybridSaver.from_conn_string(postgres_url, storage="compatible") as ours,
    ):
        theirs.setup()
        config = grow(ours, "t", 2)
        age(postgres_url, 90)
        config = put(theirs, config)
        assert ours.threads.sweep(IDLE, dry_run=True) == NOTHING
        assert ours.threads.sweep(IDLE) == NOTHING
        assert ours.get_tuple(at("t")).config == config
        assert [one.steps for one in ours.threads.search()] == [3]
        age(postgres_url, 90)
        assert ours.threads.sweep(IDLE).checkpoints == 3


def test_without_a_policy_everything_is_kept_for_ever(make, postgres_url):
    saver = make()
    grow(saver, "t")
    saver.flush()
    for column in ("updated_at", "created_at"):
        age(postgres_url, 10_000_000, column=column)
    for policy in (None, Retention(), Retention(strategy="keep_latest")):
        assert saver.threads.sweep(policy) == NOTHING
    assert told(saver)["t"][0] == 3


@pytest.mark.parametrize(
    ("policy", "column"),
    [(IDLE, "updated_at"), (Retention(max_age=60), "created_at")],
    ids=["idle", "old"],
)
def test_a_thread_goes_when_its_time_is_over_and_not_before(make, postgres_url, policy, column):
    saver = make(retention=policy)
    for thread in ("due", "soon", "new"):
        grow(saver, thread, 3)
    saver.flush()
    age(postgres_url, 59.0, "soon", column=column)
    age(postgres_url, 60.1, "due", column=column)
    size = next(one.bytes for one in saver.threads.search() if one.thread_id == "due")
    swept = saver.threads.sweep()
    assert swept[:2] == (1, 3)
    assert swept.bytes == pytest.approx(size, abs=1000)
    assert saver.threads.sweep() == NOTHING
    assert set(names(saver.threads.search())) == {"soon", "new"}
    assert saver.get_tuple(at("due")) is None
    assert not any("due" in row for table in rows(postgres_url).values() for row in table)


def test_a_step_makes_an_idle_thread_young_and_not_an_old_one(make, postgres_url):
    saver = make()
    grow(saver, "t")
    saver.flush()
    for column in ("updated_at", "created_at"):
        age(postgres_url, 90, column=column)
    grow(saver, "t", 1)
    saver.flush()
    assert saver.threads.sweep(IDLE) == NOTHING
    assert saver.threads.sweep(Retention(max_age=60))[:2] == (1, 4)


def test_of_each_namespace_the_newest_are_kept_as_they_were(make):
    saver = make()
    for ns, steps in (("", 20), ("sub:1", 5), ("sub:2", 1)):
        grow(saver, "t", steps, ns)
    grow(saver, "short", 3)
    before = states(saver, "t")
    swept = saver.threads.sweep(Retention(keep_last=3))
    assert swept[:2] == (1, 17 + 2)
    assert swept.bytes > 0
    assert saver.threads.sweep(Retention(keep_last=3)) == NOTHING
    newest = {
        place
        for ns in ("", "sub:1", "sub:2")
        for place in sorted(one for one in before if one[0] == ns)[-3:]
    }
    for one in (saver, make()):
        after = states(one, "t")
        assert after == {place: before[place] for place in newest}
        assert one.get_tuple(at("t")).checkpoint == before[max(p for p in newest if not p[0])][0]
    assert len(states(saver, "short")) == 3
    grow(saver, "t", 2)
    saver.flush()
    assert saver.threads.sweep(Retention(keep_last=3))[:2] == (1, 2)


@pytest.mark.parametrize("storage", ["compact", "compatible"])
def test_an_expired_thread_may_keep_its_newest_and_is_pruned_again_after_new_steps(
    make, postgres_url, storage
):
    saver = make(storage=storage)
    policy = Retention(default_ttl=60, strategy="keep_latest")
    for steps, gone in ((20, 20), (0, 0), (3, 4)):
        grow(saver, "t", steps)
        put(saver, at("t", ns="sub")) if gone == 20 else None
        before = states(saver, "t")
        saver.flush()
        assert saver.threads.sweep(policy) == NOTHING
        age(postgres_url, 90)
        swept = saver.threads.sweep(policy)
        expected = len(before) - 2
        assert swept[:2] == ((1, expected) if expected else (0, 0))
        assert saver.threads.sweep(policy) == NOTHING
        newest = {max(place for place in before if place[0] == ns) for ns in ("", "sub")}
        assert states(saver, "t") == states(make(), "t") == {p: before[p] for p in newest}


@pytest.mark.parametrize(
    ("first", "then", "left"),
    [
        (Retention(keep_last=6), Retention(keep_last=2), 2),
        (Retention(keep_last=6), Retention(default_ttl=60, strategy="keep_latest"), 1),
        (
            Retention(keep_last=6, default_ttl=100, strategy="keep_latest"),
            Retention(keep_last=6, default_ttl=60, strategy="keep_latest"),
            1,
        ),
    ],
    ids=["fewer", "expired", "expired by one policy"],
)
def test_what_one_policy_kept_another_may_let_go_of(make, postgres_url, first, then, left):
    saver = make()
    grow(saver, "t", 10)
    saver.flush()
    age(postgres_url, 90)
    assert saver.threads.sweep(first)[:2] == (1, 4)
    assert saver.threads.sweep(then)[:2] == (1, 6 - left)
    assert saver.threads.sweep(then) == NOTHING
    assert len(states(saver, "t")) == left


def _append(state: list[str] | None, writes: list[Any]) -> list[str]:
    return [*(state or []), *(item for write in writes for item in write)]


class Delta(TypedDict):
    log: Annotated[list[str], DeltaChannel(_append, snapshot_frequency=5)]
    plain: Annotated[list[str], operator.add]


@pytest.mark.parametrize(
    "policy",
    [
        Retention(keep_last=1),
        Retention(keep_last=4),
        Retention(default_ttl=60, strategy="keep_latest"),
    ],
    ids=["keep 1", "keep 4", "keep_latest"],
)
def test_kept_states_of_a_graph_with_a_delta_channel_stay_what_they_were(
    make, postgres_url, policy
):
    saver = make()
    builder = StateGraph(Delta)
    builder.add_node("say", lambda s: {"log": [f"{len(s['log'])}" * 50], "plain": ["y" * 200]})
    graph = builder.add_edge(START, "say").compile(checkpointer=saver)
    here: Any = {"configurable": {"thread_id": "t"}}
    for turn in range(6):
        graph.invoke({"log": [f"in {turn}"], "plain": ["x" * 200]}, here)
    before = {one.config["configurable"]["checkpoint_id"]: one.values
              for one in graph.get_state_history(here)}  # fmt: skip
    saver.flush()
    age(postgres_url, 90)
    swept = saver.threads.sweep(policy)
    assert swept.threads == 1
    assert 0 < swept.checkpoints == len(before) - told(saver)["t"][0]
    assert saver.threads.sweep(policy) == NOTHING
    for one in (saver, make()):
        again = builder.compile(checkpointer=one)
        for checkpoint_id in sorted(before)[-(policy.keep_last or 1) :]:
            assert again.get_state(at("t", checkpoint_id)).values == before[checkpoint_id]
        assert again.get_state(here).values == before[max(before)]
    assert (
        graph.invoke({"log": ["on"], "plain": []}, here)["log"][:-2] == before[max(before)]["log"]
    )


def test_only_threads_whose_metadata_has_it_are_swept(make, postgres_url):
    saver = make(thread_metadata=("kind", "of"), keyring=Keyring.generate())
    for thread, kind in (("draft", "draft"), ("final", "final"), ("was a draft", "draft")):
        put(saver, at(thread), kind=kind, of={"x": 1})
    put(saver, saver.get_tuple(at("was a draft")).config, kind="final")
    put(saver, at("none"))
    saver.flush()
    age(postgres_url, 90)
    for other in ({"kind": "other"}, {"kind": "draft", "of": {"x": 2}}):
        assert saver.threads.sweep(Retention(default_ttl=60, metadata=other)) == NOTHING
    mine = {"kind": "draft", "of": {"x": 1}}
    assert saver.threads.sweep(Retention(default_ttl=60, metadata=mine))[:2] == (1, 1)
    assert set(names(saver.threads.search())) == {"final", "was a draft", "none"}


def test_the_metadata_of_a_policy_may_be_any_mapping(make, postgres_url):
    saver = make(thread_metadata=("kind",))
    put(saver, at("t"), kind="draft")
    saver.flush()
    age(postgres_url, 90)
    policy = Retention(default_ttl=60, metadata=MappingProxyType({"kind": "draft"}))
    assert saver.threads.sweep(policy).threads == 1


def test_a_threads_own_policy_stands_for_the_savers(make, postgres_url):
    saver = make(retention=IDLE)
    strict, lax = Retention(default_ttl=1), Retention()
    for thread in ("plain", "strict", "lax", "taken away"):
        grow(saver, thread)
        saver.threads.retain(thread, {"strict": strict, "lax": lax}.get(thread))
    saver.threads.retain("taken away", strict)
    assert {one.thread_id: one.retention for one in saver.threads.search()} == {
        "plain": None, "strict": strict, "lax": lax, "taken away": strict
    }  # fmt: skip
    saver.threads.retain("taken away", None)
    for minutes, gone in ((30, {"strict"}), (90, {"plain", "taken away"}), (10**6, set())):
        age(postgres_url, minutes)
        left = set(names(saver.threads.search()))
        assert saver.threads.sweep().threads == len(gone)
        assert left - set(names(saver.threads.search())) == gone
    saver.threads.retain("lax", Retention(keep_last=1))
    assert saver.threads.sweep(lax)[:2] == (1, 2)


def test_a_policy_is_given_to_known_threads_only_and_goes_with_them(make, postgres_url):
    saver = make(thread_metadata=("a",))
    with pytest.raises(InvalidInputError, match="thread_metadata"):
        saver.threads.retain("never", Retention(keep_last=1, metadata={"b": 1}))
    with pytest.raises(InvalidInputError, match="thread_metadata"):
        saver.threads.sweep(Retention(keep_last=1, metadata={"b": 1}))
    for thread in ("never", "deleted"):
        if thread == "deleted":
            grow(saver, thread)
            saver.threads.retain(thread, Retention(keep_last=1, metadata={"a": [1]}))
            saver.delete_thread(thread)
        for policy in (IDLE, None):
            with pytest.raises(InvalidInputError):
                saver.threads.retain(thread, policy)
    grow(saver, "deleted")
    assert [one.retention for one in saver.threads.search()] == [None]
    assert saver.threads.sweep() == NOTHING


def test_a_thread_whose_newest_step_is_in_redis_only_is_left_alone(make_hot, postgres_url):
    saver, other = make_hot(), make_hot()
    for number, strategy in enumerate(("delete", "keep_latest"), 1):
        grow(saver, "t", 3)
        saver.flush()
        config = grow(saver, "t", 1)
        age(postgres_url, 90)
        policy = Retention(default_ttl=60, strategy=strategy)
        assert other.threads.sweep(policy) == NOTHING
        for one in (saver, other):
            assert one.get_tuple(at("t")).config == config
            assert len(states(one, "t")) == 4 * number


@pytest.mark.parametrize("refused", [["t3"], ["t3", "t5"], ["t3", "t5", "t20"]])
def test_steps_that_postgres_refuses_are_not_swept_away_and_stop_no_sweep(
    make_hot, postgres_url, refused
):
    saver, threads = make_hot(), [f"t{number}" for number in range(24)]
    configs = {thread: grow(saver, thread, 1) for thread in threads}
    saver.flush()
    rule = f"thread_id <> ALL ('{{{','.join(refused)}}}')"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"ALTER TABLE checkpoints ADD CONSTRAINT nope CHECK ({rule}) NOT VALID")
    for thread in refused:
        put(saver, configs[thread], "acknowledged")
    age(postgres_url, 90)
    assert saver.threads.sweep(IDLE)[:2] == (24 - len(refused), 24 - len(refused))
    assert saver.threads.sweep(IDLE, dry_run=True) == NOTHING
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE checkpoints DROP CONSTRAINT nope")
    saver.flush()
    assert {one.thread_id for one in saver.threads.search()} == {*refused}
    assert all(len(states(saver, thread)) == 2 for thread in refused)


def test_what_was_swept_away_does_not_come_back(make, postgres_url):
    sweeper, other = make(), make()
    config = grow(sweeper, "t")
    for _ in range(2):  # from Postgres, then from Redis
        assert other.get_tuple(at("t")).config == config
    sweeper.flush()
    age(postgres_url, 90)
    assert sweeper.threads.sweep(IDLE)[:2] == (1, 3)
    for one in (other, sweeper, make()):
        assert one.get_tuple(at("t")) is None
        with contextlib.suppress(ThreadDeletedError):
            put(one, config)
        with contextlib.suppress(ThreadDeletedError):
            one.put_writes(config, [("a", 1)], "late")
        one.flush()
        assert one.get_tuple(at("t")) is None
        assert not states(one, "t")
        assert told(one) == counted(postgres_url) == {}
    new = put(other, at("t"), "new")
    assert [id_ for _, id_ in states(sweeper, "t")] == [new["configurable"]["checkpoint_id"]]


def test_what_was_pruned_away_does_not_come_back(make):
    saver, other = make(), make()
    grow(saver, "t", 6)
    other.get_tuple(at("t"))
    before = states(saver, "t")
    assert saver.threads.sweep(Retention(keep_last=2))[:2] == (1, 4)
    for place in sorted(before)[:4]:
        with contextlib.suppress(ThreadDeletedError):
            other.put_writes(at("t", place[1]), [("a", 1)], "late")
        assert other.get_tuple(at("t", place[1])) is None
    other.flush()
    assert states(other, "t") == {place: before[place] for place in sorted(before)[-2:]}


# --- dry runs ----------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        IDLE,
        Retention(max_age=60),
        Retention(keep_last=2),
        Retention(default_ttl=60, keep_last=2, strategy="keep_latest"),
    ],
    ids=["idle", "old", "keep_last", "keep_latest"],
)
def test_a_dry_run_changes_nothing_and_tells_what_will_go(make, postgres_url, policy):
    saver = make()
    for number in range(6):
        grow(saver, f"t{number}", 1 + number)
        grow(saver, f"t{number}", number, ns="sub")
    saver.threads.retain("t5", Retention())
    saver.threads.retain("t4", Retention(keep_last=1))
    saver.flush()
    for column in ("updated_at", "created_at"):
        age(postgres_url, 90, "t0", "t1", "t2", column=column)
    before = rows(postgres_url)
    dry = saver.threads.sweep(policy, dry_run=True)
    assert dry.threads > 1
    assert rows(postgres_url) == before
    assert saver.threads.sweep(policy, dry_run=True) == dry
    assert saver.threads.sweep(policy) == dry
    assert rows(postgres_url) != before
    assert saver.threads.sweep(policy, dry_run=True) == NOTHING == saver.threads.sweep(policy)


@pytest.mark.parametrize("column", ["updated_at", "created_at"])
def test_a_dry_run_knows_of_steps_that_are_in_redis_only(make_hot, postgres_url, column):
    saver, policy = make_hot(), IDLE if column == "updated_at" else Retention(max_age=60)
    grow(saver, "t", 2)
    saver.flush()
    grow(saver, "t", 3)
    age(postgres_url, 90, column=column)
    dry = make_hot().threads.sweep(policy, dry_run=True)
    assert saver.threads.sweep(policy)[:2] == dry[:2]


# --- many at once, and killed ------------------------------------------------


@pytest.mark.parametrize("policy", [IDLE, Retention(keep_last=1)], ids=["delete", "prune"])
def test_many_sweepers_at_once_count_each_thread_once(make, postgres_url, policy):
    savers = make(), make()
    for number in range(25):
        grow(savers[0], f"t{number}", 3)
    savers[0].flush()
    age(postgres_url, 90)
    expected = savers[1].threads.sweep(policy, dry_run=True)
    assert expected[:2] == (25, 75 if policy is IDLE else 50)
    start = threading.Barrier(6, timeout=60)

    def run(number: int) -> Swept:
        start.wait()
        return savers[number % 2].threads.sweep(policy)

    with ThreadPoolExecutor(6) as pool:
        swept = list(pool.map(run, range(6)))
    assert Swept(*map(sum, zip(*swept, strict=True))) == expected
    assert len(told(savers[0])) == (0 if policy is IDLE else 25)


SWEEPER = """
import sys
from langgraph_vat import HybridSaver, Retention

with HybridSaver.from_conn_string(sys.argv[1], redis=sys.argv[2] or None) as saver:
    print("ready", flush=True)
    saver.threads.sweep(Retention.of(eval(sys.argv[3])))
"""


@pytest.mark.parametrize("is_hot", [True, False], ids=["hot", "durable"])
@pytest.mark.parametrize("policy", [{"default_ttl": 60}, {"keep_last": 1}], ids=["delete", "prune"])
def test_a_sweeper_that_is_killed_leaves_threads_whole_and_the_next_finishes(
    postgres_url, redis_url, is_hot, policy
):
    url = redis_url if is_hot else None
    threads = [f"t{number:02}" for number in range(60)]
    with HybridSaver.from_conn_string(postgres_url, redis=url) as saver:
        for thread in threads:
            grow(saver, thread, 3)
        saver.flush()
        before = {thread: states(saver, thread) for thread in threads}
        age(postgres_url, 90)

        def steps() -> int:
            return ask(postgres_url, "SELECT count(*) FROM checkpoints")[0][0]

        with psycopg.connect(postgres_url) as holding:  # or a fast one would get done
            holding.execute("SELECT FROM vat_threads WHERE thread_id = 't59' FOR UPDATE")
            for most in (140, 100):
                command = [sys.executable, "-c", SWEEPER, postgres_url, url or "", repr(policy)]
                sweeper = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                assert sweeper.stdout.readline() == "ready\n"
                until(lambda most=most: steps() <= most)
                sweeper.send_signal(signal.SIGKILL)
                sweeper.communicate()
                assert sweeper.returncode == -signal.SIGKILL
        left = Counter()
        for thread in threads[:-1]:
            found = states(saver, thread)
            assert found == dict(sorted(before[thread].items())[3 - len(found) :])
            newest = saver.get_tuple(at(thread))
            assert newest is None if not found else newest.checkpoint["id"] == max(found)[1]
            left[len(found)] += 1
        done = 0 if policy == {"default_ttl": 60} else 1
        assert left.keys() <= {done, 3}
        swept = saver.threads.sweep(Retention.of(policy))
        assert swept[:2] == (left[3] + 1, (left[3] + 1) * (3 - done))
        assert saver.threads.sweep(Retention.of(policy)) == NOTHING
        assert steps() == done * len(threads)
        put(saver, at("t00"))


# --- in the background -------------------------------------------------------


def test_a_saver_sweeps_by_itself(make, postgres_url):
    saver = make(retention={"default_ttl": 60, "sweep_interval_minutes": 0.01})
    for thread in ("idle", "kept", "busy"):
        grow(saver, thread)
    saver.threads.retain("kept", Retention())
    saver.flush()
    age(postgres_url, 90, "idle", "kept")
    until(lambda: set(names(saver.threads.search())) == {"kept", "busy"})


def test_of_two_savers_one_sweeps_in_each_interval(make, postgres_url, monkeypatch):
    calls, real = [], sweep.sweep

    async def noted(*args: Any, **options: Any) -> Swept:
        calls.append(1)
        return await real(*args, **options)

    monkeypatch.setattr(sweep, "sweep", noted)
    make()
    ask(
        postgres_url,
        """CREATE TABLE turns (at TIMESTAMPTZ);
        CREATE FUNCTION note_turn() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN INSERT INTO turns VALUES (NEW.swept_at); RETURN NULL; END';
        CREATE TRIGGER note_turn AFTER UPDATE OF swept_at ON vat_state
        FOR EACH ROW EXECUTE FUNCTION note_turn()""",
    )
    savers = [make(retention={"default_ttl": 60, "sweep_interval_minutes": 0.01}) for _ in "ab"]
    for saver in savers:
        saver.get_tuple(at("t"))
    until(lambda: len(ask(postgres_url, "SELECT at FROM turns")) >= 4)
    for saver in savers:
        saver.close()
    turns = [at for (at,) in ask(postgres_url, "SELECT at FROM turns ORDER BY at")]
    assert all((b - a).total_seconds() >= 0.6 for a, b in itertools.pairwise(turns))
    assert len(calls) == len(turns)


def test_a_thread_that_is_only_read_is_kept_where_the_policy_says_so(make, postgres_url):
    writer = make()
    grow(writer, "read")
    grow(writer, "by id")
    config = writer.get_tuple(at("by id")).config
    grow(writer, "idle")
    writer.flush()
    age(postgres_url, 90)
    # It is nobody's turn before it was read.
    ask(postgres_url, "UPDATE vat_state SET swept_at = now() + interval '1 hour'")
    policy = {"default_ttl": 60, "sweep_interval_minutes": 0.01, "refresh_on_read": True}
    reader = make(retention=policy)
    reader.get_tuple(at("read"))
    reader.get_tuple(config)
    young = "SELECT thread_id FROM vat_threads WHERE updated_at > now() - interval '1 minute'"
    until(lambda: ask(postgres_url, young) == [("read",)])
    ask(postgres_url, "UPDATE vat_state SET swept_at = NULL")
    until(lambda: len(counted(postgres_url)) < 3)
    until(lambda: set(counted(postgres_url)) == {"read"})


def test_a_read_counts_for_the_sweep_right_after_it(make, postgres_url):
    saver = make(retention=Retention(default_ttl=60, refresh_on_read=True))
    grow(saver, "t")
    saver.flush()
    age(postgres_url, 90)
    saver.get_tuple(at("t"))
    assert saver.threads.sweep() == NOTHING


def test_a_read_counts_although_its_saver_was_closed_then(make, postgres_url):
    other = make()
    grow(other, "t")
    other.flush()
    age(postgres_url, 90)
    reader = make(retention=Retention(default_ttl=60, refresh_on_read=True))
    reader.get_tuple(at("t"))
    reader.close()
    assert other.threads.sweep(IDLE) == NOTHING


# --- policies that cannot work -------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            {name: value}
            for name in ("default_ttl", "max_age", "keep_last", "sweep_interval_minutes")
            for value in (0, -1, True, "1", math.nan, math.inf, 10**12, [1])
        ),
        {"keep_last": 1.5},
        {"strategy": "keep"},
        {"strategy": None},
        {"strategy": ["delete"]},
        {"metadata": None},
        {"metadata": [("a", 1)]},
        {"metadata": "a"},
        {"metadata": {1: 2}},
        {"metadata": {"a": object}},
        {"metadata": {"a": 2**70}},
        {"metadata": {"a": "\0"}},
        {"refresh_on_read": 1},
        {"refresh_on_read": None},
        {"ttl": 1},
        {"default_ttl": 1, "Strategy": "delete"},
    ],
    ids=str,
)
def test_a_policy_that_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigurationError):
        Retention.of(wrong)
    with pytest.raises(ConfigurationError):
        Settings.of({"retention": wrong})
    with pytest.raises(ConfigurationError):
        HybridSaver.from_conn_string("postgresql:///x", retention=wrong)
    if wrong.keys() <= set(Retention.__slots__):
        with pytest.raises(ConfigurationError):
            Retention(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"retention": value} for value in ("delete", 60, True, [], {"a": 1})),
        *({"thread_metadata": value} for value in ("user", ["user"], None, (1,), ("",), {"user"})),
    ],
    ids=str,
)
def test_settings_of_threads_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigurationError):
        HybridSaver.from_conn_string("postgresql:///x", **wrong)


def test_a_policy_may_be_a_mapping(make):
    given = {"default_ttl": 1.5, "keep_last": 3, "strategy": "keep_latest", "metadata": {"a": 1}}
    told: Any = {"retention": given, "thread_metadata": ("a",)}
    assert Settings.of(told).retention == Retention(**given) == Retention.of(given)
    with pytest.raises(ConfigurationError, match="thread_metadata"):
        Settings.of({"retention": given})
    assert Settings.of({"retention": None}).retention is None


# --- a tenant ------------------------------------------------------------------


def test_all_threads_of_a_tenant_go_and_only_they(make, postgres_url):
    saver = make()
    views = {tenant: saver.scoped(tenant) for tenant in TENANTS}
    for view in (saver, *views.values()):
        config = [grow(view, f"t{number}", 2) for number in range(3)][-1]
    saver.flush()
    grow(views["a"], "t2", 1)
    late = views["a"].get_tuple(at("t2")).config
    assert views["a"].threads.delete_all() == 3
    assert views["a"].threads.delete_all() == 0
    assert views["a"].get_tuple(at("t0")) is None
    with contextlib.suppress(ThreadDeletedError):
        put(views["a"], late)
    saver.flush()
    assert not views["a"].threads.search()
    assert not any("vat-tenant:1:a:" in row for rs in rows(postgres_url).values() for row in rs)
    for view in (saver, *(views[tenant] for tenant in TENANTS if tenant != "a")):
        assert len(view.threads.search()) == 3
        assert len(states(view, "t1")) == 2
    assert config["configurable"]["thread_id"] == "t2"


def test_a_tenant_with_many_threads_goes_whole(make, postgres_url):
    saver = make()
    grow(saver.scoped("a"), "t", 1)
    ask(
        postgres_url,
        "INSERT INTO vat_threads (thread_id, generation)"
        " SELECT 'vat-tenant:1:a:' || n, gen_random_uuid() FROM generate_series(1, 300) n",
    )
    assert saver.scoped("a").threads.delete_all() == 301
    assert ask(postgres_url, "SELECT count(*) FROM vat_threads") == [(0,)]


async def test_nobody_deletes_the_threads_of_no_tenant_at_once(make):
    saver = make()
    grow(saver, "t")
    with pytest.raises(InvalidInputError, match="scoped"):
        saver.threads.delete_all()
    with pytest.raises(InvalidInputError, match="scoped"):
        await saver.threads.adelete_all()
    assert told(saver)["t"][0] == 3


# --- two faces -----------------------------------------------------------------


async def test_both_faces_say_and_do_the_same(make, postgres_url):
    saver = make(thread_metadata=("kind",), retention=Retention(default_ttl=60, keep_last=2))
    views = saver.scoped("sync"), saver.scoped("async")
    for number in range(6):
        ids = [str(uuid6()) for _ in range(1 + number)]
        for view in views:
            for id_ in ids:
                checkpoint = {**empty_checkpoint(), "id": id_}
                view.put(at(f"t{number}"), checkpoint, {"step": 1, "kind": number % 2}, {})
    saver.flush()
    for number in range(6):
        names_ = [f"vat-tenant:{len(tenant)}:{tenant}:t{number}" for tenant in ("sync", "async")]
        age(postgres_url, 10 * number + 15, *names_)

    async def both(name: str, *args: Any, **options: Any) -> Any:
        blocking = getattr(views[0].threads, name)(*args, **options)
        awaited = await getattr(views[1].threads, f"a{name}")(*args, **options)
        if name == "search":
            blocking, awaited = ([one[3:] for one in found] for found in (blocking, awaited))
        if isinstance(blocking, Swept):
            blocking, awaited = blocking[:2], awaited[:2]
        assert blocking == awaited
        return awaited

    assert len(await both("search")) == 6
    assert len(await both("search", metadata={"kind": 1}, limit=2)) == 2
    firsts = [view.threads.search(limit=1)[0] for view in views]
    rest = views[0].threads.search(before=firsts[0])
    assert names(await views[1].threads.asearch(before=firsts[1])) == names(rest)
    await both("retain", "t5", Retention(keep_last=5))
    dry = await both("sweep", dry_run=True)
    assert dry == await both("sweep") == (4, 1 + 2 + 3 + 1)
    assert await both("sweep", IDLE) == (0, 0)
    assert len(await both("search")) > 0
    assert await both("delete_all") > 0
    for view in views:
        with pytest.raises(InvalidInputError):
            await view.threads.aretain("t0", None)
