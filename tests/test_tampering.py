"""
Flip a bit of anything that is sealed, and it is refused; never a crash, never another value.

``FLIPS=10000 pytest tests/test_tampering.py`` flips as many.
"""

import os
import random
from typing import Any

import psycopg
import pytest
import redis
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

from langgraph_vat import HybridSaver, Keyring, SealError, SemanticStore, VatError
from langgraph_vat._hot.entries import _summed

FLIPS = int(os.environ.get("FLIPS", "120"))
pytestmark = pytest.mark.timeout(120 + FLIPS // 5)
KEYRING = Keyring.generate()
_dice = random.Random(5)


@pytest.fixture
def keyring():
    return KEYRING


def value(size: int) -> Any:
    return {"text": "".join(_dice.choices("abcdefgh ", k=size)), "n": size}


def at(thread: str = "t", **more: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": "", **more}}


def put(saver: HybridSaver, config: Any, channel: str = "__interrupt__") -> Any:
    values = {"a": value(_dice.choice([5, 300, 20_000])), "b": value(10)}
    versions = {channel: saver.get_next_version(None, None) for channel in values}
    checkpoint = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": values}
    checkpoint["channel_versions"] = versions
    config = saver.put(config, checkpoint, {"note": value(20)}, versions)
    saver.put_writes(config, [("a", value(30)), (channel, value(20))], "task")
    return config


@pytest.fixture
def written(postgres_url, redis_url) -> tuple[str, str, list[Any]]:
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, keyring=KEYRING) as saver:
        configs = []
        for thread in range(4):
            config = at(f"t{thread}")
            for _ in range(6):
                config = put(saver, config)
                configs.append(config)
    return postgres_url, redis_url, configs


ROWS = {
    "blob": ("checkpoint_blobs", "blob"),
    "write": ("checkpoint_writes", "blob"),
    "metadata": ("checkpoints", "vat_exact"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_no_bit_of_a_row_can_be_changed(written, kind):
    url, redis_url, configs = written
    table, column = ROWS[kind]
    known = {}
    with HybridSaver.from_conn_string(url, redis=redis_url, keyring=KEYRING) as saver:
        for config in configs:
            known[config["configurable"]["checkpoint_id"]] = saver.get_tuple(config)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET langgraph_vat.writer = 'hot'")
        rows = connection.execute(
            f"SELECT ctid::text, thread_id, octet_length({column}) FROM {table}"
            f" WHERE {column} IS NOT NULL"
        ).fetchall()
        refused = 0
        for number in range(FLIPS // len(ROWS)):
            _, thread, _ = _dice.choice(rows)
            # Each change moves the row: the rows of a thread are found again by what they hold.
            held = connection.execute(
                f"SELECT ctid::text, octet_length({column}) FROM {table}"
                f" WHERE thread_id = %s AND {column} IS NOT NULL ORDER BY ctid",
                [thread],
            ).fetchall()
            ctid, size = held[number % len(held)]
            bit = _dice.randrange(8 * size)
            flip = f"set_bit({column}, {bit}, 1 - get_bit({column}, {bit}))"
            moved = connection.execute(
                f"UPDATE {table} SET {column} = {flip} WHERE ctid = %s RETURNING ctid::text", [ctid]
            ).fetchone()
            refused += _refusals(url, redis_url, thread, known)
            connection.execute(f"UPDATE {table} SET {column} = {flip} WHERE ctid = %s", moved)
    assert refused >= FLIPS // len(ROWS)


def _refusals(url: str, redis_url: str, thread: str, known: dict[str, Any]) -> int:
    """Read all of a thread; return how often that is refused. What is not, must be as it was."""
    with redis.Redis.from_url(redis_url) as client:
        client.delete(*client.keys(b"*:h:*") or [b"none"])
    refused = 0
    with HybridSaver.from_conn_string(url, redis=redis_url, keyring=KEYRING) as saver:
        for checkpoint_id, before in known.items():
            config = before.config["configurable"]
            if config["thread_id"] != thread:
                continue
            try:
                found = saver.get_tuple(at(thread, checkpoint_id=checkpoint_id))
            except SealError:
                refused += 1
            else:
                assert found == before
    return refused


def test_no_bit_of_an_item_can_be_changed(postgres_url):
    with SemanticStore.from_conn_string(postgres_url, keyring=KEYRING) as store:
        for number in range(5):
            store.put(("root", str(number)), "k", value(100 * number))
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            for number in range(FLIPS // 4):
                prefix = f"root.{number % 5}"
                (size,) = connection.execute(
                    "SELECT octet_length(vat_value) FROM store WHERE prefix = %s", [prefix]
                ).fetchone()
                bit = _dice.randrange(8 * size)
                flip = (
                    f"UPDATE store SET vat_value = set_bit(vat_value, {bit},"
                    f" 1 - get_bit(vat_value, {bit})) WHERE prefix = %s"
                )
                connection.execute(flip, [prefix])
                with pytest.raises(SealError):
                    store.get(("root", str(number % 5)), "k")
                connection.execute(flip, [prefix])
                assert store.get(("root", str(number % 5)), "k") is not None


def flipped(data: bytes) -> bytes:
    at_ = _dice.randrange(len(data))
    return data[:at_] + bytes([data[at_] ^ (1 << _dice.randrange(8))]) + data[at_ + 1 :]


def test_no_bit_of_a_head_can_be_changed(process, redis_url):
    """Who knows no sums is noticed by them, and Postgres answers; who does, is refused."""
    saver, reader = process(), process()
    config = at()
    for _ in range(4):
        config = put(saver, config)
    saver.flush()
    before, refused = reader.get_tuple(at()), 0
    head = saver._shared.keys.head("t", "")
    with redis.Redis.from_url(redis_url) as client:
        fields = client.hgetall(head)
        values = [field for field in fields if field[:2] in (b"b:", b"a:", b"w:", b"x:")]
        for number in range(FLIPS):
            field = values[number % len(values)]
            changed = flipped(fields[field])
            if number % 4:
                place = [field, fields[b"n:" + field[2:]]] if field[:2] == b"b:" else [field]
                place = [fields[b"f"].partition(b":")[0], *place]
                changed = _summed(flipped(fields[field][4:]), *place)
            client.hset(head, field, changed)
            try:
                assert reader.get_tuple(at()) == before
            except SealError:
                refused += 1
            client.hset(head, mapping=fields)
    assert refused > FLIPS / 2


def test_no_bit_of_the_journal_can_be_changed(process, redis_url, postgres_url):
    with redis.Redis.from_url(redis_url) as client:
        for number in range(max(FLIPS // 12, 10)):
            saver, thread = process(), f"t{number}"
            saver.get_tuple(at(thread))
            config, known = at(thread), {}
            for _ in range(3):
                config = put(saver, config, "b")  # what is urgent is flushed
                known[config["configurable"]["checkpoint_id"]] = saver.get_tuple(config)
            saver._shared.copies._threads.clear()  # killed
            journal = saver._shared.keys.journal(thread)
            entries = client.xrange(journal)
            client.delete(journal, saver._shared.keys.head(thread, ""))
            hurt = _dice.randrange(len(entries))
            for position, (_, fields) in enumerate(entries):
                if position == hurt:
                    sealed = [
                        f for f in fields if f[:2] in (b"b:", b"a:", b"w:", b"x:") and fields[f]
                    ]
                    field = _dice.choice(sealed)
                    fields[field] = flipped(fields[field])
                client.xadd(journal, fields)
            refused, reader = 0, process()
            for checkpoint_id, before in known.items():
                try:
                    found = reader.get_tuple(at(thread, checkpoint_id=checkpoint_id))
                except VatError:
                    refused += 1
                else:
                    assert found == before
            assert refused
            saver.close()
            reader.close()
