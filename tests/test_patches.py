"""Large values travel to Redis as patches: less is sent, and nothing else changes."""

import random
import string
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver

from langgraph_vat import HybridSaver, Keyring, SealError, UnavailableError
from langgraph_vat._hot.bases import _MOST, Bases
from langgraph_vat._records import Blob
from tests.fix_processes import kill

LARGE = 100_000
_dice = random.Random(3)


def text(size: int) -> str:
    return "".join(_dice.choices(string.ascii_lowercase, k=size))


@pytest.fixture(params=["plain", "sealed"])
def keyring(request):
    return Keyring.generate() if request.param == "sealed" else None


def at(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def put(saver: Any, parent: Any, values: dict[str, Any], *, new: Any = None) -> Any:
    """Put a child of `parent`; of the channels in `new` the versions are new."""
    new = list(values) if new is None else new
    before = saver.get_tuple(parent) if parent is not None else None
    versions = dict(before.checkpoint["channel_versions"]) if before else {}
    for channel in new:
        versions[channel] = saver.get_next_version(versions.get(channel), None)
    checkpoint = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": values}
    checkpoint["channel_versions"] = versions
    return saver.put(parent or at(), checkpoint, {}, {c: versions[c] for c in new})


def grow(saver: Any, config: Any, value: list[str], steps: int) -> tuple[Any, dict[str, Any]]:
    """Append to a value step by step; return what each checkpoint must have."""
    known = {}
    for _ in range(steps):
        value = [*value, text(500)]
        config = put(saver, config, {"a": value})
        known[config["configurable"]["checkpoint_id"]] = value
    return config, known


def states(saver: Any, thread: str = "t") -> dict[str, Any]:
    return {
        one.checkpoint["id"]: one.checkpoint["channel_values"].get("a")
        for one in saver.list(at(thread))
    }


def sent(client: Any, saver: HybridSaver) -> list[int]:
    """Return how large the entries of the journal are."""
    entries = client.xrange(saver._shared.keys.journal("t"))
    return [sum(map(len, fields.values())) for _, fields in entries]


def test_of_what_grows_only_the_new_is_sent(process, client):
    saver, other = process(), process()
    _, known = grow(saver, None, [text(LARGE)], 10)
    first, *later = sent(client, saver)
    assert first > LARGE
    assert max(later) < LARGE / 8
    newest = list(known.values())[-1]
    for one in (saver, other):
        hits = one.stats.hits
        assert one.get_tuple(at()).checkpoint["channel_values"]["a"] == newest
        assert one.stats.hits == hits + 1


@pytest.mark.parametrize("storage", ["compact", "compatible"])
@pytest.mark.parametrize("flushed", [0, 1, 4])
def test_whoever_flushes_a_dead_writers_journal_has_the_values(
    process, storage, flushed, postgres_url
):
    writer = process()
    config, known = grow(writer, None, [text(LARGE)], 1 + flushed)
    if flushed:
        writer.flush()
    config, more = grow(writer, config, list(known.values())[-1], 5)
    kill(writer)
    heir = process(storage=storage)
    heir.flush()
    assert states(heir) == known | more
    # What builds on it goes on, whoever takes the next step.
    heir.get_tuple(at())
    _, after = grow(heir, config, list(more.values())[-1], 5)
    heir.flush()
    assert states(process()) == known | more | after


def test_two_processes_in_turn(process, client):
    one, other = process(), process()
    config, known, value = None, {}, [text(LARGE)]
    for turn in range(12):
        saver = one if turn % 2 else other
        config, more = grow(saver, config, value, 2)
        known |= more
        value = list(more.values())[-1]
        assert one.get_tuple(at()).checkpoint["channel_values"]["a"] == value
        assert other.get_tuple(at()).checkpoint["channel_values"]["a"] == value
    assert sum(size > LARGE for size in sent(client, one)) <= 4  # of 24
    assert one.stats.flushes == other.stats.flushes == 0
    one.flush()
    assert states(other) == known


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_put_comes_back(process, client, seed):
    dice, savers = random.Random(seed), [process(), process(max_head_bytes=200_000)]
    oracle, config, values = InMemorySaver(), None, {"a": [text(LARGE)], "b": "small"}
    for _ in range(60):
        saver = dice.choice(savers)
        what = dice.random()
        if what < 0.1:
            saver.flush()
        elif what < 0.15:
            client.delete(savers[0]._shared.keys.head("t", ""))
        elif what < 0.2:
            saver.flush()
            kill(saver)
        value = dice.choice([values["a"], values["a"], [text(30_000)], [], [text(10)]])
        value = [text(20), *value[1:]] if value and dice.random() < 0.1 else [*value, text(300)]
        if dice.random() < 0.1:
            value = [text(150_000)]
        new = dice.choice([["a"], ["b"], ["a", "b"]]) if config else ["a", "b"]
        fresh = {"a": value, "b": text(dice.choice([5, 20_000]))}
        values |= {channel: fresh[channel] for channel in new}
        parent = config
        config = put(saver, parent, values, new=new)
        checkpoint = saver.get_tuple(config).checkpoint
        versions = {c: checkpoint["channel_versions"][c] for c in new}
        oracle.put(parent or at(), checkpoint, {}, versions)
        for reader in savers:
            found = reader.get_tuple(at()).checkpoint
            assert found["channel_values"] == values
    for saver in savers:
        saver.flush()
    for one in oracle.list(at()):
        assert savers[0].get_tuple(one.config).checkpoint == one.checkpoint


def test_a_large_value_beside_redis_is_not_taken_for_one_in_the_head(process, client):
    saver = process(max_head_bytes=50_000)
    _, known = grow(saver, None, [text(LARGE)], 4)
    assert states(saver) == known
    head = client.hgetall(saver._shared.keys.head("t", ""))
    assert not any(field.startswith((b"a:", b"m:")) for field in head)


def test_a_deleted_threads_values_are_not_kept(process):
    saver = process()
    grow(saver, None, [text(LARGE)], 2)
    assert saver._shared.bases.get("t", "", "a")
    saver.delete_thread("t")
    assert not saver._shared.bases.get("t", "", "a")
    _, known = grow(saver, None, [text(LARGE)], 3)
    assert states(saver) == known


def test_after_a_prune_values_build_on_what_is_there(process, postgres_url):
    saver = process()
    config, known = grow(saver, None, [text(LARGE)], 6)
    saver.prune(["t"], strategy="keep_latest")
    config, more = grow(saver, config, list(known.values())[-1], 3)
    kill(saver)
    heir = process()
    assert states(heir) == dict([list(known.items())[-1]]) | more
    with psycopg.connect(postgres_url) as connection:
        found = connection.execute("SELECT count(*) FROM checkpoint_blobs").fetchone()
    assert found is not None


def test_what_is_remembered_is_bounded():
    bases, blob = Bases(), Blob("a", "1", "bytes", bytes(_MOST // 4))
    for number in range(10):
        bases.learn(f"t{number}", "", {"a": blob._replace(mark=b"m")})
    assert bases._size <= _MOST
    assert bases.get("t9", "", "a")
    assert not bases.get("t0", "", "a")
    bases.learn("t9", "", {"a": blob})
    for number in range(10):
        bases.forget(f"t{number}")
    assert bases._size == 0


def test_a_patch_is_not_stored_without_its_base(process, postgres_url):
    writer, other = process(), process()
    config, known = grow(writer, None, [text(LARGE)], 1)
    writer.flush()
    _, more = grow(writer, config, list(known.values())[-1], 2)
    with psycopg.connect(postgres_url) as connection:  # as if pruned past a Redis that hangs
        connection.execute("SET langgraph_vat.writer = 'hot'")
        connection.execute("DELETE FROM checkpoint_blobs WHERE channel = 'a'")
    with pytest.raises(UnavailableError, match="wait for others"):
        other.flush()
    writer.flush()  # it has them whole
    found = states(process())
    assert {checkpoint_id: found[checkpoint_id] for checkpoint_id in more} == more


def test_a_fork_of_a_value_is_no_patch_of_the_other_branch(process):
    one, other = process(), process()
    root, known = grow(one, None, [text(LARGE)], 2)
    value = list(known.values())[-1]
    other.get_tuple(at())
    for saver in (one, other, one):
        _, more = grow(saver, root, value, 2)
        known |= more
        assert one.get_tuple(at()).checkpoint["channel_values"]["a"] == list(more.values())[-1]
    kill(one)
    other.flush()
    assert states(other) == known


def test_a_value_that_no_head_took_is_not_built_on(process):
    saver = process(max_head_bytes=50_000)
    config, _ = grow(saver, None, [text(LARGE)], 1)
    assert saver._shared.bases.get("t", "", "a") is None
    grow(saver, config, [text(LARGE)], 1)
    assert saver._shared.bases.get("t", "", "a") is None


def test_who_does_not_know_what_the_head_holds_sends_it_whole(process, client):
    one, other = process(), process()
    value, config, version, known = [text(LARGE)], at(), None, {}
    # Neither reads what the other did.
    for saver, grown in ((one, value), (other, [text(LARGE)]), (one, [*value, "new"])):
        version = saver.get_next_version(version, None)
        checkpoint = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": {"a": grown}}
        checkpoint["channel_versions"] = {"a": version}
        config = saver.put(config, checkpoint, {}, {"a": version})
        known[checkpoint["id"]] = grown
    assert min(sent(client, one)) > LARGE
    assert process().get_tuple(at()).checkpoint["channel_values"]["a"] == [*value, "new"]
    assert one.stats.flushes == 0
    kill(one)
    other.flush()
    assert states(other) == known


def put_as(saver: HybridSaver, config: Any, version: str, value: Any, run: str = "") -> Any:
    """Put a version that may have been used before."""
    checkpoint = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": {"a": value}}
    checkpoint["channel_versions"] = {"a": version}
    return saver.put(config, checkpoint, {"run_id": run} if run else {}, {"a": version})


@pytest.mark.parametrize("last", [[], [1], [text(LARGE)]])
def test_a_version_that_was_sent_as_a_patch_may_be_used_again(process, last):
    saver, value = process(), [text(LARGE)]
    config = put_as(saver, at(), "1", value)
    config = put_as(saver, config, "2", [*value, "new"])
    put_as(saver, config, "2", last)
    for one in (saver, process()):
        assert one.get_tuple(at()).checkpoint["channel_values"]["a"] == last
        assert one.stats.misses == 0
    saver.flush()
    assert process().get_tuple(at()).checkpoint["channel_values"]["a"] == last


def test_a_patch_builds_on_what_its_base_was_when_it_was_taken(process):
    writer, value = process(), [text(LARGE)]
    config = put_as(writer, at(), "1", value)
    second = put_as(writer, config, "2", [*value, "new"])
    put_as(writer, second, "1", [text(LARGE)])
    kill(writer)
    heir = process()
    heir.flush()
    assert heir.get_tuple(second).checkpoint["channel_values"]["a"] == [*value, "new"]
    assert len(states(process())) == 3


def test_a_step_outlives_the_run_that_it_builds_on(process, postgres_url):
    writer, other, value = process(), process(), [text(LARGE)]
    config = put_as(writer, at(), "1", value, run="one")
    second = put_as(writer, config, "2", [*value, "new"], run="two")
    kill(writer)
    with psycopg.connect(postgres_url) as connection:  # by whoever could not read Redis
        connection.execute("INSERT INTO vat_deleted_runs (run_id) VALUES ('one')")
        connection.execute("UPDATE vat_threads SET history = history + 1")
    other.flush()
    found = other.get_tuple(second)
    assert found.checkpoint["channel_values"]["a"] == [*value, "new"]
    assert list(states(other)) == [second["configurable"]["checkpoint_id"]]


@pytest.mark.parametrize("storage", ["compact", "compatible"])
def test_a_patch_of_a_value_that_was_not_new(process, postgres_url, storage):
    writer, value = process(storage=storage), [text(LARGE)]
    checkpoint = {**empty_checkpoint(), "id": str(uuid6())}
    checkpoint |= {"channel_values": {"a": value}, "channel_versions": {"a": "1"}}
    config = writer.put(at(), checkpoint, {}, {})  # nothing is new, and nothing is there
    put_as(writer, config, "2", [*value, "new"])
    kill(writer)
    heir = process(storage=storage)
    heir.flush()
    assert list(states(heir).values()) == [[*value, "new"], value]
    if storage == "compatible":
        with psycopg.connect(postgres_url) as connection:
            types = connection.execute("SELECT type FROM checkpoint_blobs").fetchall()
        assert not any("+vat" in type_ for (type_,) in types)


@pytest.mark.parametrize("keyring", [Keyring.generate()])
def test_without_the_key_a_journal_is_left_to_those_who_have_it(process, postgres_url, redis_url):
    writer = process()
    _, known = grow(writer, None, [text(LARGE)], 3)
    kill(writer)
    options: Any = {"redis": redis_url, "flush_every": 50, "flush_after": 600.0}
    stranger = HybridSaver.from_conn_string(postgres_url, **options)
    stranger._life._flusher.stop()
    with pytest.raises(UnavailableError):
        stranger.flush()
    heir = process()
    assert states(heir) == known
    stranger.flush()
    stranger.close()


def test_threads_without_large_values_are_not_remembered(process):
    saver = process()
    for number in range(20):
        put_as(saver, at(f"t{number}"), "1", "small")
    assert not saver._shared.bases._threads


@pytest.mark.parametrize("asked", ["latest", "by id", "namespace", "list"])
def test_a_stranger_who_was_refused_still_spoils_nothing(postgres_url, redis_url, asked):
    """He met the thread in Redis first; he may flush it, and write nothing readable to it."""

    def process(keyring: Keyring | None) -> HybridSaver:
        options: Any = {"redis": redis_url, "flush_every": 50, "flush_after": 600.0}
        saver = HybridSaver.from_conn_string(postgres_url, keyring=keyring, **options)
        saver._life._flusher.stop()
        saver.setup()
        return saver

    sealed = Keyring.generate()
    saver, stranger = process(sealed), process(None)
    namespace = {"configurable": {"thread_id": "t", "checkpoint_ns": "empty"}}
    first, known = grow(saver, at(), [text(LARGE)], 1)
    assert saver.get_tuple(namespace) is None
    assert saver.get_tuple(at()) is not None
    config, more = grow(saver, first, known[first["configurable"]["checkpoint_id"]], 4)
    known |= more
    kill(saver)
    ask = {
        "latest": lambda: stranger.get_tuple(at()),
        "by id": lambda: stranger.get_tuple(config),
        "namespace": lambda: stranger.get_tuple(namespace),
        "list": lambda: list(stranger.list(at())),
    }[asked]
    with pytest.raises((SealError, UnavailableError)):
        ask()
    with pytest.raises(UnavailableError):  # he cannot make the patches whole
        stranger.flush()
    with pytest.raises(SealError):
        put_as(stranger, config, "9", "TOP SECRET")
    with pytest.raises(SealError):
        stranger.put_writes(config, [("a", "TOP SECRET")], "task")
    heir = process(sealed)
    found = [one.checkpoint["channel_values"]["a"] for one in heir.list(at())]
    assert found == [*known.values()][::-1]
    for one in (saver, stranger, heir):
        kill(one)
        one.close()
