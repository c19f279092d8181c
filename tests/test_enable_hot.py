"""The cut-over of a database that others wrote: then nobody may write it past Redis."""

import threading
import time
from typing import Any

import psycopg
import pytest
import redis
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver

from langgraph_vat import ConfigurationError, HybridSaver, SchemaError, Vat

HERE: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
REASON = "langgraph-vat keeps newer checkpoints of this database in Redis"


def put(saver: Any, config: Any = HERE, step: int = 0) -> Any:
    return saver.put(config, empty_checkpoint(), {"step": step}, {})


def newest(saver: Any) -> str:
    return saver.get_tuple(HERE).checkpoint["id"]


@pytest.fixture
def theirs(postgres_url):
    with PostgresSaver.from_conn_string(postgres_url) as saver:
        saver.setup()
        with HybridSaver.from_conn_string(postgres_url):
            pass  # the tables are ours, too: then only the cut-over itself is left
        yield saver


@pytest.fixture
def ours(postgres_url, redis_url):
    saver = HybridSaver.from_conn_string(postgres_url, redis=redis_url)
    yield saver
    saver.close()


def test_a_database_that_others_wrote_is_not_made_hot_unasked(theirs, ours, redis_url):
    config = put(theirs)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"enable_hot\(\)"):
            ours.setup()
        with pytest.raises(ConfigurationError, match=r"enable_hot\(\)"):
            put(ours)
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys() == []
    assert newest(theirs) == config["configurable"]["checkpoint_id"]
    put(theirs, config)


def test_after_the_cut_over_others_are_refused_with_the_reason(theirs, ours, caplog):
    first = put(theirs)
    ours.enable_hot()
    assert not caplog.records
    second = put(ours, first)["configurable"]["checkpoint_id"]
    for attempt in (
        lambda: put(theirs, first),
        lambda: theirs.put_writes(first, [("x", 1)], "task"),
        lambda: theirs.delete_thread("t"),
        lambda: theirs.conn.execute("UPDATE checkpoints SET metadata = '{}'"),
        lambda: theirs.conn.execute("TRUNCATE checkpoint_blobs"),
    ):
        with pytest.raises(psycopg.DatabaseError, match=REASON):
            attempt()
        assert newest(ours) == second
    ours.flush()
    assert [found.checkpoint["id"] for found in theirs.list(HERE)] == [
        second,
        first["configurable"]["checkpoint_id"],
    ]


def test_after_the_cut_over_ours_without_redis_is_refused_too(postgres_url, ours):
    with HybridSaver.from_conn_string(postgres_url) as alone:
        config = put(alone)
        assert newest(alone)
        ours.enable_hot()
        for attempt in (
            lambda: put(alone, config),
            lambda: alone.put_writes(config, [("x", 1)], "task"),
            lambda: alone.delete_thread("t"),
        ):
            with pytest.raises(ConfigurationError, match="redis="):
                attempt()
        time.sleep(1.1)
        with pytest.raises(ConfigurationError, match="redis="):
            alone.get_tuple(HERE)
    assert newest(ours) == config["configurable"]["checkpoint_id"]


def test_the_cut_over_waits_for_what_others_have_under_way(postgres_url, theirs, ours):
    put(theirs)
    row = "SELECT 't', '', 'ffff', NULL, type, checkpoint, metadata FROM checkpoints"
    with psycopg.connect(postgres_url) as connection:
        connection.execute(
            "INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id,"
            f" parent_checkpoint_id, type, checkpoint, metadata) {row}"
        )
        enabling = threading.Thread(target=ours.enable_hot)
        enabling.start()
        time.sleep(0.5)
        assert enabling.is_alive()
    enabling.join(10)
    assert ours.get_tuple(HERE).config["configurable"]["checkpoint_id"] == "ffff"


def test_who_does_not_let_go_is_named_and_nothing_has_changed(postgres_url, theirs, ours):
    config = put(theirs)
    with psycopg.connect(postgres_url, application_name="old worker") as connection:
        connection.execute("DELETE FROM checkpoint_writes")
        with pytest.raises(SchemaError, match="old worker"):
            ours.enable_hot()
    put(theirs, config)
    ours.enable_hot()


async def test_it_may_be_asked_again_and_of_asyncio(theirs, ours, postgres_url, redis_url):
    put(theirs)
    await ours.aenable_hot()
    await ours.aenable_hot()
    ours.enable_hot()
    with Vat.connect(postgres_url, redis_url) as vat:
        put(vat.checkpointer)
        assert newest(vat.checkpointer) == newest(ours)


def test_a_redis_of_another_database_is_refused_before_anything_changes(
    theirs, ours, postgres_url, redis_url
):
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, schema="other") as other:
        put(other)
    config = put(theirs)
    with pytest.raises(ConfigurationError, match="another database"):
        ours.enable_hot()
    put(theirs, config)


def test_without_redis_there_is_nothing_to_enable(postgres_url):
    saver = HybridSaver.from_conn_string(postgres_url)
    with pytest.raises(ConfigurationError, match="redis="):
        saver.enable_hot()
    saver.close()


def test_a_stranger_with_few_rights_writes_until_then_and_reads_the_reason_after(
    postgres_url, theirs, ours
):
    put(theirs)
    theirs.conn.execute("DROP ROLE IF EXISTS stranger")
    theirs.conn.execute("CREATE ROLE stranger")
    theirs.conn.execute("GRANT SELECT, INSERT, UPDATE ON checkpoints TO stranger")
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("SET ROLE stranger")
        connection.execute("UPDATE checkpoints SET metadata = '{}'")
        ours.enable_hot()
        with pytest.raises(psycopg.DatabaseError, match=REASON):
            connection.execute("UPDATE checkpoints SET metadata = '{}'")
    theirs.conn.execute("DROP OWNED BY stranger")
    theirs.conn.execute("DROP ROLE stranger")
