"""Values are sealed anew while all goes on; and what is shredded, nobody reads again."""

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
import redis
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

from langgraph_vat import (
    ConfigurationError,
    HybridSaver,
    InvalidInputError,
    Keyring,
    SealError,
    SemanticStore,
    ShreddedError,
    Vat,
)
from langgraph_vat._io.driver import drive
from langgraph_vat._ops import items as item_ops
from langgraph_vat._ops import reseal as resealing
from langgraph_vat._ops.shared import NO_SERDE, key_place
from langgraph_vat._seal.data_key import DataKey
from tests.fix_servers import waiting
from tests.test_protocol import Death, Faulty

KEYRING = Keyring.generate()
DAYS_S = 90 * 86_400.0
_dice = random.Random(2)


@pytest.fixture
def keyring():
    return KEYRING


@pytest.fixture
def a_day_later(monkeypatch):
    """Have a day pass at once: what was replaced a moment ago may be dropped."""
    return lambda: monkeypatch.setattr(resealing, "KEPT_S", -1)


def at(thread: str = "t", namespace: str = "") -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": namespace}}


def put(saver: HybridSaver, config: Any, number: int) -> Any:
    values = {"small": number, "large": "x" * 20_000 + "y" * number, "noise": _dice.randbytes(900)}
    versions = {channel: saver.get_next_version(None, None) for channel in values}
    checkpoint = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": values}
    checkpoint["channel_versions"] = versions
    config = saver.put(config, checkpoint, {"note": number}, versions)
    saver.put_writes(config, [("small", number), ("large", values["large"])], "task")
    return config


def grow(saver: HybridSaver, config: Any, steps: int) -> Any:
    for number in range(steps):
        config = put(saver, config, number)
    return config


def states(saver: HybridSaver, thread: str = "t") -> list[Any]:
    return [
        (one.checkpoint["channel_values"], one.metadata, one.pending_writes)
        for one in saver.list({"configurable": {"thread_id": thread}})
    ]


def headers(url: str, thread: str = "t") -> set[bytes]:
    """Return what the thread's messages begin with: version, algorithm, id of the data key."""
    query = """
    SELECT blob FROM checkpoint_blobs WHERE thread_id = %(t)s AND blob IS NOT NULL
    UNION ALL SELECT blob FROM checkpoint_writes WHERE thread_id = %(t)s
    UNION ALL SELECT vat_exact FROM checkpoints WHERE thread_id = %(t)s
    """
    with psycopg.connect(url) as connection:
        return {row[0][:10] for row in connection.execute(query, {"t": thread})}


def data_key(url: str, thread: str = "t") -> DataKey:
    with psycopg.connect(url) as connection:
        wrapped, generation = connection.execute(
            "SELECT data_key, generation::text FROM vat_threads WHERE thread_id = %s", [thread]
        ).fetchone()
    return DataKey.unwrap(wrapped, KEYRING, associated_data=key_place(thread, generation))


def test_everything_is_sealed_anew_and_reads_as_before(process, postgres_url, a_day_later):
    saver = process()
    config = grow(saver, at(), 70)  # more than a page of each kind
    grow(saver, at("t", "sub"), 2)
    saver.flush()
    before, old = states(saver), headers(postgres_url)
    done = saver.threads.reseal()
    assert (done.keys, done.kept, done.left) == (1, 1, 0)
    assert done.values == len(before) * 6
    new = headers(postgres_url)
    assert len(old) == len(new) == 1
    assert not old & new
    assert states(saver) == states(process()) == before
    assert saver.threads.reseal(max_age_s=DAYS_S) == (0, 0, 1, 0)
    put(saver, config, 70)
    a_day_later()
    assert saver.threads.reseal(max_age_s=DAYS_S) == (0, 0, 0, 0)
    assert not data_key(postgres_url).has_older
    assert states(process())[1:] == before
    assert headers(postgres_url) == new


def tags(url: str) -> set[str]:
    """Return what the type tags of all sealed values end with."""
    query = """
    SELECT type FROM checkpoint_blobs WHERE blob IS NOT NULL
    UNION SELECT type FROM checkpoint_writes UNION SELECT vat_type FROM checkpoints
    UNION SELECT vat_type FROM store
    """
    with psycopg.connect(url) as connection:
        return {row[0].rpartition("+")[2] for row in connection.execute(query)}


def test_resealing_changes_the_cipher_of_what_is_there(postgres_url, redis_url, a_day_later):
    options: Any = {"redis": redis_url, "flush_every": 50, "flush_after": 600.0}
    with Vat.connect(postgres_url, keyring=KEYRING, **options) as vat:
        config = grow(vat.checkpointer, at(), 3)
        vat.store.put(("a", "b"), "k", {"text": "word"})
        before = states(vat.checkpointer)
        assert tags(postgres_url) == {"aes256gcm"}
    other = KEYRING.with_cipher("chacha20poly1305")
    with Vat.connect(postgres_url, keyring=other, **options) as vat:
        assert states(vat.checkpointer) == before
        config = put(vat.checkpointer, config, 3)
        vat.checkpointer.flush()
        assert tags(postgres_url) == {"aes256gcm"}  # the thread's key is what it was
        put(vat.checkpointer, config, 4)  # waits in Redis under the key that is replaced
        vat.store.put(("new",), "k", {"text": "other"})
        assert tags(postgres_url) == {"aes256gcm", "chacha20poly1305"}
        assert vat.reseal().left == 0
        assert tags(postgres_url) == {"chacha20poly1305"}
        a_day_later()
        assert vat.reseal(max_age_s=DAYS_S).kept == 0
    with Vat.connect(postgres_url, keyring=KEYRING, **options) as vat:  # as others still have it
        assert states(vat.checkpointer)[2:] == before
        assert len(states(vat.checkpointer)) == 5
        assert vat.store.get(("a", "b"), "k").value == {"text": "word"}
        assert vat.store.get(("new",), "k").value == {"text": "other"}


def test_a_value_that_is_labelled_with_another_cipher_is_refused(process, postgres_url):
    saver = process()
    grow(saver, at(), 1)
    saver.flush()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("SET langgraph_vat.writer = 'hot'")
        connection.execute(
            "UPDATE checkpoint_blobs SET type = replace(type, 'aes256gcm', 'chacha20poly1305')"
        )
    with pytest.raises(SealError, match="labelled"):
        list(process().list(at()))


def test_other_processes_learn_the_new_key(process, postgres_url):
    saver, other = process(), process()
    config = grow(saver, at(), 3)
    assert other.get_tuple(at()) is not None
    other.flush()
    saver.threads.reseal()
    config = put(other, config, 3)
    other.flush()
    assert headers(postgres_url) == {data_key(postgres_url).header}
    assert saver.get_tuple(at()) == other.get_tuple(at()) == other.get_tuple(config)
    assert len(states(saver)) == 4


def test_a_process_that_only_flushes_others_seals_with_the_new_key(
    process, postgres_url, a_day_later
):
    saver, flusher = process(), process()
    config = grow(saver, at(), 3)
    assert flusher.get_tuple(at()) is not None  # knows the key that is replaced
    saver.flush()
    saver.threads.reseal()
    grow(saver, config, 3)
    saver._shared.copies._threads.clear()  # killed
    flusher.flush()
    assert headers(postgres_url) == {data_key(postgres_url).header}
    a_day_later()
    flusher.threads.reseal(max_age_s=DAYS_S)
    assert len(states(process())) == 6


def test_a_step_that_comes_late_keeps_the_old_key(process, redis_url, postgres_url, a_day_later):
    saver, other = process(), process()
    config = grow(saver, at(), 2)
    saver.flush()
    put(other, config, 2)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()  # the other process alone has its step
    saver.threads.reseal()
    other.flush()
    assert len(headers(postgres_url)) == 2
    before = states(saver)
    assert len(before) == 3
    a_day_later()
    assert saver.threads.reseal(max_age_s=DAYS_S).kept == 0
    assert headers(postgres_url) == {data_key(postgres_url).header}
    assert states(process()) == before


def test_a_row_that_does_not_open_keeps_the_old_key(process, postgres_url, a_day_later):
    saver = process()
    grow(saver, at(), 2)
    saver.flush()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("SET langgraph_vat.writer = 'hot'")
        connection.execute(
            "UPDATE checkpoint_blobs SET blob = set_byte(blob, 40, 255 - get_byte(blob, 40))"
            " WHERE channel = 'noise' AND version = (SELECT min(version) FROM checkpoint_blobs"
            " WHERE channel = 'noise')"
        )
    done = saver.threads.reseal()
    assert (done.keys, done.kept, done.left) == (1, 1, 1)
    a_day_later()
    assert saver.threads.reseal(max_age_s=DAYS_S) == (0, 0, 1, 1)
    assert data_key(postgres_url).has_older


def test_killed_anywhere_it_leaves_all_readable(process, postgres_url, a_day_later):
    saver = process()
    config = grow(saver, at(), 4)
    saver.flush()
    a_day_later()
    deaths = 0
    for after in (False, True):
        for dies_at in range(1, 100):
            worker = process()
            faulty = Faulty(worker._life.blocking(), dies_at, after=after)
            try:
                drive(resealing.reseal(worker._shared, faulty, NO_SERDE, prefix="", max_age_s=0.0))
            except Death:
                deaths += 1
            else:
                break
            config = put(saver, config, dies_at)
            reader = process()
            assert len(states(reader)) == 4 + deaths
            assert reader.get_tuple(at()).metadata["note"] == dies_at
    assert deaths >= 15
    saver.flush()
    for _ in range(2):
        done = saver.threads.reseal(max_age_s=DAYS_S)
    assert done == (0, 0, 0, 0)
    assert headers(postgres_url) == {data_key(postgres_url).header}
    assert len(states(process())) == 4 + deaths


SEALER = """
import sys
from langgraph_vat import Keyring, Vat

with Vat.connect(sys.argv[1], sys.argv[2], keyring=Keyring.from_file(sys.argv[3])) as vat:
    print("ready", flush=True)
    while True:
        vat.rotate()
        vat.reseal()
"""


def test_a_process_that_is_killed_while_it_rotates_and_reseals_leaves_all_readable(
    postgres_url, redis_url, tmp_path
):
    old = Keyring.generate("old")
    both = old.with_key("new").with_primary("new")
    both.save(tmp_path / "keys")
    options: Any = {"redis": redis_url, "flush_every": 4}
    with Vat.connect(postgres_url, keyring=both.with_primary("old"), **options) as vat:
        threads = {f"t{number}": at(f"t{number}") for number in range(6)}
        for thread, config in threads.items():
            threads[thread] = grow(vat.checkpointer, config, 2)
            vat.store.put(("a", thread), "k", {"text": thread})
        steps = 2
        for _ in range(4):
            command = [sys.executable, "-c", SEALER, postgres_url, redis_url, tmp_path / "keys"]
            sealer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert sealer.stdout.readline() == "ready\n"
            dies_at = time.monotonic() + _dice.uniform(0.01, 0.3)
            while time.monotonic() < dies_at:  # others go on meanwhile
                for thread, config in threads.items():
                    threads[thread] = put(vat.checkpointer, config, steps)
                steps += 1
            sealer.send_signal(signal.SIGKILL)
            sealer.communicate()
            assert sealer.returncode == -signal.SIGKILL
            for thread, config in threads.items():
                assert vat.checkpointer.get_tuple(config).metadata["note"] == steps - 1
                assert len(states(vat.checkpointer, thread)) == steps
    with Vat.connect(postgres_url, keyring=both, **options) as vat:
        assert vat.reseal().left == 0
        assert vat.rotate().left == 0
    with Vat.connect(postgres_url, keyring=both.without("old"), **options) as vat:
        for thread in threads:
            notes = [one[1]["note"] for one in states(vat.checkpointer, thread)]
            assert notes == [*range(steps)][::-1]
            assert vat.store.get(("a", thread), "k").value == {"text": thread}


def test_threads_go_on_while_they_are_resealed(process, postgres_url, a_day_later):
    writers, steps = [process(flush_every=4), process(flush_every=4)], 20

    def run(number: int) -> None:
        config = at(f"t{number}")
        for step in range(steps):
            writer = writers[(number + step // 7) % 2]
            config = put(writer, config, step)
            found = writers[step % 2].get_tuple(at(f"t{number}"))
            assert found.metadata["note"] == step
            assert writers[step % 2].get_tuple(config).metadata["note"] == step

    with ThreadPoolExecutor(32) as pool:
        runs = [pool.submit(run, number) for number in range(32)]
        sealer, resealed = process(), []
        while not all(one.done() for one in runs):
            resealed.append(sealer.threads.reseal())
        assert [one.result() for one in runs] == [None] * 32
    assert sum(one.keys for one in resealed) >= 32
    assert sum(one.left for one in resealed) == 0
    for writer in writers:
        writer.flush()
    a_day_later()
    sealer.threads.reseal(max_age_s=DAYS_S)
    assert sealer.threads.reseal(max_age_s=DAYS_S) == (0, 0, 0, 0)
    reader = process()
    for number in range(32):
        assert [one[1]["note"] for one in states(reader, f"t{number}")] == [*range(steps)][::-1]
        assert headers(postgres_url, f"t{number}") == {data_key(postgres_url, f"t{number}").header}


def test_a_store_is_resealed(postgres_url, a_day_later):
    def store() -> SemanticStore:
        return SemanticStore.from_conn_string(postgres_url, keyring=KEYRING)

    with store() as one, store() as other:
        for number in range(150):  # more than a page
            one.put(("a", str(number)), "k", {"v": number})
        one.put(("ab",), "k", {"v": "another root"})
        other.put(("a", "x"), "k", {"v": "x"})
        with psycopg.connect(postgres_url) as connection:
            before = [row[0] for row in connection.execute("SELECT vat_value FROM store")]
        assert one.reseal() == (2, 152, 2, 0)
        with psycopg.connect(postgres_url) as connection:
            after = [row[0] for row in connection.execute("SELECT vat_value FROM store")]
        assert not {value[:10] for value in before} & {value[:10] for value in after}
        assert other.get(("a", "7"), "k").value == {"v": 7}
        other.put(("a", "late"), "k", {"v": "late"})
        assert one.get(("a", "late"), "k").value == {"v": "late"}
        a_day_later()
        assert one.reseal(max_age_s=DAYS_S) == (0, 0, 0, 0)
    with store() as last:
        assert {item.value["v"] for item in last.search(("a",), limit=500)} == {
            *range(150),
            "x",
            "late",
        }


def test_a_store_asks_for_its_key_before_it_seals(postgres_url):
    """Who was there before would seal with a key that was replaced, or destroyed."""
    keyed = {"keyring": KEYRING}
    with (
        SemanticStore.from_conn_string(postgres_url, **keyed) as one,
        SemanticStore.from_conn_string(postgres_url, **keyed) as other,
    ):
        one.put(("a",), "k", {"v": 1})
        other.put(("a",), "l", {"v": 1})
        one.reseal()
        other.put(("a",), "m", {"v": 2})
    with psycopg.connect(postgres_url) as connection:
        found = {row[0][:10] for row in connection.execute("SELECT vat_value FROM store")}
    assert len(found) == 1


def test_what_is_shredded_nobody_reads(process, postgres_url, redis_url):
    saver, other = process(), process()
    config = grow(saver, at(), 3)
    grow(saver, at("u"), 1)
    assert other.get_tuple(at()) == saver.get_tuple(at())
    assert other.get_tuple(config) is not None
    put(other, config, 9)  # waits in Redis
    saver.threads.shred("t")
    for reader in (saver, other, process()):
        for ask in (
            lambda reader=reader: reader.get_tuple(at()),
            lambda reader=reader: reader.get_tuple(config),
            lambda reader=reader: list(reader.list(at())),
            lambda reader=reader: put(reader, config, 5),
            lambda reader=reader: reader.put_writes(config, [("small", 1)], "late"),
            lambda reader=reader: reader.copy_thread("t", "v"),
        ):
            with pytest.raises(ShreddedError, match="shredded"):
                ask()
        assert {one.config["configurable"]["thread_id"] for one in reader.list(None)} == {"u"}
    assert {one.thread_id for one in saver.threads.search()} == {"t", "u"}
    assert saver.threads.reseal().left == saver.threads.rotate().left == 0
    with pytest.raises(InvalidInputError, match="sealed thread"):
        saver.threads.shred("t")
    other.delete_thread("t")
    put(saver, at(), 7)
    assert other.get_tuple(at()).metadata["note"] == 7


def test_a_tenant_is_shredded(process):
    saver = process()
    acme = saver.scoped("acme")
    for thread in ("t", "u"):
        put(acme, at(thread), 1)
    put(saver, at(), 2)
    with pytest.raises(InvalidInputError, match="tenant"):
        saver.threads.shred_all()
    assert acme.threads.shred_all() == 2
    assert acme.threads.shred_all() == 0
    with pytest.raises(ShreddedError):
        acme.get_tuple(at("u"))
    assert saver.get_tuple(at()).metadata["note"] == 2


def test_a_root_of_a_store_is_shredded(postgres_url, monkeypatch):
    keyed = {"keyring": KEYRING}
    with (
        SemanticStore.from_conn_string(postgres_url, **keyed) as one,
        SemanticStore.from_conn_string(postgres_url, **keyed) as other,
    ):
        one.put(("ann", "notes"), "k", {"v": 1})
        one.put(("bob",), "k", {"v": 2})
        assert other.get(("ann", "notes"), "k").value == {"v": 1}
        one.shred("ann")
        for store in (one, other):  # at once: what is acknowledged can be read
            with pytest.raises(ShreddedError):
                store.put(("ann",), "l", {"v": 3})
        monkeypatch.setattr(item_ops, "_KEY_S", 0.0)  # a minute later
        for store in (one, other):
            with pytest.raises(ShreddedError):
                store.get(("ann", "notes"), "k")
            assert [item.value for item in store.search(())] == [{"v": 2}]
        with pytest.raises(InvalidInputError):
            one.shred("ann")
        other.delete(("ann", "notes"), "k")
        one.put(("ann",), "k", {"v": 4})
        assert other.get(("ann",), "k").value == {"v": 4}


def test_a_root_is_not_shredded_while_something_is_put_there(postgres_url):
    keyed = {"keyring": KEYRING}
    with (
        SemanticStore.from_conn_string(postgres_url, **keyed) as one,
        SemanticStore.from_conn_string(postgres_url, **keyed) as other,
        psycopg.connect(postgres_url) as holder,
        ThreadPoolExecutor(2) as pool,
    ):
        one.put(("ann",), "k", {"v": 1})
        holder.execute("SELECT FROM store FOR UPDATE")
        put = pool.submit(one.put, ("ann",), "k", {"v": 2})
        while not waiting(postgres_url):
            pass
        shred = pool.submit(other.shred, "ann")
        while waiting(postgres_url) < 2 and not shred.done():
            pass
        is_early = shred.done()
        holder.commit()
        put.result()
        shred.result()
        assert not is_early


@pytest.mark.parametrize("is_used_again", [False, True])
def test_nothing_is_put_by_a_key_that_was_destroyed_a_moment_ago(
    postgres_url, monkeypatch, is_used_again
):
    keyed = {"keyring": KEYRING}
    with (
        SemanticStore.from_conn_string(postgres_url, **keyed) as one,
        SemanticStore.from_conn_string(postgres_url, **keyed) as other,
    ):
        one.put(("ann",), "k", {"v": 1})
        ask, todo = item_ops._add_keys, [1]

        async def meanwhile(*args: Any) -> Any:
            keys = await ask(*args)
            while todo:
                todo.pop()
                other.shred("ann")
                if is_used_again:
                    other.delete(("ann",), "k")
                    other.put(("ann",), "again", {"v": 2})
            return keys

        monkeypatch.setattr(item_ops, "_add_keys", meanwhile)
        if not is_used_again:
            with pytest.raises(ShreddedError):
                one.put(("ann",), "l", {"v": 3})
            return
        one.put(("ann",), "l", {"v": 3})
        assert other.get(("ann",), "l").value == {"v": 3}


def test_a_key_that_is_not_there_any_more_is_not_used_by_who_remembers_it(postgres_url):
    with (
        SemanticStore.from_conn_string(postgres_url, keyring=KEYRING) as one,
        SemanticStore.from_conn_string(postgres_url, keyring=KEYRING) as other,
    ):
        one.put(("ann",), "k", {"v": 1})
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute("DELETE FROM vat_store_keys")
        with pytest.raises(SealError, match="taken away"):
            one.put(("ann",), "l", {"v": 2})
        one.delete(("ann",), "k")
        one.put(("ann",), "l", {"v": 3})
        assert other.get(("ann",), "l").value == {"v": 3}


def test_a_store_remembers_the_keys_of_roots_that_it_used_of_late(postgres_url, monkeypatch):
    monkeypatch.setattr(item_ops, "_MOST_KEYS", 3)
    with SemanticStore.from_conn_string(postgres_url, keyring=KEYRING) as store:
        roots = [f"root{number}" for number in range(8)]
        for root in roots:
            store.put((root,), "k", {"v": root})
        assert len(store._items.data_keys) == 8  # any may be in use
        monkeypatch.setattr(item_ops, "_IN_USE_S", -1.0)
        for _ in range(2):
            store.put(("new",), "k", {"v": 1})
            for root in roots:
                assert store.get((root,), "k").value == {"v": root}
        assert len(store._items.data_keys) == len(store._items.opened_at) == 3
        monkeypatch.setattr(item_ops, "_IN_USE_S", 600.0)
        assert len(store.search((), limit=100)) == 9


def test_bad_arguments_change_nothing(process, postgres_url, redis_url):
    saver = process()
    put(saver, at(), 1)
    for age in (-1, "a day", None, float("nan"), float("inf"), True):
        with pytest.raises(InvalidInputError, match="max_age_s"):
            saver.threads.reseal(max_age_s=age)
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url) as plain:
        with pytest.raises(ConfigurationError, match="keyring"):
            plain.threads.reseal()
        plain.put(at("p"), {**empty_checkpoint(), "id": str(uuid6())}, {}, {})
        for thread in ("p", "nobody"):
            with pytest.raises(InvalidInputError, match="sealed thread"):
                plain.threads.shred(thread)
    with Vat.connect(postgres_url, redis_url, keyring=KEYRING) as vat:
        assert vat.reseal().keys == 1


def test_a_key_that_was_dropped_opens_nothing(process, postgres_url, a_day_later):
    """Who got hold of a data key, and writes to the database, can forge nothing afterwards."""
    saver = process()
    config = put(saver, at(), 1)
    saver.flush()
    stolen = data_key(postgres_url)
    saver.threads.reseal()
    a_day_later()
    saver.threads.reseal(max_age_s=DAYS_S)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("SET langgraph_vat.writer = 'hot'")
        connection.execute(
            "UPDATE checkpoints SET vat_exact = %s", [stolen.seal(b"\x90", associated_data=b"")]
        )
    with pytest.raises(SealError):
        process().get_tuple(config)
