"""`Vat` owns connections and lifecycle; what it closes is in Postgres."""

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.base import empty_checkpoint

from langgraph_vat import (
    ConfigurationError,
    HybridSaver,
    Keyring,
    SchemaError,
    StrictSerializer,
    Vat,
)
from langgraph_vat._hot import scripts

CONFIG = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}


def _stored(url):
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT count(*) FROM checkpoints").fetchone()[0]


def test_closing_flushes(postgres_url, redis_url):
    with Vat.connect(postgres_url, redis_url, flush_after=60.0) as vat:
        vat.checkpointer.put(CONFIG, empty_checkpoint(), {}, {})
        vat.store.put(("a",), "k", {"n": 1})
        assert _stored(postgres_url) == 0
    assert _stored(postgres_url) == 1
    vat.close()


async def test_closing_flushes_in_a_loop(postgres_url, redis_url, caplog):
    async with Vat.connect(postgres_url, redis_url, flush_after=60.0) as vat:
        await vat.checkpointer.aput(CONFIG, empty_checkpoint(), {}, {})
        await vat.store.aput(("a",), "k", {"n": 1})
        assert (await vat.store.aget(("a",), "k")).value == {"n": 1}
    assert _stored(postgres_url) == 1
    await vat.aclose()
    assert not caplog.records


@pytest.mark.parametrize("how", ["close", "aclose", "close of another thread"])
def test_what_is_acknowledged_while_others_close_is_in_postgres(postgres_url, redis_url, how):
    saver = HybridSaver.from_conn_string(
        postgres_url, redis=redis_url, flush_every=1000, flush_after=600
    )
    saver.setup()
    acknowledged: list[Any] = []

    def next_step(config: Any) -> Any:
        return config, empty_checkpoint(), {}, {}

    def write(number: int) -> None:
        config: Any = {"configurable": {"thread_id": f"s{number}", "checkpoint_ns": ""}}
        while True:
            config = saver.put(*next_step(config))
            acknowledged.append(config)

    async def awrite(number: int) -> None:
        config: Any = {"configurable": {"thread_id": f"a{number}", "checkpoint_ns": ""}}
        while True:
            config = await saver.aput(*next_step(config))
            acknowledged.append(config)

    async def in_a_loop() -> None:
        writers = [asyncio.ensure_future(awrite(number)) for number in range(4)]
        await asyncio.sleep(0.5)
        if how == "aclose":
            await saver.aclose()
        for problem in await asyncio.gather(*writers, return_exceptions=True):
            assert isinstance(problem, ConfigurationError)

    with ThreadPoolExecutor(5) as pool:
        looping = pool.submit(asyncio.run, in_a_loop())
        writing = [pool.submit(write, number) for number in range(4)]
        if how != "aclose":
            time.sleep(0.4)
            saver.close()
        looping.result()
        for one in writing:
            assert isinstance(one.exception(), ConfigurationError)
    assert len(acknowledged) > 20
    with psycopg.connect(postgres_url) as connection:
        found = connection.execute("SELECT thread_id, checkpoint_id FROM checkpoints").fetchall()
    wanted = {
        (one["configurable"]["thread_id"], one["configurable"]["checkpoint_id"])
        for one in acknowledged
    }
    assert wanted <= set(found)


def test_a_step_under_way_while_another_thread_closes_is_committed(
    postgres_url, redis_url, monkeypatch
):
    saver = HybridSaver.from_conn_string(postgres_url, redis=redis_url, flush_after=600)
    saver.setup()
    config = saver.put(CONFIG, empty_checkpoint(), {}, {})
    hot, closed = saver._life.blocking().hot, threading.Event()
    script = hot.script

    async def late(which: Any, keys: Any, args: Any) -> Any:
        if which is scripts.PUT:
            closed.wait()
        return await script(which, keys, args)

    monkeypatch.setattr(hot, "script", late)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(saver.put, config, empty_checkpoint(), {}, {})
        time.sleep(0.1)
        saver.close()
        assert _stored(postgres_url) == 1
        closed.set()
        step.result()
    assert _stored(postgres_url) == 2
    saver._life.connections.close()
    hot.close()


def test_a_step_waits_no_longer_than_flush_after(postgres_url, redis_url):
    with Vat.connect(postgres_url, redis_url, flush_after=0.4) as vat:
        vat.checkpointer.put(CONFIG, empty_checkpoint(), {}, {})
        for _ in range(100):
            if _stored(postgres_url):
                break
            asyncio.run(asyncio.sleep(0.1))
        assert _stored(postgres_url) == 1


def test_embedded_servers_that_were_stopped_are_believed_at_once(own_directory, caplog):
    for step in range(2):
        with Vat.embedded(own_directory) as vat:
            for _ in range(step + 1):
                vat.checkpointer.put(CONFIG, empty_checkpoint(), {}, {})
            assert len(list(vat.checkpointer.list(CONFIG))) == 2 * step + 1
            assert not vat.checkpointer._shared.is_degraded
            assert vat.checkpointer.get_tuple(CONFIG) is not None
            assert vat.checkpointer._shared.counters.hits == 1
    assert not caplog.records


LEAVES = """
import sys
from langgraph.checkpoint.base import empty_checkpoint
from langgraph_vat import HybridSaver
saver = HybridSaver.from_conn_string(sys.argv[1], redis=sys.argv[2], flush_after=60.0)
saver.setup()
config = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
saver.put(config, empty_checkpoint(), {}, {})
"""


def test_an_interpreter_that_just_ends_flushes(postgres_url, redis_url):
    command = [sys.executable, "-W", "error", "-c", LEAVES, postgres_url, redis_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert _stored(postgres_url) == 1


def test_the_environment_says_where(monkeypatch, postgres_url, redis_url):
    monkeypatch.delenv("LANGGRAPH_VAT_POSTGRES", raising=False)
    with pytest.raises(ConfigurationError, match="LANGGRAPH_VAT_POSTGRES"):
        Vat.from_env()
    monkeypatch.setenv("LANGGRAPH_VAT_POSTGRES", postgres_url)
    monkeypatch.setenv("LANGGRAPH_VAT_REDIS", redis_url)
    monkeypatch.setenv("LANGGRAPH_VAT_KEYS", Keyring.generate().export_secret_text())
    monkeypatch.setenv("LANGGRAPH_VAT_KEYS", "")
    with pytest.raises(ConfigurationError, match="LANGGRAPH_VAT_KEYS is empty"):
        Vat.from_env()
    monkeypatch.setenv("LANGGRAPH_VAT_KEYS", Keyring.generate().export_secret_text())
    monkeypatch.setenv("LANGGRAPH_VAT_FLUSH_EVERY", "x")
    with pytest.raises(ConfigurationError, match="FLUSH_EVERY"):
        Vat.from_env()
    monkeypatch.setenv("LANGGRAPH_VAT_FLUSH_EVERY", "3")
    with Vat.from_env() as vat:
        for _ in range(3):
            vat.checkpointer.put(CONFIG, empty_checkpoint(), {}, {})
        assert _stored(postgres_url) == 3


def test_beside_the_environment_all_can_be_given_that_connect_takes(monkeypatch, postgres_url):
    monkeypatch.setenv("LANGGRAPH_VAT_POSTGRES", postgres_url)
    monkeypatch.setenv("LANGGRAPH_VAT_FLUSH_EVERY", "3")
    with Vat.from_env() as plain:
        plain.store.put(("a",), "k", {"n": 1})
    monkeypatch.setenv("LANGGRAPH_VAT_KEYS", Keyring.generate().export_secret_text())
    serde = StrictSerializer()
    until = datetime.now(UTC) + timedelta(hours=1)
    with Vat.from_env(serde=serde, accept_plaintext=until, flush_every=5) as vat:
        assert vat.checkpointer.serde is serde
        assert vat.checkpointer._shared.settings.flush_every == 5
        assert vat.seal_existing() == (1, 1, 0)
    with pytest.raises(ConfigurationError, match="no setting is called"):
        Vat.from_env(flush_evry=1)


def test_schemas_are_made_and_share_nothing(postgres_url):
    vats = [Vat.connect(postgres_url, schema=name) for name in (None, "one", "Two", "one")]
    for number, vat in enumerate(vats[:3]):
        with vat:
            vat.store.put(("a",), "k", {"n": number})
            vat.checkpointer.put(CONFIG, empty_checkpoint(), {"step": number}, {})
            assert [item.value["n"] for item in vat.store.search(("a",))] == [number]
            assert [one.metadata["step"] for one in vat.checkpointer.list(None)] == [number]
    with vats[3] as again:
        assert again.store.get(("a",), "k").value == {"n": 1}


async def test_a_schema_is_made_by_either_face(postgres_url):
    async with Vat.connect(postgres_url, schema="late") as vat:
        await vat.store.aput(("a",), "k", {"n": 1})
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM late.store").fetchone() == (1,)


def test_without_the_right_to_make_a_schema_the_remedy_is_named(postgres_url):
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS humble")
        connection.execute("CREATE ROLE humble LOGIN")
    with pytest.raises(SchemaError, match="permission denied for database"):
        Vat.connect(postgres_url.replace("postgres@", "humble@"), schema="none").setup()


def test_a_schema_of_its_own(postgres_url, redis_url):
    with Vat.connect(postgres_url, redis_url, schema="agents", flush_every=1) as vat:
        vat.checkpointer.put(CONFIG, empty_checkpoint(), {}, {})
    with psycopg.connect(postgres_url) as connection:
        count = connection.execute("SELECT count(*) FROM agents.checkpoints").fetchone()
        assert count == (1,)
