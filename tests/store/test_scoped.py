"""A tenant's view of a store: no label, filter, list or deletion leads out of it."""

import asyncio
import itertools
from datetime import UTC, datetime

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.store.base import GetOp, ListNamespacesOp, MatchCondition, PutOp, SearchOp

from langgraph_vat import InvalidInputError, Keyring, SealError, SemanticStore, ShreddedError
from langgraph_vat._ops.address import TENANTS, Space
from tests.store.embedder import DIMS, embed

INDEX = {"dims": DIMS, "embed": embed, "fields": ["text"]}
# Some that would be one another's if what stands between a name and what follows were forgotten.
NAMES = ("a", "a.b", "a.", ".a", "a%2Eb", "a%252Eb", "a%", "%", "*", "A", "é", "ab", "vat-tenant:a")
LABELS = ("a", "b", "*", "%", "%2Eb", "a%2Eb", "vat-tenant:a", f"{TENANTS}a%2Eb", "🦊")


@pytest.fixture(params=["plain", "sealed"])
def store(request, postgres_url):
    keyring = Keyring.generate() if request.param == "sealed" else None
    with SemanticStore.from_conn_string(postgres_url, index=INDEX, keyring=keyring) as store:
        yield store


PARTS = st.sampled_from((".", "%2E", "%25", "%252E", "%", "2E", "a", ":"))
TEXTS = st.lists(PARTS, min_size=1, max_size=3).map("".join)


@given(st.sets(TEXTS, min_size=20, max_size=40))
def test_no_two_tenants_have_one_label(names):
    roots = {Space(name).root for name in {*names, *NAMES}}
    assert len(roots) == len({*names, *NAMES})
    assert not any("." in root for root in roots)


def test_nobody_sees_what_another_tenant_has(store):
    views = {None: store} | {name: store.scoped(name) for name in NAMES}
    places = [*itertools.product(LABELS), *itertools.product(LABELS[:4], LABELS)]
    held = {}
    for name, view in views.items():
        held[name] = [p for p in places if name is not None or not p[0].startswith(TENANTS)]
        view.batch([PutOp(p, "k", {"of": str(name), "text": "x"}, index=False) for p in held[name]])
        view.put(("b",), "near", {"of": str(name), "text": "abc"})
    for name, view in views.items():
        mine = sorted(held[name])
        assert view.list_namespaces(limit=1_000) == mine
        assert view.count() == len(mine) + 1 == view.count(filter={"of": str(name)})
        ops = [GetOp(("b",), "near"), GetOp(mine[0], "k"), SearchOp((), query="abc", limit=2_000)]
        got, first, found = view.batch([*ops, ListNamespacesOp(limit=1_000)])[:3]
        assert (got.namespace, got.value["of"]) == (("b",), str(name))
        assert (first.namespace, first.value["of"]) == (mine[0], str(name))
        assert {item.value["of"] for item in found} == {str(name)}
        assert sorted({item.namespace for item in found}) == mine
        assert found[0].key == "near"
        assert view.search(("a",), filter={"of": {"$ne": str(name)}}, limit=1_000) == []


async def test_what_is_listed_begins_and_ends_inside(store):
    view = store.scoped("t")
    await view.abatch([PutOp(ns, "k", {"text": ""}) for ns in (("a",), ("a", "b"), ("b", "a"))])
    assert view.list_namespaces(max_depth=1) == [("a",), ("b",)]
    assert view.list_namespaces(max_depth=0) == [()]
    assert view.list_namespaces(suffix=("*", "a")) == [("b", "a")]
    assert view.list_namespaces(prefix=("*", "a")) == [("b", "a")]
    assert view.list_namespaces(prefix=("*", "*", "*")) == []
    assert await view.alist_namespaces(suffix=(f"{TENANTS}t", "a")) == []
    assert await view.alist_namespaces(prefix=(f"{TENANTS}t",)) == []
    assert store.list_namespaces() == []
    assert store.list_namespaces(prefix=("*", "a")) == []
    assert store.list_namespaces(suffix=("a",), max_depth=0) == []


ESCAPES = [
    lambda s, ns: s.get(ns, "k"),
    lambda s, ns: s.put(ns, "k", {"text": "x"}),
    lambda s, ns: s.delete(ns, "k"),
    lambda s, ns: s.search(ns),
    lambda s, ns: s.list_namespaces(prefix=ns),
    lambda s, ns: s.batch([ListNamespacesOp((MatchCondition("prefix", list(ns)),))]),
    lambda s, ns: s.count(ns),
    lambda s, ns: s.delete_namespace(ns),
    lambda s, ns: s.shred(ns[0]),
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_the_store_itself_refuses_what_is_a_tenants(store, escape):
    store.scoped("a").put(("x",), "k", {"text": "mine"})
    for ns in ((f"{TENANTS}a", "x"), (f"{TENANTS}a",), (TENANTS,), (f"{TENANTS}b", "x")):
        with pytest.raises(InvalidInputError, match=r"must not begin with 'vat-tenant:'.*scoped"):
            escape(store, ns)
    assert store.scoped("a").get(("x",), "k").value == {"text": "mine"}


def test_a_tenants_namespaces_have_the_limits_of_all_others(store):
    view = store.scoped("a" * 100)
    for call in (
        lambda: view.put((), "k", {"text": ""}),
        lambda: view.put(("a.b",), "k", {"text": ""}),
        lambda: view.put(("",), "k", {"text": ""}),
        lambda: view.put(("langgraph",), "k", {"text": ""}),
    ):
        with pytest.raises(ValueError, match=r"[Nn]amespace"):
            call()
    view.put(("a",), "k" * 1_880, {"text": ""})
    with pytest.raises(InvalidInputError, match="may have 2000"):
        view.put(("a",), "k" * 1_900, {"text": ""})
    assert view.count() == 1


def test_a_tenant_is_a_name(store):
    for nobody in (None, "", "\0", "x" * 300, 7):
        with pytest.raises(InvalidInputError, match="tenant"):
            store.scoped(nobody)
    with pytest.raises(InvalidInputError, match="view already"):
        store.scoped("a").scoped("b")


async def test_a_view_closes_nothing(store):
    with store.scoped("a") as view:
        view.put(("x",), "k", {"text": "x"})
    async with store.scoped("a") as view:
        assert (await view.aget(("x",), "k")).value == {"text": "x"}
    view.close()
    assert store.scoped("a").get(("x",), "k") is not None
    store.put(("x",), "k", {"text": "x"})


def test_a_view_serves_threads_and_loops_like_its_store(store):
    view = store.scoped("a")

    async def work():
        await asyncio.gather(*(view.aput(("w",), str(n), {"text": "x"}) for n in range(20)))
        return await view.acount(("w",))

    assert asyncio.run(work()) == asyncio.run(work()) == view.count() == 20


# --- a tenant as a whole -------------------------------------------------------------


def many(store):
    views = {name: store.scoped(name) for name in ("a", "a.b", "ab", "a%")}
    for view in (store, *views.values()):
        view.batch([PutOp((f"u{n}", "m"), "k", {"text": "x", "n": n}) for n in range(5)])
    return views


@pytest.mark.parametrize("is_async", [False, True])
async def test_all_of_a_tenant_goes_and_only_that(store, postgres_url, is_async):
    views = many(store)
    gone = views.pop("a")
    assert (await gone.adelete_all() if is_async else gone.delete_all()) == 5
    assert gone.search(()) == gone.list_namespaces() == []
    with psycopg.connect(postgres_url) as connection:
        left = "SELECT count(*) FROM {} WHERE starts_with(prefix, 'vat-tenant:a.')"
        for table in ("store", "store_vectors"):
            assert connection.execute(left.format(table)).fetchone() == (0,)
    assert [view.count() for view in (store, *views.values())] == [5] * 4
    gone.put(("u0",), "k", {"text": "again"})
    assert gone.count() == 1
    with pytest.raises(InvalidInputError, match="delete_all"):
        gone.delete_namespace(())
    assert gone.delete_namespace(("u0",)) == 1


@pytest.fixture
def sealed(postgres_url):
    keyring = Keyring.generate()
    with SemanticStore.from_conn_string(postgres_url, keyring=keyring) as store:
        yield store


@pytest.mark.parametrize("is_async", [False, True])
async def test_all_of_a_tenant_is_shredded_and_only_that(sealed, is_async):
    views = many(sealed)
    gone = views.pop("a")
    with pytest.raises(InvalidInputError, match="shred_all"):
        gone.shred("u0")
    for keys in (1, 0):
        assert (await gone.ashred_all() if is_async else gone.shred_all()) == keys
    with pytest.raises(ShreddedError):
        gone.get(("u0", "m"), "k")
    with pytest.raises(ShreddedError):
        gone.put(("new",), "k", {})
    assert gone.search(()) == []
    assert [view.count(filter={"n": 3}) for view in (sealed, *views.values())] == [1] * 4
    assert gone.delete_all() == 5
    gone.put(("new",), "k", {"n": 1})
    assert gone.get(("new",), "k").value == {"n": 1}


def test_each_tenant_has_a_data_key_of_its_own(sealed, postgres_url):
    views = many(sealed)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        found = connection.execute("SELECT root FROM vat_store_keys ORDER BY 1").fetchall()
        tenants = {f"vat-tenant:{name}" for name in ("a", "a%2Eb", "ab", "a%25")}
        assert {root for (root,) in found} == {*(f"u{n}" for n in range(5)), *tenants}
        # Somebody with the database moves what one has to another.
        connection.execute("DELETE FROM store WHERE prefix = 'vat-tenant:ab.u0.m'")
        connection.execute(
            "UPDATE store SET prefix = 'vat-tenant:ab.u0.m' WHERE prefix = 'vat-tenant:a.u0.m'"
        )
    with pytest.raises(SealError):
        views["ab"].get(("u0", "m"), "k")


def test_a_view_looks_after_its_own(postgres_url):
    old = Keyring.generate()
    new = old.with_key("2").with_primary("2")
    with SemanticStore.from_conn_string(postgres_url, keyring=old) as store:
        many(store)
    with SemanticStore.from_conn_string(
        postgres_url, keyring=new, accept_plaintext=datetime(9999, 1, 1, tzinfo=UTC)
    ) as store:
        view = store.scoped("a")
        assert view.rotate() == (1, 0)
        assert view.reseal()[:2] == (1, 5)
        assert store.rotate() == (8, 0)
        with SemanticStore.from_conn_string(postgres_url) as plain:
            for name in ("c", "d"):
                plain.scoped(name).put(("x",), "k", {"n": 1})
        assert store.scoped("c").seal_existing() == (1, 1, 0)
        assert store.seal_existing() == (1, 1, 0)


def test_a_view_sweeps_its_own(store, postgres_url):
    for view in (store, *many(store).values()):
        view.put(("x",), "k", {"text": ""}, ttl=1)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("UPDATE store SET expires_at = now() WHERE expires_at IS NOT NULL")
    assert store.scoped("a").sweep_ttl() == 1
    assert store.sweep_ttl() == 4


def test_tokens_of_tenants_cannot_be_compared(postgres_url):
    with SemanticStore.from_conn_string(
        postgres_url, keyring=Keyring.generate(), filterable_fields=("user",)
    ) as store:
        for view in (store.scoped("a"), store.scoped("b"), store):
            view.put(("m",), "k", {"user": "ada"})
            (item,) = view.search((), filter={"user": "ada"})
            assert item.namespace == ("m",)
        with psycopg.connect(postgres_url) as connection:
            found = connection.execute("SELECT value::text FROM store").fetchall()
        assert len(set(found)) == 3
