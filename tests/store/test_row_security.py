"""
Row-level security: what a view does with it, and that no statement in its transaction goes further.

The statements run as a worker's role, in a transaction of a view, as if somebody's text had
become a part of one. Who can run `set_config` there can say that it is another tenant's: that
is not kept out, and docs/operations.md says so.
"""

import psycopg
import pytest
from langgraph.store.base import PutOp

from langgraph_vat import Keyring, SchemaError, SemanticStore
from langgraph_vat._io.driver import drive
from langgraph_vat._ops.address import Space
from tests.store.embedder import DIMS, embed
from tests.test_plans import looked_at

INDEX = {"dims": DIMS, "embed": embed, "fields": ["text"]}
TABLES = {
    "store": "prefix",
    "store_vectors": "prefix",
    "vat_store_keys": "root",
    "vat_store_pending": "prefix",
    "vat_store_texts": "prefix",
}
TENANTS = ("a", "b", "a.b", "%")
KEYRING = Keyring.generate()


def as_role(url: str, name: str) -> str:
    return url.replace("postgres@", f"{name}@")


def opened(url: str, name: str, index=INDEX, **options) -> SemanticStore:
    return SemanticStore.from_conn_string(
        as_role(url, name), index=index, keyring=KEYRING, filterable_fields=("of",), **options
    )


def with_words(url: str, name: str) -> SemanticStore:
    """Return a store of the same tables that seals nothing."""
    return SemanticStore.from_conn_string(as_role(url, name), index=INDEX, text_search="simple")


def give_rights(url: str) -> None:
    """As docs/operations.md says; again, where tables were added."""
    with psycopg.connect(url, autocommit=True) as connection:
        for name in ("vat_worker", "vat_admin"):
            connection.execute(
                f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {name}"
            )
        for table in TABLES:
            connection.execute(f"DROP POLICY IF EXISTS admin ON {table}")
            connection.execute(f"CREATE POLICY admin ON {table} TO vat_admin USING (true)")


@pytest.fixture
def secured(postgres_url):
    """URL of a database whose store has row-level security, and roles."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for name in ("vat_owner", "vat_admin", "vat_worker"):
            known = "SELECT 1 FROM pg_roles WHERE rolname = %s"
            if not connection.execute(known, (name,)).fetchone():
                connection.execute(f"CREATE ROLE {name} LOGIN")
        connection.execute("GRANT ALL ON SCHEMA public TO vat_owner")
    owner = opened(postgres_url, "vat_owner")
    owner.setup(row_security=True)
    owner.close()
    for name in ("vat_owner", "vat_admin"):
        with with_words(postgres_url, name):
            give_rights(postgres_url)
    return postgres_url


@pytest.fixture(params=["vat_worker", "vat_owner"])
def store(request, secured):
    with opened(secured, request.param) as store:
        for name in TENANTS:
            fill(store.scoped(name), name)
        yield store


def fill(view: SemanticStore, name: str) -> None:
    view.put(("x", "y"), "k", {"of": name, "text": f"secret {name}"})
    view.put(("x",), "k", {"of": name, "text": "more"}, ttl=60)
    drive(view._connections.blocking().durable.fetch(ADD_TEXTS))


# What is sealed has none.
ADD_TEXTS = """
INSERT INTO vat_store_texts (prefix, key, updated_at, document, words)
SELECT prefix, key, updated_at, 'secret:1', 1 FROM store
ON CONFLICT (prefix, key) DO UPDATE SET updated_at = excluded.updated_at RETURNING 1"""


def everything(url: str) -> dict[str, set[tuple[str, str]]]:
    """Return all rows, whose they are, and what they say."""
    with psycopg.connect(url) as connection:
        return {
            table: set(
                connection.execute(
                    f"SELECT split_part({column}, '.', 1), t::text FROM {table} t"
                ).fetchall()
            )
            for table, column in TABLES.items()
        }


async def test_a_view_does_all_that_it_does_without(store):
    for name in TENANTS:
        view = store.scoped(name)
        assert view.get(("x", "y"), "k").value["of"] == name
        assert (await view.aget(("x",), "k")).value["of"] == name
        assert len(view.search((), query="secret", filter={"of": name})) == 2
        assert view.list_namespaces() == [("x",), ("x", "y")]
        assert view.count() == await view.acount(("x",), filter={"of": name}) == 2
        view.put(("z",), "k", {"of": name})
        view.put(("x", "y"), "k", {"of": name, "text": "changed"})
        assert await view.adelete_namespace(("z",)) == 1
        assert view.sweep_ttl() == 0
        assert view.reseal()[:2] == (1, 2)
        assert view.rotate() == (0, 0)
    assert store.scoped("a").delete_all() == 2
    assert store.scoped("b").shred_all() == 1
    assert [store.scoped(name).count() for name in TENANTS] == [0, 0, 2, 2]


READING = [
    "SELECT prefix FROM store WHERE prefix LIKE 'nothing' OR true",
    "SELECT prefix FROM store UNION SELECT prefix FROM store_vectors",
    "SELECT prefix FROM store s JOIN store_vectors v USING (prefix, key) FOR UPDATE",
    "SELECT root FROM vat_store_keys WHERE root <> ''",
    "SELECT prefix FROM vat_store_texts WHERE document @@ 'secret'",
]
WRITING = [
    "DELETE FROM store WHERE prefix <> '' OR true RETURNING prefix",
    "DELETE FROM store_vectors RETURNING prefix",
    "UPDATE store SET value = '{}' RETURNING prefix",
    "UPDATE store_vectors SET field_name = 'other' RETURNING prefix",
    "UPDATE vat_store_keys SET data_key = '' RETURNING root",
    "DELETE FROM vat_store_keys RETURNING root",
    "UPDATE vat_store_texts SET words = 2 RETURNING prefix",
    "DELETE FROM vat_store_texts RETURNING prefix",
]


@pytest.mark.parametrize("name", ["a", "a.b", "%"])
def test_no_statement_sees_or_changes_what_is_not_the_tenants(store, secured, name):
    view = store.scoped(name)
    before = everything(secured)
    for statement in [*READING, *WRITING]:
        found = drive(view._connections.blocking().durable.fetch(statement))
        assert {row[0].partition(".")[0] for row in found} == {view._space.root}, statement
        after = everything(secured)
        for table in TABLES:
            changed = {whose for whose, _ in before[table] ^ after[table]}
            assert changed <= {view._space.root}, statement
        view.delete_all()  # that the next one has something to see
        fill(view, name)


STRANGE = [
    "INSERT INTO store (prefix, key, value) VALUES ('vat-tenant:b.x', 'new', '{}')",
    "INSERT INTO store (prefix, key, value) VALUES ('memories', 'new', '{}')",
    (
        "INSERT INTO store (prefix, key, value) VALUES ('vat-tenant:b.x', 'k', '{}')"
        " ON CONFLICT (prefix, key) DO UPDATE SET value = '{}'"
    ),
    "INSERT INTO store_vectors (prefix, key, field_name) VALUES ('vat-tenant:b.x', 'k', 'f')",
    "INSERT INTO vat_store_keys (root, data_key) VALUES ('memories', 'x')",
    (
        "INSERT INTO vat_store_keys (root, data_key) VALUES ('', 'x')"
        " ON CONFLICT (root) DO UPDATE SET data_key = 'x'"
    ),
    "INSERT INTO vat_store_texts VALUES ('vat-tenant:b.x', 'new', now(), '', 0)",
    "UPDATE store SET prefix = 'vat-tenant:b.z' WHERE prefix = 'vat-tenant:a.x'",
    "UPDATE vat_store_keys SET root = 'vat-tenant:c'",
]


def test_nothing_is_written_for_somebody_else(store, secured):
    before = everything(secured)
    for statement in STRANGE:
        with pytest.raises(SchemaError, match="row-level security"):
            drive(store.scoped("a")._connections.blocking().durable.fetch(statement))
    assert everything(secured) == before


def test_the_key_of_all_tokens_is_changed_by_no_tenant(store, secured):
    before = everything(secured)
    for statement in ("UPDATE vat_store_keys SET data_key = ''", "DELETE FROM vat_store_keys"):
        durable = store.scoped("none")._connections.blocking().durable
        drive(durable.fetch(f"{statement} RETURNING root"))
        assert drive(durable.fetch("SELECT root FROM vat_store_keys")) == [("",)]
    assert everything(secured) == before


async def test_a_tenant_is_one_of_a_transaction_and_not_of_a_connection(secured):
    with opened(secured, "vat_worker", pool_size=1) as store:
        view = store.scoped("a")
        for _ in range(3):
            view.put(("x",), "k", {"text": "x"})
            await view.aput(("x",), "k", {"text": "x"})
            for backend in (store._connections.blocking(), await store._connections.asyncio()):
                fetched = backend.durable.fetch("SELECT prefix FROM store")
                assert (await fetched) == []
            assert (store.count(), store.scoped("b").count(), view.count()) == (0, 0, 1)
            with pytest.raises(SchemaError, match="row-level security"):
                store.put(("memories",), "k", {"text": "x"})
    async with opened(secured, "vat_worker") as store:
        assert await store.scoped("a").acount() == 1


def test_a_role_that_may_uses_the_store_itself(secured):
    with opened(secured, "vat_worker") as store:
        store.scoped("a").put(("x",), "k", {"text": "x"}, ttl=1)
    with opened(secured, "vat_admin") as store:
        store.put(("memories",), "k", {"text": "x", "of": "all"})
        assert [item.namespace for item in store.search((), query="x")] == [("memories",)]
        assert store.scoped("a").count() == 1
        assert store.reseal()[:2] == (2, 2)
        with psycopg.connect(secured, autocommit=True) as connection:
            connection.execute("UPDATE store SET expires_at = now() WHERE prefix <> 'memories'")
        assert store.sweep_ttl() == 1


@pytest.mark.parametrize("role", ["vat_worker", "vat_owner"])
def test_a_view_finds_its_own_by_words(secured, role):
    with with_words(secured, role) as store:
        for name in TENANTS:
            view = store.scoped(name)
            view.batch([PutOp(("x",), f"{i}", {"text": f"secret {name}"}) for i in range(3)])
        for name in TENANTS:
            for ranking in ("lexical", "hybrid"):
                found = store.scoped(name).search((), query="secret", ranking=ranking)
                assert [item.value["text"] for item in found] == [f"secret {name}"] * 3
        with psycopg.connect(secured, autocommit=True) as connection:
            connection.execute("UPDATE vat_store_texts SET updated_at = 'epoch'")
        assert [store.index_texts(), store.scoped("a").index_texts()] == [0, 3]
    with with_words(secured, "vat_admin") as store:
        assert store.index_texts() == 9


@pytest.mark.parametrize("role", ["vat_admin", "postgres"])
def test_who_does_not_see_all_items_says_of_none_that_they_have_words(secured, role):
    plain = SemanticStore.from_conn_string(as_role(secured, "vat_admin"), index=INDEX)
    plain.scoped("a").put(("x",), "k", {"text": "before"})
    plain.close()
    with psycopg.connect(secured, autocommit=True) as connection:
        connection.execute("DROP TABLE vat_store_texts, vat_store_text_search")
    with with_words(secured, "vat_owner"):
        give_rights(secured)
    with with_words(secured, "vat_worker") as store:
        assert ["words" in line for line in store.check()] == [True]
        store.scoped("a").index_texts()
        assert ["words" in line for line in store.check()] == [True]
        with with_words(secured, role):
            assert store.check() == []
        (found,) = store.scoped("a").search((), query="before", ranking="lexical")
        assert found.score > 0


def test_setup_does_not_weaken_it_and_mends_it(secured):
    with opened(secured, "vat_worker") as store:
        assert store.check() == []
        with psycopg.connect(secured, autocommit=True) as connection:
            connection.execute("ALTER TABLE store_vectors DISABLE ROW LEVEL SECURITY")
            connection.execute("DROP POLICY vat_tenant ON vat_store_keys")
        assert {line.split()[1] for line in store.check()} == {"store_vectors", "vat_store_keys"}
        with pytest.raises(SchemaError, match="owner"):
            store.setup()
    with opened(secured, "vat_owner") as owner:  # which calls setup() without asking for it
        assert owner.check() == []


def test_tables_that_come_later_are_not_forgotten(postgres_url):
    with opened(postgres_url, "postgres", index=None) as store:
        store.setup(row_security=True)
    with opened(postgres_url, "postgres") as store:
        assert store.check() == []
    with with_words(postgres_url, "postgres") as store:
        assert store.check() == []
    assert security_of(postgres_url) == dict.fromkeys(TABLES, (True, True))


def test_without_it_nothing_changes(postgres_url):
    with opened(postgres_url, "postgres"), with_words(postgres_url, "postgres"):
        pass
    assert security_of(postgres_url) == dict.fromkeys(TABLES, (False, False))


def security_of(url: str) -> dict[str, tuple[bool, bool]]:
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT relname, relrowsecurity, relforcerowsecurity FROM pg_class"
            " WHERE relname = ANY(%s)",
            (list(TABLES),),
        ).fetchall()
    return {name: (is_on, is_forced) for name, is_on, is_forced in found}


@pytest.mark.parametrize("schema", [None, "apart"])
def test_a_script_makes_it_too(postgres_url, schema):
    options = {"schema": schema, "index": INDEX, "text_search": "simple"}
    store = SemanticStore.from_conn_string(postgres_url, **options)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for _ in range(2):  # it may be run again
            connection.execute(store.ddl(row_security=True))
    assert security_of(postgres_url) == dict.fromkeys(TABLES, (True, True))
    assert store.check() == []
    store.close()


@pytest.mark.parametrize("name", ["a", "a.b", "%", "'", "é", "%2E", "vat-tenant:a"])
def test_postgres_names_a_tenants_label_as_a_view_does(postgres_url, name):
    with opened(postgres_url, "postgres") as store:
        store.setup(row_security=True)
        store.scoped(name).put(("x",), "k", {})
        with psycopg.connect(postgres_url) as connection:
            connection.execute("CREATE ROLE vat_looks")
            connection.execute("GRANT SELECT ON store TO vat_looks")
            connection.execute("SET ROLE vat_looks")
            connection.execute("SELECT set_config('langgraph_vat.tenant', %s, true)", (name,))
            found = connection.execute("SELECT prefix FROM store").fetchall()
            connection.rollback()
        assert found == [(f"{Space(name).root}.x",)]


def test_who_says_that_they_are_another_tenant_is_believed(store):
    """A limit, and not a promise: see the page on operations."""
    durable = store.scoped("a")._connections.blocking().durable

    async def body(session):
        await session.execute("SELECT set_config('langgraph_vat.tenant', 'b', true)")
        return await session.fetch("SELECT prefix FROM store")

    assert {row[0] for row in drive(durable.transact(body))} == {
        "vat-tenant:b.x",
        "vat-tenant:b.x.y",
    }


def test_a_tenants_rows_are_found_by_the_primary_key(secured):
    with psycopg.connect(secured) as connection:
        connection.execute(
            "INSERT INTO store (prefix, key, value)"
            " SELECT 'vat-tenant:' || n % 500 || '.x', n, '{}'"
            " FROM generate_series(1, 20000) AS n"
        )
        connection.execute("ANALYZE store")
        connection.execute("SET ROLE vat_worker")
        connection.execute("SELECT set_config('langgraph_vat.tenant', '7', true)")
        explain = "EXPLAIN (ANALYZE, FORMAT JSON) SELECT value FROM store"
        (plan,) = connection.execute(explain).fetchone()
    assert looked_at(plan[0]["Plan"]) == 40
