"""Keys that change: what was sealed before opens, and what no longer may does not."""

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

from langgraph_vat import (
    ConfigurationError,
    HybridSaver,
    Keyring,
    SealError,
    SemanticStore,
    UnknownKeyError,
    Vat,
)

OLD = Keyring.generate("old")
NEW = OLD.with_key("new").with_primary("new")


@pytest.fixture
def make(postgres_url, redis_url) -> Iterator[Any]:
    made: list[HybridSaver] = []

    def saver(keyring: Keyring | None, **more: Any) -> HybridSaver:
        options = {"redis": redis_url, "flush_every": 4} | more
        new = HybridSaver.from_conn_string(postgres_url, keyring=keyring, **options)
        new.setup()
        made.append(new)
        return new

    yield saver
    for one in made:
        one.close()


def at(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def put(saver: HybridSaver, parent: Any, value: Any) -> Any:
    checkpoint = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": {"a": value}}
    version = saver.get_next_version(None, None)
    checkpoint["channel_versions"] = {"a": version}
    return saver.put(parent, checkpoint, {}, {"a": version})


def values(saver: HybridSaver, thread: str = "t") -> list[Any]:
    return [one.checkpoint["channel_values"]["a"] for one in saver.list(at(thread))]


def wrapped_by(url: str, key_id: str) -> int:
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT data_key FROM vat_threads").fetchall()
    return sum(
        bytes([len(key_id)]) + key_id.encode() == row[0][1 : 2 + len(key_id)] for row in rows
    )


def test_after_a_rotation_the_old_key_is_not_needed(make, postgres_url):
    before, after = make(OLD), make(NEW)
    for number in range(600):  # more than a page
        put(before, at(f"t{number}"), number)
    before.flush()
    assert wrapped_by(postgres_url, "old") == 600
    assert after.threads.rotate() == (600, 0)
    assert wrapped_by(postgres_url, "old") == 0
    assert after.threads.rotate() == (0, 0)
    fresh = make(NEW.without("old"))
    assert [values(fresh, f"t{number}") for number in range(600)] == [[n] for n in range(600)]
    with pytest.raises(UnknownKeyError):
        make(OLD).get_tuple(at("t1"))


def test_what_no_key_opens_is_left_and_told(make, postgres_url, caplog):
    put(make(OLD), at(), 1)
    other = make(Keyring.generate("other"))
    put(other, at("u"), 2)
    other.flush()
    assert make(NEW).threads.rotate() == (1, 1)
    assert "data keys" in caplog.text
    assert values(make(NEW.without("old"))) == [1]
    assert values(other, "u") == [2]
    with pytest.raises(UnknownKeyError, match="'other'"):
        list(make(NEW).list(None))


def test_who_still_wraps_by_the_old_key_makes_another_rotation_due(make):
    before, after = make(OLD), make(NEW)
    put(before, at(), 1)
    before.flush()
    assert after.threads.rotate() == (1, 0)
    put(before, at("u"), 2)
    before.flush()
    assert after.threads.rotate() == (1, 0)
    assert after.threads.rotate() == (0, 0)
    assert values(make(NEW.without("old")), "u") == [2]


def test_a_tenant_rotates_its_own(make, postgres_url):
    saver = make(OLD)
    put(saver.scoped("acme"), at(), 1)
    put(saver, at(), 2)
    saver.flush()
    assert make(NEW).scoped("acme").threads.rotate() == (1, 0)
    assert wrapped_by(postgres_url, "old") == 1


def test_threads_go_on_while_keys_are_rotated(make):
    keys = {name: bytes(random.Random(name).randbytes(32)) for name in "abc"}

    def ring(primary: str) -> Keyring:
        return Keyring([(primary, keys[primary]), *(i for i in keys.items() if i[0] != primary)])

    writer, is_over = make(ring("a")), threading.Event()
    rotating = [make(ring("b")), make(ring("c"))]

    def run(number: int) -> int:
        steps = 0
        while not is_over.is_set():
            thread = f"t{number} {steps // 5}"  # begun anew, under a new data key, all the time
            config = put(writer, at(thread), steps)
            put(writer, config, -steps)
            assert writer.get_tuple(at(thread)).checkpoint["channel_values"]["a"] == -steps
            steps += 1
        return steps

    with ThreadPoolExecutor(32) as pool:
        runs = [pool.submit(run, number) for number in range(32)]
        rotated = sum(one.threads.rotate().rotated for _ in range(4) for one in rotating)
        is_over.set()
        steps = [done.result() for done in runs]
    assert rotated > 32
    writer.flush()
    assert rotating[1].threads.rotate().left == 0
    last = make(Keyring([("c", keys["c"])]))
    for number, count in enumerate(steps):
        for begun in range(0, count, 5):
            assert len(values(last, f"t{number} {begun // 5}")) >= 2


def test_store_keys_are_rotated(postgres_url):
    with SemanticStore.from_conn_string(postgres_url, keyring=OLD) as store:
        store.put(("a",), "k", {"v": 1})
        store.put(("b", "c"), "k", {"v": 2})
    with SemanticStore.from_conn_string(postgres_url, keyring=NEW) as store:
        assert asyncio.run(store.arotate()) == (2, 0)
    with SemanticStore.from_conn_string(postgres_url, keyring=NEW.without("old")) as store:
        assert store.get(("b", "c"), "k").value == {"v": 2}
        assert store.get(("a",), "k").value == {"v": 1}


def test_without_a_keyring_there_is_nothing_to_rotate_to(make, postgres_url, redis_url):
    with pytest.raises(ConfigurationError, match="keyring"):
        make(None).threads.rotate()
    with (
        Vat.connect(postgres_url, redis_url) as vat,
        pytest.raises(ConfigurationError, match="keyring"),
    ):
        vat.rotate()


def test_a_wrapped_key_of_another_thread_is_not_rotated_into_use(make, postgres_url):
    saver = make(OLD)
    put(saver, at(), 1)
    put(saver, at("u"), 2)
    saver.flush()
    with psycopg.connect(postgres_url) as connection:
        connection.execute(
            "UPDATE vat_threads SET data_key = (SELECT data_key FROM vat_threads"
            " WHERE thread_id = 't') WHERE thread_id = 'u'"
        )
    after = make(NEW)
    assert after.threads.rotate() == (1, 1)
    with pytest.raises(SealError):
        values(after, "u")
