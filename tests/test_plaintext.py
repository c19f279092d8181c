"""From data in the clear to sealed data: what is read for a while, and how it is sealed."""

import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import redis
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer as LangGraphEncrypted
from langgraph.store.base import PutOp
from langgraph.store.postgres import PostgresStore

from langgraph_vat import (
    ConfigurationError,
    HybridSaver,
    InvalidInputError,
    Keyring,
    LegacySerializer,
    QuarantinedError,
    SealError,
    SemanticStore,
    Settings,
    StrictSerializer,
    TypeNotAllowedError,
    UnavailableError,
    UnreadableError,
    Vat,
)
from langgraph_vat import settings as settings_module
from langgraph_vat._io.driver import drive
from langgraph_vat._ops import items as item_ops
from langgraph_vat._ops import seal_existing as sealing
from langgraph_vat._ops import seal_items
from langgraph_vat._ops.shared import NO_SERDE
from langgraph_vat._seal.data_key import SUFFIXES
from langgraph_vat.migrate import copy_checkpoints
from tests.fix_processes import kill
from tests.fix_servers import waiting
from tests.test_forgery import FORGERIES, forge
from tests.test_protocol import Death, Faulty

KEYRING = Keyring.generate()
EAX_KEY = bytes(range(32))
MARKER = "MARKER-1f2e"
_dice = random.Random(5)


def soon() -> datetime:
    return datetime.now(UTC) + timedelta(hours=1)


@pytest.fixture
def later(monkeypatch) -> Callable[[], None]:
    """Have the windows of all processes end at once."""
    return lambda: monkeypatch.setattr(
        settings_module, "_now", lambda: datetime.now(UTC) + timedelta(days=2)
    )


@pytest.fixture
def start(postgres_url, redis_url) -> Iterator[Callable[..., HybridSaver]]:
    """Make a saver that stands for a process: in the clear, or sealed, with a window or not."""
    made: list[HybridSaver] = []

    def one(*, sealed: bool = True, window: bool = True, **more: Any) -> HybridSaver:
        options: Any = {"redis": redis_url, "flush_every": 50, "flush_after": 600.0, **more}
        if sealed:
            options["keyring"] = KEYRING
            options["accept_plaintext"] = soon() if window else None
        saver = HybridSaver.from_conn_string(postgres_url, **options)
        saver._life._flusher.stop()
        saver.setup()
        made.append(saver)
        return saver

    yield one
    for saver in made:
        kill(saver)
        saver.close()


def at(thread: str = "t", namespace: str = "") -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": namespace}}


def put(saver: Any, config: Any, number: int, **metadata: Any) -> Any:
    large = "x" * 20_000 + MARKER * (number + 1)
    values = {"small": f"{MARKER}{number}", "large": [large], "noise": _dice.randbytes(900)}
    versions = {channel: saver.get_next_version(None, None) for channel in values}
    checkpoint = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": values}
    checkpoint["channel_versions"] = versions
    metadata = {"source": "loop", "step": number, "note": f"{MARKER}{number}", **metadata}
    config = saver.put(config, checkpoint, metadata, versions)
    saver.put_writes(config, [("small", values["small"]), ("large", values["large"])], "task")
    return config


def grow(saver: Any, config: Any, steps: int, first: int = 0) -> Any:
    for number in range(first, first + steps):
        config = put(saver, config, number)
    return config


def states(saver: Any, thread: str = "t") -> list[Any]:
    return [
        (one.config, one.parent_config, one.checkpoint, one.metadata, one.pending_writes)
        for one in saver.list({"configurable": {"thread_id": thread}})
    ]


def numbers(saver: HybridSaver, thread: str = "t") -> list[int]:
    return [one[3]["step"] for one in states(saver, thread)]


def sql(url: str, statement: str, *params: Any) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET langgraph_vat.writer = 'hot'")
        cursor = connection.execute(statement, params)
        return cursor.fetchall() if cursor.description else []


def types(url: str, thread: str = "t") -> set[str]:
    """Return the type tags of all that a thread has."""
    query = """
    SELECT type FROM checkpoint_blobs WHERE thread_id = %s AND blob IS NOT NULL
    UNION SELECT type FROM checkpoint_writes WHERE thread_id = %s
    UNION SELECT coalesce(vat_type, '') FROM checkpoints WHERE thread_id = %s
    """
    return {row[0] for row in sql(url, query, thread, thread, thread)}


def is_sealed(url: str, thread: str = "t") -> bool:
    """Whether all of a thread is; it is all, or nothing."""
    (key,) = sql(url, "SELECT data_key FROM vat_threads WHERE thread_id = %s", thread)
    ends = {tag.endswith(SUFFIXES) for tag in types(url, thread)}
    assert ends <= {key[0] is not None}
    return key[0] is not None


def rows_with(url: str, marker: str) -> set[str]:
    """Return the tables in which a text is readable, as text or as bytes."""
    query = """
    SELECT 'checkpoints', c::text, vat_exact FROM checkpoints c
    UNION ALL SELECT 'blobs', '', blob FROM checkpoint_blobs
    UNION ALL SELECT 'writes', '', blob FROM checkpoint_writes
    UNION ALL SELECT 'threads', t::text, NULL FROM vat_threads t
    """
    found = sql(url, query)
    return {name for name, text, raw in found if marker in text or marker.encode() in (raw or b"")}


def redis_holds(url: str, marker: str) -> set[bytes]:
    """Return the keys of Redis whose value has a text readable."""
    with redis.Redis.from_url(url) as client:
        found = set()
        for key in client.scan_iter(count=1000):
            kind = client.type(key)
            if kind == b"hash":
                value = repr(client.hgetall(key))
            elif kind == b"stream":
                value = repr(client.xrange(key))
            else:
                value = ""
            if marker in value:
                found.add(key)
        return found


def lose(url: str) -> None:
    """Have Redis lose all that it has of threads."""
    with redis.Redis.from_url(url) as client:
        client.delete(*client.keys("*:[jmh]:*"))


# --- the window -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [datetime(2030, 1, 1), "2030-01-01", 3600, timedelta(1), True],  # noqa: DTZ001
    ids=repr,
)
def test_a_time_without_a_zone_or_no_time_is_refused(given):
    with pytest.raises(ConfigurationError, match="accept_plaintext"):
        Settings(accept_plaintext=given)


def test_a_window_ends_when_its_time_comes_in_any_zone():
    zone = timezone(timedelta(hours=-11))
    assert Settings(accept_plaintext=soon().astimezone(zone)).is_plaintext_accepted
    past = (datetime.now(UTC) - timedelta(seconds=1)).astimezone(zone)
    assert not Settings(accept_plaintext=past).is_plaintext_accepted
    assert not Settings().is_plaintext_accepted


@pytest.mark.parametrize("has_redis", [True, False], ids=["hot", "postgres"])
def test_within_the_window_a_thread_in_the_clear_is_read_and_goes_on(
    start, postgres_url, has_redis
):
    options: Any = {} if has_redis else {"redis": None}
    plain = start(sealed=False, **options)
    config = grow(plain, at(), 3)
    before = states(plain)
    saver = start(**options)
    assert states(saver) == before
    assert saver.get_tuple(at()) == plain.get_tuple(at())
    assert saver.get_tuple(before[1][0]) == plain.get_tuple(before[1][0])
    assert [one.metadata["step"] for one in saver.list(None, filter={"note": MARKER + "1"})] == [1]
    assert [one.thread_id for one in saver.threads.search()] == ["t"]
    put(saver, config, 3)
    saver.flush()
    assert not is_sealed(postgres_url)
    assert numbers(plain) == numbers(saver) == [3, 2, 1, 0]
    saver.prune(["t"])
    assert numbers(saver) == [3]


def test_a_new_thread_is_sealed_within_the_window(start, postgres_url):
    saver = start()
    grow(saver, at("new"), 2)
    saver.flush()
    assert is_sealed(postgres_url, "new")


def test_without_a_window_what_is_in_the_clear_is_refused(start):
    config = grow(start(sealed=False), at(), 1)
    saver = start(window=False)
    for call in (
        lambda: saver.get_tuple(at()),
        lambda: list(saver.list(at())),
        lambda: list(saver.list(None)),
        lambda: put(saver, config, 1),
        lambda: saver.put_writes(config, [("small", 1)], "task2"),
        lambda: saver.copy_thread("t", "u"),
    ):
        with pytest.raises(SealError, match="without encryption"):
            call()
    with pytest.raises(ConfigurationError, match="accept_plaintext"):
        saver.threads.seal_existing()


def test_when_the_window_ends_a_process_that_knows_the_thread_refuses_it(start, later):
    plain, saver = start(sealed=False), start()
    config = grow(plain, at(), 2)
    config = put(saver, config, 2)
    assert saver.get_tuple(at()).metadata["step"] == 2
    later()
    for call in (
        lambda: saver.get_tuple(at()),
        lambda: saver.get_tuple(config),
        lambda: list(saver.list(at())),
        lambda: put(saver, config, 3),
        lambda: saver.put_writes(config, [("small", 1)], "task2"),
    ):
        with pytest.raises(SealError, match="without encryption"):
            call()
    saver.flush()  # what was acknowledged is kept
    assert numbers(plain) == [2, 1, 0]
    with pytest.raises(ConfigurationError, match="has ended"):
        saver.threads.seal_existing()


@pytest.mark.parametrize("statement", FORGERIES.values(), ids=FORGERIES)
@pytest.mark.parametrize("has_redis", [True, False], ids=["hot", "postgres"])
def test_a_thread_that_has_a_key_admits_no_plaintext_within_the_window(
    start, postgres_url, statement, has_redis
):
    saver = start(**({} if has_redis else {"redis": None}))
    for thread in "tu":
        config = at(thread)
        for text in (thread, thread + "!"):
            versions = {"text": saver.get_next_version(None, None)}
            checkpoint = {**empty_checkpoint(), "id": str(uuid6())}
            checkpoint |= {"channel_values": {"text": text}, "channel_versions": versions}
            config = saver.put(config, checkpoint, {}, versions)
    saver.flush()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE checkpoints DISABLE TRIGGER USER")
        connection.execute("ALTER TABLE checkpoint_blobs DISABLE TRIGGER USER")
    forge(postgres_url, statement)
    with pytest.raises(SealError):
        list(start(**({} if has_redis else {"redis": None})).list(at()))


def test_a_head_in_the_clear_from_before_the_thread_was_sealed_is_not_served(
    start, postgres_url, redis_url
):
    config = grow(start(sealed=False), at(), 1)
    other = start()
    assert other.get_tuple(at()) is not None  # and it is remembered
    with redis.Redis.from_url(redis_url) as client:
        kept = {key: client.dump(key) for key in client.keys("*t*") if b":j:" not in key}
        saver = start()
        saver.threads.seal_existing()
        put(saver, config, 1)
        saver.flush()
        for key, value in kept.items():
            client.restore(key, 0, value, replace=True)
    assert other.get_tuple(at()).metadata["step"] == 1


# --- sealing threads --------------------------------------------------------------------


def test_all_of_a_thread_is_sealed_and_reads_as_before(start, postgres_url, redis_url):
    plain = start(sealed=False)
    grow(plain, at(), 70)  # more than a page of each kind
    grow(plain, at("t", "sub"), 2)
    grow(plain, at("other"), 2)
    before = states(plain), states(plain, "other")
    assert plain.get_tuple(at("t", "sub")) is not None
    plain.get_tuple(at())
    assert rows_with(postgres_url, MARKER) >= {"checkpoints", "blobs", "writes"}
    assert len(redis_holds(redis_url, MARKER)) >= 3
    saver = start()
    done = saver.threads.seal_existing()
    assert done == (2, 74 * 6, 0)
    assert is_sealed(postgres_url)
    assert is_sealed(postgres_url, "other")
    assert rows_with(postgres_url, MARKER) == set()
    assert redis_holds(redis_url, MARKER) == set()
    assert saver.threads.seal_existing() == (0, 0, 0)
    for reader in (saver, start(), start(window=False)):
        assert (states(reader), states(reader, "other")) == before
        assert reader.get_tuple(at()).metadata["step"] == 69
    with pytest.raises(SealError, match="no keyring"):
        plain.get_tuple(at())
    assert saver.threads.reseal().values == done.values
    assert states(start(window=False)) == before[0]


async def test_the_asyncio_face_seals_too(start, postgres_url):
    grow(start(sealed=False), at(), 2)
    saver = start()
    assert await saver.threads.aseal_existing() == (1, 12, 0)
    assert len([one async for one in saver.alist(at())]) == 2
    await saver.aclose()
    assert is_sealed(postgres_url)


def test_a_tenants_view_seals_the_threads_of_the_tenant(start, postgres_url):
    plain = start(sealed=False)
    for saver in (plain, plain.scoped("acme")):
        grow(saver, at(), 1)
    saver = start()
    assert saver.scoped("acme").threads.seal_existing().keys == 1
    assert not is_sealed(postgres_url)
    assert saver.threads.seal_existing().keys == 1
    assert numbers(saver.scoped("acme")) == numbers(saver) == [0]


def test_what_another_saver_wrote_is_sealed(postgres_url):
    options: Any = {"keyring": KEYRING, "accept_plaintext": soon()}
    with PostgresSaver.from_conn_string(postgres_url) as plain:
        plain.setup()
        config = grow(plain, at(), 3)
        checkpoint = {**empty_checkpoint(), "v": 3, "pending_sends": [MARKER]}
        values = {"text": MARKER, "none": None, "flag": True, "count": 2**40, "bytes": b"a"}
        versions = {name: plain.get_next_version(None, None) for name in [*values, "gone"]}
        checkpoint |= {"channel_values": values, "channel_versions": versions}
        config = plain.put(config, checkpoint, {"step": 3, "a": [1.5, {"b": MARKER}]}, versions)
        plain.put_writes(at("writes only") | config, [("text", 1)], "task")
        before = states(plain)
    sql(
        postgres_url,
        "INSERT INTO checkpoint_writes (thread_id, checkpoint_id, task_id, idx, channel, type,"
        " blob) VALUES ('early', '1', 't', 0, 'c', 'null', '')",
    )
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        assert states(saver) == before
        assert saver.threads.seal_existing() == (2, 3 * 5 + 1 + 2 + 2 - 1, 0)
        assert states(saver) == before
    assert rows_with(postgres_url, MARKER) == set()
    assert is_sealed(postgres_url)


def test_values_of_no_checkpoint_and_a_thread_without_a_name_are_sealed_too(postgres_url):
    with PostgresSaver.from_conn_string(postgres_url) as plain:
        plain.setup()
        for thread in ("", "a", "b", "c"):
            grow(plain, at(thread), 2)
        before = states(plain, "")
    for table in ("checkpoints", "checkpoint_writes"):
        sql(postgres_url, f"DELETE FROM {table} WHERE thread_id IN ('a', 'c')")
    options: Any = {"keyring": KEYRING, "accept_plaintext": soon()}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        assert saver.threads.seal_existing() == (4, 2 * (6 + 6 - 2) + 2 * (6 - 2), 0)
        found = [one for one in saver.list(None) if not one.config["configurable"]["thread_id"]]
        assert [one.checkpoint for one in found] == [one[2] for one in before]
        assert numbers(saver, "b") == [1, 0]
        assert saver.threads.seal_existing() == (0, 0, 0)
    assert rows_with(postgres_url, MARKER) == set()


LARGE = {"integer": -(2**70), "float": 1e22, "deep": [{"x": 10**400}]}


def test_numbers_that_jsonb_has_and_msgpack_has_not_are_sealed(postgres_url, store):
    options: Any = {"keyring": KEYRING, "accept_plaintext": soon()}
    with (
        PostgresSaver.from_conn_string(postgres_url) as plain,
        PostgresStore.from_conn_string(postgres_url) as items,
    ):
        plain.setup()
        items.setup()
        versions = {name: plain.get_next_version(None, None) for name in ("integer", "float")}
        checkpoint = {**empty_checkpoint(), "channel_values": {**LARGE}}
        checkpoint |= {"channel_versions": versions}
        plain.put(at(), checkpoint, {"step": 1, **LARGE}, versions)
        items.put(("a",), "k", LARGE)
        before = states(plain), items.get(("a",), "k").value
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        assert states(saver) == before[0]
        assert (saver.threads.seal_existing().left, store().seal_existing()) == (0, (1, 1, 0))
        assert states(saver) == before[0]
    assert store(window=False).get(("a",), "k").value == before[1] == LARGE


def test_metadata_stays_readable_and_filterable_as_of_a_thread_sealed_from_the_first(
    start, postgres_url
):
    plain = start(sealed=False)
    for number in range(4):
        put(plain, at(f"t{number}"), number, user="ada" if number % 2 else "bob", team="blue")
    tuned: Any = {"filterable_metadata": ("user",), "thread_metadata": ("team",)}
    saver = start(**tuned)
    found = [one.metadata["step"] for one in saver.list(None, filter={"user": "ada"})]
    assert found == [3, 1]
    assert saver.threads.seal_existing().left == 0
    put(saver, at("new"), 4, user="ada", team="blue")
    saver.flush()
    shown = sql(postgres_url, "SELECT DISTINCT jsonb_object_keys(metadata) FROM checkpoints")
    assert {row[0] for row in shown} == {"source", "step", "team", "vat_blind"}
    tokens = sql(
        postgres_url, "SELECT metadata -> 'vat_blind' ->> 'user', thread_id FROM checkpoints"
    )
    assert len({token for token, _ in tokens}) == 2
    assert all(token for token, _ in tokens)
    assert sql(postgres_url, "SELECT DISTINCT metadata FROM vat_threads") == [({"team": "blue"},)]
    # Of the others nothing is opened any more.
    sql(
        postgres_url,
        "UPDATE checkpoints SET vat_exact = '\\x00' WHERE thread_id IN ('t0', 't2')",
    )
    found = [one.metadata["step"] for one in saver.list(None, filter={"user": "ada"})]
    assert found == [4, 3, 1]


def test_a_thread_that_has_a_sealed_row_and_no_key_is_left(start, postgres_url, caplog):
    saver = start()
    grow(saver, at(), 2)
    grow(saver, at("u"), 1)
    grow(start(sealed=False), at("plain"), 1)
    saver.flush()
    sql(postgres_url, "UPDATE vat_threads SET data_key = NULL WHERE thread_id = 't'")
    sql(postgres_url, "DELETE FROM checkpoint_blobs WHERE thread_id = 't' AND channel <> 'small'")
    done = start().threads.seal_existing()
    assert (done.keys, done.left) == (1, 1)
    assert "could not be sealed" in caplog.text
    assert MARKER not in caplog.text
    with pytest.raises(SealError):
        states(start())
    assert numbers(start(), "plain") == [0]


DAMAGES = {
    "metadata": "UPDATE checkpoints SET vat_exact = '\\x81' WHERE thread_id = 'b'",
    "no metadata": "UPDATE checkpoints SET vat_exact = NULL WHERE thread_id = 'b'",
    "a list": "UPDATE checkpoints SET metadata = '[1]', vat_type = NULL WHERE thread_id = 'b'",
    "a frame": "UPDATE checkpoint_blobs SET type = 'msgpack+aes' WHERE thread_id = 'b'",
    "another seal": "UPDATE checkpoint_writes SET type = 'a+aes256gcm' WHERE thread_id = 'b'",
    "versions": "UPDATE checkpoints SET checkpoint = checkpoint || '{\"channel_versions\": [1]}'"
    " WHERE thread_id = 'b'",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_of_a_damaged_thread_it_is_told_and_the_others_are_sealed(
    start, postgres_url, caplog, damage
):
    plain = start(sealed=False, redis=None)
    for thread in "abc":
        put(plain, at(thread), 1, when=datetime.now(UTC))
    sql(postgres_url, damage)
    done = start(redis=None).threads.seal_existing()
    assert (done.keys, done.left) == (2, 1)
    assert is_sealed(postgres_url, "a")
    assert is_sealed(postgres_url, "c")
    assert re.search(r"thread 'b' could not be sealed: .*(checkpoint|blob|write)", caplog.text)
    assert MARKER not in caplog.text


def test_without_redis_that_may_hold_steps_nothing_is_sealed(own_redis, start, postgres_url):
    options: Any = {"redis": own_redis.url, "timeout_s": 1.0, "epoch_ttl_s": 0.2}
    grow(start(sealed=False, **options), at(), 1)
    saver = start(**options)
    assert saver.get_tuple(at()) is not None
    own_redis.kill()
    with pytest.raises(UnavailableError, match="Redis"):
        saver.threads.seal_existing()
    own_redis.start()
    assert sql(postgres_url, "SELECT data_key FROM vat_threads") == [(None,)]


# --- other processes ----------------------------------------------------------------------


def test_a_process_that_knew_the_thread_in_the_clear_goes_on_sealed(start, postgres_url):
    saver, other = start(), start()
    config = grow(start(sealed=False), at(), 2)
    config = put(other, config, 2)
    assert saver.threads.seal_existing().keys == 1
    config = put(other, config, 3)
    other.put_writes(config, [("small", 1)], "task2")
    other.flush()
    assert is_sealed(postgres_url)
    assert numbers(other) == numbers(start(window=False)) == [3, 2, 1, 0]
    assert other.get_tuple(at()).metadata["step"] == 3


def test_steps_that_another_process_alone_has_are_sealed_when_it_flushes(
    start, postgres_url, redis_url, later
):
    plain, other = start(sealed=False), start(filterable_metadata=("user",))
    config = grow(plain, at(), 1)
    plain.flush()
    config = put(other, config, 1, user="ada")
    lose(redis_url)
    assert start().threads.seal_existing().keys == 1
    later()
    other.flush()
    assert is_sealed(postgres_url)
    assert rows_with(postgres_url, MARKER) == set()
    found = states(start(window=False))
    assert [one[3]["step"] for one in found] == [1, 0]
    assert found[0][3]["user"] == "ada"
    assert found[0][4][0][2] == MARKER + "1"


def test_a_process_without_a_keyring_stores_nothing_in_a_sealed_thread(
    start, postgres_url, redis_url
):
    plain, other = start(sealed=False), start()
    config = grow(plain, at(), 1)
    plain.flush()
    config = put(plain, config, 1)
    lose(redis_url)
    assert other.threads.seal_existing().keys == 1
    with pytest.raises(QuarantinedError, match="keyring="):
        plain.flush()
    with pytest.raises(QuarantinedError, match="keyring="):
        put(plain, config, 2)
    assert is_sealed(postgres_url)
    assert numbers(other) == [0]


def test_what_somebody_puts_into_the_journal_of_a_sealed_thread_in_the_clear_is_dropped(
    start, postgres_url, redis_url, caplog
):
    plain = start(sealed=False)
    config = grow(plain, at(), 1)
    saver = start()
    with redis.Redis.from_url(redis_url) as client:
        (journal,) = client.keys("*:j:*")
        forged = [fields for _, fields in client.xrange(journal)]
        saver.threads.seal_existing()
        config = put(saver, config, 1)
        for fields in forged:
            client.xadd(journal, fields)
    start().flush()
    assert "in the clear" in caplog.text
    assert is_sealed(postgres_url)
    assert numbers(start(window=False)) == [1, 0]


def test_a_copy_of_a_thread_in_the_clear_is_sealed(start, postgres_url):
    plain = start(sealed=False)
    grow(plain, at(), 3)
    before = states(plain)
    saver = start()
    saver.copy_thread("t", "copy")
    assert is_sealed(postgres_url, "copy")
    assert [one[2:] for one in states(saver, "copy")] == [one[2:] for one in before]
    saver.flush()
    sql(postgres_url, "DELETE FROM checkpoint_writes WHERE thread_id = 't'")
    sql(postgres_url, "DELETE FROM checkpoints WHERE thread_id = 't'")
    with pytest.raises(InvalidInputError, match="is not"):
        saver.copy_thread("copy", "t")


def test_killed_anywhere_it_leaves_all_readable(start, postgres_url, redis_url):
    plain, writer = start(sealed=False), start()
    config = grow(plain, at(), 3)
    grow(plain, at("u"), 1)
    deaths, steps = 0, 3
    for after in (False, True):
        for dies_at in range(1, 100):
            worker = start()
            faulty = Faulty(worker._life.blocking(), dies_at, after=after)
            job = sealing.seal_existing(worker._shared, faulty, NO_SERDE, prefix="")
            try:
                drive(job)
            except Death:
                deaths += 1
            else:
                break
            is_sealed(postgres_url)  # all or nothing
            config, steps = put(writer, config, steps), steps + 1
            assert numbers(start()) == [*range(steps)][::-1]
            assert start().get_tuple(at()).metadata["step"] == steps - 1
    assert deaths >= 10
    assert start().threads.seal_existing() == (0, 0, 0)
    assert is_sealed(postgres_url)
    assert is_sealed(postgres_url, "u")
    assert redis_holds(redis_url, MARKER) == set()
    assert numbers(start(window=False)) == [*range(steps)][::-1]


def test_threads_go_on_while_they_are_sealed(start, postgres_url):
    plain = start(sealed=False)
    count, steps = 24, 12
    configs = [grow(plain, at(f"t{number}"), 2) for number in range(count)]
    plain.flush()
    writers = [start(flush_every=4), start(flush_every=4)]

    def run(number: int) -> None:
        config = configs[number]
        for step in range(2, steps):
            config = put(writers[(number + step // 3) % 2], config, step)
            reader = writers[step % 2]
            assert reader.get_tuple(at(f"t{number}")).metadata["step"] == step
            assert reader.get_tuple(config).metadata["step"] == step
            assert numbers(reader, f"t{number}") == [*range(step + 1)][::-1]
            assert len(list(reader.list(None, limit=30))) == 30

    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(run, number) for number in range(count)]
        sealer, sealed = start(), 0
        while not all(one.done() for one in runs):
            sealed += sealer.threads.seal_existing().keys
        for one in runs:
            one.result()
    assert sealed == count
    for writer in writers:
        writer.flush()
    for number in range(count):
        assert is_sealed(postgres_url, f"t{number}")
        assert numbers(sealer, f"t{number}") == [*range(steps)][::-1]


# --- a store ------------------------------------------------------------------------------


@pytest.fixture
def store(postgres_url) -> Iterator[Callable[..., SemanticStore]]:
    """Make a store that stands for a process: in the clear, or sealed, with a window or not."""
    made: list[SemanticStore] = []

    def one(*, sealed: bool = True, window: bool = True, **more: Any) -> SemanticStore:
        options: Any = dict(more)
        if sealed:
            options.setdefault("keyring", KEYRING)
            options["accept_plaintext"] = soon() if window else None
        made.append(SemanticStore.from_conn_string(postgres_url, **options))
        made[-1].setup()
        return made[-1]

    yield one
    for each in made:
        each.close()


def kept(url: str, root: str) -> set[bool]:
    query = "SELECT vat_type, value::text FROM store WHERE split_part(prefix, '.', 1) = %s"
    found = sql(url, query, root)
    for type_, value in found:
        assert (type_ or "").endswith(SUFFIXES) == (MARKER not in value)
    return {(type_ or "").endswith(SUFFIXES) for type_, _ in found}


def test_within_the_window_items_in_the_clear_are_read_and_put(store, postgres_url):
    plain = store(sealed=False)
    plain.put(("a", "b"), "k", {"text": MARKER, "n": 1})
    plain.put(("a",), "exact", {"text": MARKER, "raw": b"x"})
    both = store()
    assert both.get(("a", "b"), "k").value == {"text": MARKER, "n": 1}
    assert both.get(("a",), "exact").value == {"text": MARKER, "raw": b"x"}
    assert len(both.search(("a",))) == 2
    assert [one.key for one in both.search(("a",), filter={"n": 1})] == ["k"]
    both.put(("a", "c"), "k2", {"text": MARKER})
    both.put(("new",), "k", {"text": MARKER})
    assert kept(postgres_url, "a") == {False}
    assert kept(postgres_url, "new") == {True}
    assert plain.get(("a", "c"), "k2").value == {"text": MARKER}
    assert both.get(("new",), "k").value == {"text": MARKER}


def test_when_the_window_ends_items_in_the_clear_are_refused(store, later):
    store(sealed=False).put(("a",), "k", {"text": MARKER})
    never, until = store(window=False), store()
    assert until.get(("a",), "k") is not None
    later()
    for one in (never, until):
        for call in (lambda one=one: one.get(("a",), "k"), lambda one=one: one.search(("a",))):
            with pytest.raises(SealError, match="sealed"):
                call()
        with pytest.raises(ConfigurationError, match="accept_plaintext"):
            one.seal_existing()


def test_a_root_that_has_a_key_admits_no_item_in_the_clear(store, postgres_url):
    both = store()
    both.put(("a",), "k", {"text": "x"})
    both.put(("b",), "k", {"text": "x"})
    sql(
        postgres_url,
        "UPDATE store SET vat_type = NULL, vat_value = NULL, value = '{}' WHERE prefix = 'a'",
    )
    sql(postgres_url, "UPDATE store SET vat_type = 'msgpack' WHERE prefix = 'b'")
    for root in "ab":
        with pytest.raises(SealError):
            store().get((root,), "k")
    assert store().seal_existing() == (0, 0, 0)


def test_beside_items_in_the_clear_nothing_is_put_without_a_window(store, postgres_url):
    store(sealed=False).put(("a",), "k", {"text": MARKER})
    with pytest.raises(SealError, match="first label 'a'"):
        store(window=False).put(("a",), "k2", {"text": MARKER})
    assert store().get(("a",), "k2") is None
    store().put(("a",), "k2", {"text": MARKER})
    assert store().seal_existing() == (1, 2, 0)
    assert kept(postgres_url, "a") == {True}


def expire(url: str, key: str) -> None:
    sql(url, "UPDATE store SET expires_at = now() - interval '1 hour' WHERE key = %s", key)


@pytest.mark.parametrize("window", [True, False], ids=["window", "strict"])
def test_what_has_expired_is_not_in_the_clear_whether_swept_or_not(store, postgres_url, window):
    plain = store(sealed=False)
    plain.put(("a", "b"), "old", {"text": MARKER}, ttl=1)
    expire(postgres_url, "old")
    store(window=window).put(("a",), "new", {"text": MARKER})
    assert kept(postgres_url, "a") == {True}
    assert [one.key for one in store(window=False).search(("a",))] == ["new"]
    plain.put(("b",), "old", {"text": MARKER}, ttl=1)
    plain.put(("b", "c"), "new", {"text": MARKER})
    plain.put(("c",), "old", {"text": MARKER}, ttl=1)
    expire(postgres_url, "old")
    assert store().seal_existing() == (1, 1, 0)
    assert kept(postgres_url, "b") == {True}
    assert kept(postgres_url, "c") == set()


def test_an_item_that_is_refreshed_just_now_is_not_left_in_the_clear(store, postgres_url):
    plain = store(sealed=False)
    plain.put(("a",), "old", {"text": MARKER}, ttl=1)
    expire(postgres_url, "old")
    with psycopg.connect(postgres_url) as other, ThreadPoolExecutor(1) as pool:
        other.execute("UPDATE store SET expires_at = now() + interval '1 hour'")
        run = pool.submit(store().put, ("a",), "new", {"text": MARKER})
        while not (run.done() or waiting(postgres_url)):
            pass
        other.commit()
        run.result()
    assert kept(postgres_url, "a") == {False}
    assert len(store().search(("a",))) == 2


class Meddling:
    """A keyring whose first wrapping takes so long that somebody does something meanwhile."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.cipher = KEYRING.cipher
        self._meanwhile = [meanwhile]

    def wrap(self, data_key: bytes, *, associated_data: bytes) -> bytes:
        while self._meanwhile:
            self._meanwhile.pop()()
        return KEYRING.wrap(data_key, associated_data=associated_data)

    def unwrap(self, wrapped: bytes, *, associated_data: bytes) -> bytes:
        return KEYRING.unwrap(wrapped, associated_data=associated_data)

    def is_current(self, wrapped: bytes) -> bool:
        return KEYRING.is_current(wrapped)


def test_an_item_put_in_the_clear_a_moment_before_is_not_left_behind(store, postgres_url):
    plain = store(sealed=False)
    keyring = Meddling(lambda: plain.put(("a",), "first", {"text": MARKER}))
    store(keyring=keyring).put(("a",), "second", {"text": MARKER})
    assert kept(postgres_url, "a") == {False}
    assert store().seal_existing() == (1, 2, 0)
    assert len(store(window=False).search(("a",))) == 2


def test_a_store_without_a_keyring_puts_nothing_where_items_are_sealed(store, postgres_url):
    plain, both = store(sealed=False), store()
    plain.put(("a", "b"), "k", {"text": MARKER})
    both.put(("new",), "k", {"text": MARKER})
    both.seal_existing()
    for place in (("a", "b"), "k"), (("a",), "k2"), (("new",), "k"):
        with pytest.raises(SealError, match="no keyring"):
            plain.put(*place, {"text": MARKER})
    with pytest.raises(SealError, match="no keyring"):
        plain.batch([PutOp(("other",), "k", {"text": MARKER}), PutOp(("a",), "k", {"n": 1})])
    assert kept(postgres_url, "a") == kept(postgres_url, "new") == {True}
    assert kept(postgres_url, "other") == set()
    plain.put(("other",), "k", {"text": MARKER})
    plain.delete(("a", "b"), "k")
    assert [one.key for one in store(window=False).search(("a",))] == []


@pytest.mark.parametrize("keyring", [None, KEYRING], ids=["plain", "sealed"])
def test_what_is_put_while_its_root_is_sealed_is_not_in_the_clear(store, postgres_url, keyring):
    store(sealed=False).put(("a",), "first", {"text": MARKER})
    putter = store(sealed=keyring is not None)
    runs: list[Any] = []

    def meanwhile() -> None:
        runs.append(pool.submit(putter.put, ("a",), "second", {"text": MARKER}))
        while not (runs[0].done() or waiting(postgres_url)):
            pass

    with ThreadPoolExecutor(1) as pool:
        assert store(keyring=Meddling(meanwhile)).seal_existing() == (1, 1, 0)
        error = runs[0].exception()
    assert (error is None) == (keyring is not None)
    assert isinstance(error, SealError | None)
    assert kept(postgres_url, "a") == {True}


def test_items_are_sealed_with_their_tokens(store, postgres_url):
    plain = store(sealed=False)
    for number in range(600):  # more than a page
        value = {"text": MARKER, "user": f"u{number % 3}"}
        plain.put(("a", f"n{number % 7}"), f"k{number}", value)
    plain.put(("a-b",), "k", {"text": MARKER, "raw": b"x"})
    plain.put(("z", "y"), "k", {"text": MARKER})
    before = {(one.namespace, one.key): one for one in plain.search((), limit=1000)}
    both = store(filterable_fields=("user",))
    assert both.seal_existing() == (3, 602, 0)
    assert both.seal_existing() == (0, 0, 0)
    for root in ("a", "a-b", "z"):
        assert kept(postgres_url, root) == {True}
    strict = store(window=False, filterable_fields=("user",))
    found = {(one.namespace, one.key): one for one in strict.search((), limit=1000)}
    assert found == before
    sql(
        postgres_url,
        "UPDATE store SET vat_value = '\\x00' WHERE key IN ('k0', 'k1')",
    )
    assert len(strict.search(("a",), filter={"user": "u2"}, limit=1000)) == 200


ITEM_DAMAGES = {
    "no value": "vat_value = NULL",
    "another seal": "vat_type = 'msgpack+aes256gcm'",
    "encrypted": "vat_type = 'msgpack+aes'",
}


@pytest.mark.parametrize("damage", ITEM_DAMAGES.values(), ids=ITEM_DAMAGES)
def test_of_a_damaged_item_it_is_told_and_other_roots_are_sealed(
    store, postgres_url, caplog, damage
):
    plain = store(sealed=False)
    for root in "abc":
        plain.put((root, "x"), "k", {"text": MARKER, "when": datetime.now(UTC)})
    sql(postgres_url, f"UPDATE store SET {damage} WHERE prefix = 'b.x'")
    assert store(filterable_fields=("when",)).seal_existing() == (2, 2, 1)
    assert kept(postgres_url, "a") == kept(postgres_url, "c") == {True}
    assert "item 'k' of namespace 'b.x'" in caplog.text
    assert MARKER not in caplog.text


@dataclass
class Gone:
    """A class that is not there any more when its values are sealed."""

    text: str


def test_an_item_of_a_class_that_is_gone_is_sealed_as_it_is(store, postgres_url, monkeypatch):
    serde = StrictSerializer(allow=[Gone])
    plain = store(sealed=False, serde=serde)
    for key in "ab":
        plain.put(("a",), key, {"text": MARKER, "one": Gone(MARKER) if key == "a" else 1})
    with monkeypatch.context() as patch:
        patch.delattr(sys.modules[__name__], "Gone")
        both = store(serde=serde, filterable_fields=("text",))
        assert both.seal_existing() == (1, 2, 0)
        assert kept(postgres_url, "a") == {True}
        assert both.get(("a",), "b").value["text"] == MARKER
        with pytest.raises(UnreadableError):
            both.get(("a",), "a")
    found = both.search(("a",), filter={"text": MARKER})
    assert {one.key: one.value["one"] for one in found} == {"a": Gone(MARKER), "b": 1}


async def test_the_asyncio_face_of_a_store_seals_too(store):
    store(sealed=False).put(("a",), "k", {"text": MARKER})
    both = store()
    assert await both.aseal_existing() == (1, 1, 0)
    assert (await both.aget(("a",), "k")).value == {"text": MARKER}
    await both.aclose()


def test_items_are_put_and_read_while_their_root_is_sealed(store, postgres_url):
    plain = store(sealed=False)
    for number in range(300):
        plain.put(("a",), f"k{number}", {"text": MARKER})
    writers = [store(), store()]

    def run(number: int) -> None:
        for step in range(40):
            writers[step % 2].put(("a",), f"new{number}-{step}", {"text": MARKER})
            other = writers[(step + 1) % 2]
            assert other.get(("a",), f"new{number}-{step}").value == {"text": MARKER}
            assert other.get(("a",), "k7").value == {"text": MARKER}
            assert len(other.search(("a",), limit=5)) == 5

    with ThreadPoolExecutor(6) as pool:
        runs = [pool.submit(run, number) for number in range(6)]
        time.sleep(0.3)
        assert store().seal_existing().keys == 1
        for one in runs:
            one.result()
    assert kept(postgres_url, "a") == {True}
    assert len(store(window=False).search(("a",), limit=1000)) == 540


@pytest.mark.parametrize("ask", ["get", "search"])
def test_a_read_goes_by_one_state_of_its_root_though_another_learns_of_its_sealing(
    store, monkeypatch, ask
):
    plain = store(sealed=False)
    for key in "xy":
        plain.put(("a",), key, {"text": MARKER}, ttl=100)
    reader, sealer, opened = store(), store(), item_ops._opened

    async def meanwhile(*args: Any) -> Any:
        found = await opened(*args)
        if sealer.seal_existing().keys:  # the first time
            assert reader.get(("a",), "y", refresh_ttl=False) is not None
        return found

    monkeypatch.setattr(item_ops, "_opened", meanwhile)
    for _ in range(2):
        found = reader.search(("a",))[0] if ask == "search" else reader.get(("a",), "x")
        assert found.value == {"text": MARKER}


def test_a_store_killed_anywhere_is_readable(store, postgres_url):
    plain = store(sealed=False)
    for root in "ab":
        plain.put((root,), "k", {"text": MARKER})
    for after in (False, True):
        for dies_at in range(1, 30):
            worker = store()
            backend = worker._connections.blocking()
            hot = SimpleNamespace(script=None, read_each=None)  # is not used
            faulty = Faulty(
                SimpleNamespace(durable=backend.durable, hot=hot, sleep=None), dies_at, after=after
            )
            try:
                drive(seal_items.seal_roots(worker._items, faulty))
            except Death:
                pass
            else:
                break
            for root in "ab":
                assert len(kept(postgres_url, root)) == 1
                assert store().get((root,), "k").value == {"text": MARKER}
    assert kept(postgres_url, "a") == kept(postgres_url, "b") == {True}


def test_both_are_sealed_at_once(postgres_url, redis_url):
    with Vat.connect(postgres_url, redis_url) as plain:
        grow(plain.checkpointer, at(), 1)
        plain.store.put(("a",), "k", {"text": MARKER})
    options: Any = {"keyring": KEYRING, "accept_plaintext": soon()}
    with Vat.connect(postgres_url, redis_url, **options) as vat:
        assert vat.seal_existing() == (2, 7, 0)
        assert vat.seal_existing() == (0, 0, 0)
    with Vat.connect(postgres_url, redis_url, keyring=KEYRING) as vat:
        assert numbers(vat.checkpointer) == [0]
        assert vat.store.get(("a",), "k").value == {"text": MARKER}


# --- LangGraph's own encryption -----------------------------------------------------------


@pytest.fixture
def encrypted(postgres_url) -> list[Any]:
    """Return the states of a thread that PostgresSaver wrote encrypted."""
    serde = LangGraphEncrypted.from_pycryptodome_aes(key=EAX_KEY)
    with PostgresSaver.from_conn_string(postgres_url) as plain:
        plain.serde = serde
        plain.setup()
        grow(plain, at(), 3)
        return states(plain)


def test_what_langgraph_encrypted_is_read_and_sealed(postgres_url, encrypted):
    assert "msgpack+aes" in types_of_blobs(postgres_url)
    serde = LegacySerializer(EAX_KEY)
    with HybridSaver.from_conn_string(postgres_url, serde=serde) as plain:
        assert states(plain) == encrypted
        grow(plain, encrypted[0][0], 3, first=3)  # which build on it
        before = states(plain)
        assert sql(postgres_url, "SELECT 1 FROM checkpoint_blobs WHERE vat_bases <> '{}'")
    options: Any = {"serde": serde, "keyring": KEYRING, "accept_plaintext": soon()}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        assert states(saver) == before
        assert saver.threads.seal_existing().left == 0
        assert states(saver) == before
    assert not {tag for tag in types(postgres_url) if "+aes+" in tag or tag.endswith("+aes")}
    assert is_sealed(postgres_url)
    with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING) as strict:
        assert states(strict) == before


def types_of_blobs(url: str) -> set[str]:
    return {row[0] for row in sql(url, "SELECT type FROM checkpoint_blobs")}


def test_another_key_or_another_serializer_reads_nothing(postgres_url, encrypted):
    options: Any = {"keyring": KEYRING, "accept_plaintext": soon()}
    serde = LegacySerializer(bytes(16))
    with HybridSaver.from_conn_string(postgres_url, serde=serde, **options) as saver:
        with pytest.raises(SealError, match="another one"):
            states(saver)
        assert saver.threads.seal_existing() == (0, 0, 1)
        with pytest.raises(SealError):
            serde.loads_typed(("msgpack+aes", b"short"))


def test_a_bit_of_what_langgraph_encrypted_makes_a_difference():
    serde = LegacySerializer(EAX_KEY)
    type_, data = LangGraphEncrypted.from_pycryptodome_aes(key=EAX_KEY).dumps_typed({"a": 1})
    assert serde.loads_typed((type_, data)) == {"a": 1}
    flipped = (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data)))
    for other in (*flipped, *(data[:end] for end in range(len(data))), data + b"x"):
        with pytest.raises(SealError, match="could not be decrypted"):
            serde.loads_typed((type_, other))


@pytest.mark.parametrize("tag", ["msgpack+aes+foo", "msgpack+aes+aes", "+aes+", "aes", "msgpack+"])
def test_what_has_another_tag_is_not_taken_for_what_langgraph_encrypted(tag):
    serde = LegacySerializer(EAX_KEY)
    _, data = LangGraphEncrypted.from_pycryptodome_aes(key=EAX_KEY).dumps_typed({"a": 1})
    assert not serde.is_encrypted(tag)
    with pytest.raises(TypeNotAllowedError):
        serde.loads_typed((tag, data))
    with pytest.raises(SealError, match="could not be decrypted"):
        serde.loads_typed(("msgpack+aes", None))


def test_what_langgraph_encrypted_is_not_sealed_without_its_key(postgres_url, encrypted, caplog):
    options: Any = {"keyring": KEYRING, "accept_plaintext": soon()}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        assert saver.threads.seal_existing() == (0, 0, 1)
        with pytest.raises(SealError, match="LegacySerializer"):
            saver.copy_thread("t", "copy")
    assert "LegacySerializer" in caplog.text
    serde = LegacySerializer(EAX_KEY)
    with HybridSaver.from_conn_string(postgres_url, serde=serde, **options) as saver:
        assert saver.threads.seal_existing().left == 0
        assert states(saver) == encrypted


def test_what_langgraph_encrypted_is_copied(postgres_url, encrypted):
    source = HybridSaver.from_conn_string(postgres_url, serde=LegacySerializer(EAX_KEY))
    target = HybridSaver.from_conn_string(postgres_url, schema="new", keyring=KEYRING)
    with source, target:
        copy_checkpoints(source, target)
        assert states(target) == encrypted


def test_a_legacy_serializer_writes_as_the_strict_one_does(monkeypatch):
    monkeypatch.setenv("LANGGRAPH_AES_KEY", "k" * 32)
    serde = LegacySerializer()
    other = LangGraphEncrypted.from_pycryptodome_aes()
    assert serde.dumps_typed({"a": 1})[0] == "msgpack"
    for value in ({"a": [1]}, None, b"x"):
        assert serde.loads_typed(other.dumps_typed(value)) == value
        assert serde.loads_typed(serde.dumps_typed(value)) == value
    assert "k" * 8 not in repr(serde) + repr(vars(serde))
    for key in (b"short", "k" * 32):
        with pytest.raises(ConfigurationError, match="LANGGRAPH_AES_KEY"):
            LegacySerializer(key)
    monkeypatch.delenv("LANGGRAPH_AES_KEY")
    with pytest.raises(ConfigurationError, match="LANGGRAPH_AES_KEY"):
        LegacySerializer()
