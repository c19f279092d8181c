"""
Whatever becomes of what Redis holds, nobody is shown it: Postgres answers, or an error.

Nothing is sealed here: what notices are sums and counts. They are no
signatures; who means to deceive is stopped by sealing (test_tampering).
"""

from typing import Any

import ormsgpack
import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

from langgraph_vat import HybridSaver, RefusedError
from langgraph_vat._hot.entries import pack_core
from langgraph_vat._records import Core
from tests.fix_processes import kill

LARGE = "x" * 20_000  # travels as a patch when it grows


def at(thread: str = "t", namespace: str = "") -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": namespace}}


def put(saver: HybridSaver, config: Any, number: int) -> Any:
    values = {"small": number, "large": LARGE + "y" * number, "text": "word"}
    versions = {channel: saver.get_next_version(None, None) for channel in values}
    checkpoint = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": values}
    checkpoint["channel_versions"] = {**versions, "none": "1"}
    config = saver.put(config, checkpoint, {"step": number}, {**versions, "none": "1"})
    saver.put_writes(config, [("small", number), ("large", LARGE)], "task")
    return config


def grow(saver: HybridSaver, config: Any, steps: int) -> Any:
    for number in range(steps):
        config = put(saver, config, number)
    return config


def damages(value: bytes) -> list[bytes]:
    middle = len(value) // 2
    cut = [b"", value[:-1], value[1:], value[:middle] + value[middle + 1 :], b"\xff\xfe"]
    return [one for one in (*cut, value + b"\0", value[:-1] + b"\x7f") if one != value]


def test_no_field_of_a_head_can_be_damaged_or_lost(process, client):
    saver, reader = process(), process()
    grow(saver, at(), 4)
    saver.flush()
    before, head = reader.get_tuple(at()), saver._shared.keys.head("t", "")
    fields = client.hgetall(head)
    assert any(field[:2] == b"a:" for field in fields)
    for field, value in fields.items():
        for damaged in (*damages(value), None):
            if damaged is None:
                client.hdel(head, field)
            else:
                client.hset(head, field, damaged)
            assert reader.get_tuple(at()) == before, (field, damaged)
            client.delete(head)
            client.hset(head, mapping=fields)
    client.hset(head, "more", "x")
    assert reader.get_tuple(at()) == before
    assert not client.hexists(head, "more")


def test_what_a_head_lost_is_missed_after_it_went_on(process, client):
    saver, reader = process(), process()
    config = grow(saver, at(), 3)
    head = saver._shared.keys.head("t", "")
    first = next(field for field in client.hkeys(head) if field[:2] == b"w:")
    client.hdel(head, first)
    saver.put_writes(config, [("other", 1)], "other")
    assert len(reader.get_tuple(at()).pending_writes) == 3


def test_no_field_of_a_heads_place_can_be_damaged(process, client):
    """Reads and steps go on whatever becomes of what says which head counts."""
    saver, reader = process(), process()
    config = grow(saver, at(), 2)
    meta = saver._shared.keys.meta("t")
    for field, value in client.hgetall(meta).items():
        for damaged in (b"", value[:-1], b"\xff\xfe"):
            client.hset(meta, field, damaged)
            config = put(saver, config, 3)
            found = config["configurable"]["checkpoint_id"]
            client.hset(meta, field, damaged)
            assert reader.get_tuple(at()).checkpoint["id"] == found
            saver.flush()


def test_the_head_of_another_place_is_not_believed(process, client):
    saver, reader = process(), process()
    keys = saver._shared.keys
    for thread, namespace in (("t", ""), ("t", "sub"), ("other", "")):
        grow(saver, at(thread, namespace), 2)
    saver.get_tuple(at("t", "empty"))
    saver.flush()
    before = reader.get_tuple(at())
    for thread, namespace in (("t", "sub"), ("t", "empty"), ("other", "")):
        client.delete(keys.head("t", ""))
        assert client.copy(keys.head(thread, namespace), keys.head("t", ""))
        assert reader.get_tuple(at()) == before


def test_the_checkpoint_of_an_earlier_life_is_not_believed(process, client):
    saver, checkpoint = process(), {**empty_checkpoint(), "id": str(uuid6())}
    head, config, cores = saver._shared.keys.head("t", ""), at(), []
    for life in (1, 2):
        saver.put(config, checkpoint, {"step": life}, {})
        cores.append(client.hget(head, "c"))
        if life == 1:
            saver.delete_thread("t")
    client.hset(head, "c", cores[0])
    assert saver.get_tuple(at()).metadata["step"] == 2


def test_a_head_of_another_shape_is_read_from_postgres(process, client):
    """Written by another program, or another version of this one, with sums that are right."""
    saver = process()
    grow(saver, at(), 2)
    saver.flush()
    before, head = saver.get_tuple(at()), saver._shared.keys.head("t", "")
    generation = client.hget(saver._shared.keys.meta("t"), "f").decode().partition(":")[0]
    packed, where = client.hget(head, "c"), (client.hget(head, "i"), client.hget(head, "p"))
    core = ormsgpack.unpackb(packed[4:])
    for other in (b'{"channel_versions": []}', b"[]", b"{", b""):
        shaped = Core(other, *core[1:])
        place = (generation, "", *(one.decode() for one in where))
        client.hset(head, "c", pack_core(shaped, *place))
        assert saver.get_tuple(at()) == before


@pytest.mark.parametrize("position", [2, 3])
def test_no_field_of_an_entry_can_be_damaged_or_lost(process, client, position):
    """Its writer is dead: there is nobody else to ask, so it is an error, and nothing is stored."""
    saver = process()
    grow(saver, at(), 2)
    journal = saver._shared.keys.journal("t")
    entries, head = client.xrange(journal), saver._shared.keys.head("t", "")
    kill(saver)
    fields = entries[position][1]
    for field, value in fields.items():
        for damaged in (*damages(value)[:3], None):
            client.delete(journal, head)
            for number, (_, others) in enumerate(entries):
                held = {**others, field: damaged} if number == position else others
                client.xadd(journal, {f: v for f, v in held.items() if v is not None})
            with pytest.raises(RefusedError, match="journal"):
                process().get_tuple(at())
    client.delete(journal, head)
    for _, others in entries:
        client.xadd(journal, others)
    assert process().get_tuple(at()).metadata["step"] == 1


ASK = {
    "get": lambda saver, config: saver.get_tuple(at()),
    "get by id": lambda saver, config: saver.get_tuple(config),
    "list": lambda saver, config: list(saver.list(at())),
    "put": lambda saver, config: put(saver, config, 7),
    "put_writes": lambda saver, config: saver.put_writes(config, [("small", 7)], "other"),
    "flush": lambda saver, config: saver.flush(),
    "delete": lambda saver, config: saver.delete_thread("t"),
}


@pytest.mark.parametrize("kind", ["meta", "head", "journal", "dirty"])
def test_a_key_of_another_type_is_none_of_ours(process, client, kind):
    saver, other = process(), process()
    for asked in ASK:
        _spoil_and_ask(saver, other, client, kind, asked)
        saver.delete_thread("t")


def _spoil_and_ask(saver, other, client, kind, asked):
    config = grow(saver, at(), 3)
    keys = saver._shared.keys
    key = keys.head("t", "") if kind == "head" else getattr(keys, kind)("t")
    client.set(key, "somebody else's")
    ASK[asked](saver, config)
    found = other.get_tuple(at())
    notes = [one.metadata["step"] for one in saver.list(at())]
    if asked == "delete":
        assert (found, notes) == (None, [])
    else:
        assert notes == [7, 2, 1, 0][asked != "put" :]
        assert found.metadata["step"] == notes[0]
        config = put(other, found.config, 8)
        assert saver.get_tuple(at()).config == config


@pytest.mark.parametrize("fence", [b"\xff\xfe", b"no-uuid:0"])
def test_a_change_that_nobody_can_name_is_not_waited_for(process, client, fence):
    saver, reader = process(), process()
    config = grow(saver, at(), 2)
    client.hset(saver._shared.keys.meta("t"), "f", b"closing:" + fence)
    assert reader.get_tuple(at()).metadata["step"] == 1
    put(saver, config, 2)
    assert reader.get_tuple(at()).metadata["step"] == 2


@pytest.mark.parametrize("damaged", [None, b"", "cut", "another's"])
def test_no_step_builds_on_a_damaged_head(process, client, damaged):
    """An older step that comes again does not become the newest, nor a fork the only child."""
    saver, reader = process(), process()
    old = grow(saver, at(), 1)
    again = saver.get_tuple(old)
    newest = put(saver, put(saver, old, 1), 2)
    saver.flush()
    head = saver._shared.keys.head("t", "")
    if damaged == "another's":
        reader.get_tuple(at("t", "empty"))
        client.delete(head)
        assert client.copy(saver._shared.keys.head("t", "empty"), head)
    elif damaged is None:
        client.hdel(head, "i")
    else:
        client.hset(head, "i", client.hget(head, "i")[:-1] if damaged == "cut" else damaged)
    versions = again.checkpoint["channel_versions"]
    saver.put(at(), again.checkpoint, {"step": 0}, versions)
    saver.put_writes(old, [("small", 1)], "late")
    assert reader.get_tuple(at()).config == saver.get_tuple(at()).config == newest


def test_no_step_builds_on_a_head_that_lost_a_field(process, client):
    """Nor is a head repaired by what comes later, as long as nobody has filled it again."""
    saver, reader = process(), process()
    config = grow(saver, at(), 3)
    saver.flush()
    head = saver._shared.keys.head("t", "")
    client.hdel(head, b"m:large")
    misses = saver.stats.misses
    config = put(saver, config, 3)
    assert reader.get_tuple(at()).config == saver.get_tuple(at()).config == config
    assert reader.stats.misses + saver.stats.misses == misses


def test_a_count_that_is_none_has_steps_flushed(process, client):
    saver = process()
    config = grow(saver, at(), 1)
    for damaged in (b"nan", b"inf", b"-100", b"1e300", b""):
        client.hset(saver._shared.keys.meta("t"), "n", damaged)
        config = put(saver, config, 1)
        assert client.xlen(saver._shared.keys.journal("t")) <= 1  # the pending write


def test_a_field_under_another_name_is_noticed(process, client):
    saver, reader = process(), process()
    grow(saver, at(), 1)
    saver.flush()
    before, head = reader.get_tuple(at()), saver._shared.keys.head("t", "")
    for name in (b"W", b"q", b"n"):
        fields = client.hgetall(head)
        write = next(field for field in fields if field[:2] == b"w:")
        client.hdel(head, write)
        client.hset(head, name + write[1:], fields[write])
        assert reader.get_tuple(at()) == before
    write = next(field for field in client.hkeys(head) if field[:2] == b"w:")
    value, other = client.hget(head, write), bytearray(write)
    other[-20] ^= 1  # of the checkpoint's id: a write that comes early
    client.hdel(head, write)
    client.hset(head, bytes(other), value)
    assert reader.get_tuple(at()) == before


def test_the_place_of_another_thread_is_not_believed(process, client):
    """Head and fence together, as a restored backup of some keys would have them."""
    saver, reader = process(), process()
    keys = saver._shared.keys
    grow(saver, at(), 2)
    grow(saver, at("other"), 3)
    saver.flush()
    before = reader.get_tuple(at())
    client.delete(keys.meta("t"), keys.head("t", ""))
    client.copy(keys.meta("other"), keys.meta("t"))
    client.copy(keys.head("other", ""), keys.head("t", ""))
    assert process().get_tuple(at()) == reader.get_tuple(at()) == before
    other = client.hgetall(keys.head("other", ""))
    head = client.hgetall(keys.head("t", ""))
    values = next(field for field in head if field[:2] == b"b:")
    client.hset(keys.head("t", ""), values, other[values])
    client.hset(keys.head("t", ""), b"n:" + values[2:], other[b"n:" + values[2:]])
    assert process().get_tuple(at()) == before


def test_a_quarantine_ends_with_its_cause(process, client):
    saver, reader = process(), process()
    config = grow(saver, at(), 2)
    journal = saver._shared.keys.journal("t")
    entries = client.xrange(journal)
    client.delete(journal)
    for number, (_, fields) in enumerate(entries):
        client.xadd(journal, fields | ({b"r": b"damaged"} if number == 1 else {}))
    with pytest.raises(RefusedError):
        list(reader.list(at()))
    with pytest.raises(RefusedError, match="this one was not taken"):
        put(reader, config, 2)
    saver.flush()  # it still has what it wrote
    config = put(reader, config, 2)
    assert saver.get_tuple(at()).config == config
