"""
Conformance of stores. LangGraph has a suite for savers and none for stores.

`validate_store` takes a factory of any `BaseStore` and runs plain coroutines
that take a store and assert, grouped by capability. The semantics are those
of LangGraph's documentation and `InMemoryStore`.

    report = await validate_store(lambda: InMemoryStore(index=INDEX))
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import psycopg
from langgraph.store.base import (
    BaseStore,
    GetOp,
    InvalidNamespaceError,
    ListNamespacesOp,
    PutOp,
    SearchOp,
)
from langgraph.store.memory import InMemoryStore

from conformance.faces import SyncStoreFace
from langgraph_vat import Keyring, SemanticStore

Spec = Callable[[BaseStore], Awaitable[None]]
_numbers = itertools.count()


def embed(texts: list[str]) -> list[list[float]]:
    """Embed by counting letters: deterministic, local, and enough to be near or far."""
    return [[float(text.count(letter)) for letter in "abcdefg"] + [1.0] for text in texts]


INDEX: Any = {"dims": 8, "embed": embed, "fields": ["text"]}


def _ns() -> tuple[str, str]:
    return ("spec", uuid4().hex)


async def test_put_then_get(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "k", {"a": 1, "b": {"c": [1, None, True]}})
    item = await store.aget(ns, "k")
    assert item is not None
    assert (item.value, item.key, item.namespace) == (
        {"a": 1, "b": {"c": [1, None, True]}},
        "k",
        ns,
    )
    assert item.created_at.tzinfo is not None
    assert item.updated_at >= item.created_at


async def test_get_of_nothing(store: BaseStore) -> None:
    assert await store.aget(_ns(), "k") is None


async def test_put_replaces(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "k", {"old": 1})
    await store.aput(ns, "k", {"new": 2})
    item = await store.aget(ns, "k")
    assert item is not None
    assert item.value == {"new": 2}


async def test_delete(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "k", {"a": 1})
    await store.adelete(ns, "k")
    await store.adelete(ns, "never")
    assert await store.aget(ns, "k") is None


async def test_keys_and_namespaces_are_apart(store: BaseStore) -> None:
    one, two = _ns(), _ns()
    await store.aput(one, "k", {"n": 1})
    await store.aput(two, "k", {"n": 2})
    await store.aput(one, "%", {"n": 3})
    await store.adelete(one, "%")
    found = [await store.aget(ns, "k") for ns in (one, two)]
    assert [item.value for item in found if item] == [{"n": 1}, {"n": 2}]


async def test_bad_namespaces_are_refused(store: BaseStore) -> None:
    for namespace in ((), ("a.b",), ("",), ("langgraph",)):
        try:
            await store.aput(namespace, "k", {})
        except InvalidNamespaceError:
            continue
        raise AssertionError(f"{namespace} was accepted")


async def _numbers_in(store: BaseStore, ns: tuple[str, ...]) -> None:
    for n in (2, 9, 10, 100, -5):
        await store.aput(ns, str(n), {"n": n, "even": n % 2 == 0})


async def test_search_by_prefix(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "a", {"n": 1})
    await store.aput((*ns, "deep"), "b", {"n": 2})
    await store.aput((ns[0], ns[1] + "x"), "c", {"n": 3})
    assert {i.key for i in await store.asearch(ns)} == {"a", "b"}


async def test_search_pages_are_complete(store: BaseStore) -> None:
    ns = _ns()
    for i in range(25):
        await store.aput(ns, str(i), {"n": i})
    pages = [await store.asearch(ns, limit=10, offset=offset) for offset in (0, 10, 20, 30)]
    assert [len(page) for page in pages] == [10, 10, 5, 0]
    assert len({item.key for page in pages for item in page}) == 25


async def test_filter_by_equality(store: BaseStore) -> None:
    ns = _ns()
    await _numbers_in(store, ns)
    assert {i.value["n"] for i in await store.asearch(ns, filter={"even": True})} == {2, 10, 100}
    assert {i.value["n"] for i in await store.asearch(ns, filter={"even": True, "n": 10})} == {10}
    assert await store.asearch(ns, filter={"missing": 1}) == []


async def test_filter_compares_numbers(store: BaseStore) -> None:
    ns = _ns()
    await _numbers_in(store, ns)
    for operator, expected in (
        ("$gt", {100}),
        ("$gte", {10, 100}),
        ("$lt", {2, 9, -5}),
        ("$lte", {2, 9, 10, -5}),
        ("$eq", {10}),
        ("$ne", {2, 9, 100, -5}),
    ):
        found = await store.asearch(ns, filter={"n": {operator: 10}})
        assert {item.value["n"] for item in found} == expected, operator


async def test_filter_into_nested_fields(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "yes", {"a": {"b": 1, "c": 2}})
    await store.aput(ns, "no", {"a": {"b": 2}})
    assert [i.key for i in await store.asearch(ns, filter={"a": {"b": 1}})] == ["yes"]


async def test_an_unknown_operator_is_refused(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "k", {"n": 1})
    try:
        await store.asearch(ns, filter={"n": {"$like": 1}})
    except ValueError:
        return
    raise AssertionError("accepted")


async def test_namespaces_are_listed(store: BaseStore) -> None:
    root = uuid4().hex
    for rest in (("a",), ("a", "b"), ("c", "b")):
        await store.aput((root, *rest), "k", {})
    full = [(root, "a"), (root, "a", "b"), (root, "c", "b")]
    assert await store.alist_namespaces(prefix=(root,)) == full
    assert await store.alist_namespaces(prefix=(root, "*", "b")) == full[1:]
    assert await store.alist_namespaces(prefix=(root,), suffix=("b",)) == full[1:]
    short = await store.alist_namespaces(prefix=(root,), max_depth=2)
    assert short == [(root, "a"), (root, "c")]
    assert await store.alist_namespaces(prefix=(root,), limit=1, offset=1) == full[1:2]


async def test_a_batch_answers_in_order(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "there", {"n": 1})
    results = await store.abatch(
        [
            GetOp(ns, "there"),
            PutOp(ns, "new", {"n": 2}),
            SearchOp(ns, {"n": 1}),
            GetOp(ns, "not"),
            ListNamespacesOp(limit=1),
            PutOp(ns, "gone", None),
        ]
    )
    assert results[0].value == {"n": 1}  # type: ignore[union-attr]
    assert [item.key for item in results[2]] == ["there"]  # type: ignore[union-attr]
    assert results[1] is results[3] is results[5] is None
    assert len(results[4]) == 1  # type: ignore[arg-type]
    item = await store.aget(ns, "new")
    assert item is not None


async def test_the_nearest_comes_first(store: BaseStore) -> None:
    ns = _ns()
    for key, text in (("far", "gggg"), ("near", "aab"), ("middle", "aag")):
        await store.aput(ns, key, {"text": text})
    found = await store.asearch(ns, query="aab")
    assert [item.key for item in found] == ["near", "middle", "far"]
    scores = [item.score or 0.0 for item in found]
    assert scores == sorted(scores, reverse=True)
    assert abs(scores[0] - 1.0) < 1e-5


async def test_search_by_meaning_keeps_to_filter_and_namespace(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "wanted", {"text": "gg", "keep": True})
    await store.aput(ns, "other", {"text": "aab", "keep": False})
    await store.aput(_ns(), "elsewhere", {"text": "aab", "keep": True})
    found = await store.asearch(ns, query="aab", filter={"keep": True})
    assert [item.key for item in found] == ["wanted"]


async def test_an_item_without_index_is_found_last(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "plain", {"text": "aab"}, index=False)
    await store.aput(ns, "indexed", {"text": "gg"})
    found = await store.asearch(ns, query="aab")
    assert [item.key for item in found] == ["indexed", "plain"]
    assert found[1].score is None


async def test_a_replaced_text_is_forgotten(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "k", {"text": "aab"})
    await store.aput(ns, "k", {"text": "ggg"})
    await store.aput(ns, "other", {"text": "aag"})
    assert [i.key for i in await store.asearch(ns, query="aab")] == ["other", "k"]


async def test_ttl_of_a_fraction_is_not_expired_at_once(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "k", {"n": 1}, ttl=0.4)
    assert await store.aget(ns, "k") is not None
    assert [i.key for i in await store.asearch(ns)] == ["k"]


async def test_what_expired_is_not_returned(store: BaseStore) -> None:
    ns = _ns()
    await store.aput(ns, "k", {"n": 1}, ttl=0.005)
    await asyncio.sleep(0.5)
    assert await store.aget(ns, "k") is None
    assert await store.asearch(ns) == []


SPECS: dict[str, list[Spec]] = {
    "get_put_delete": [
        test_put_then_get,
        test_get_of_nothing,
        test_put_replaces,
        test_delete,
        test_keys_and_namespaces_are_apart,
        test_bad_namespaces_are_refused,
    ],
    "search": [test_search_by_prefix, test_search_pages_are_complete],
    "filters": [
        test_filter_by_equality,
        test_filter_compares_numbers,
        test_filter_into_nested_fields,
        test_an_unknown_operator_is_refused,
    ],
    "namespaces": [test_namespaces_are_listed],
    "batch": [test_a_batch_answers_in_order],
    "semantic": [
        test_the_nearest_comes_first,
        test_search_by_meaning_keeps_to_filter_and_namespace,
        test_an_item_without_index_is_found_last,
        test_a_replaced_text_is_forgotten,
    ],
    "ttl": [test_ttl_of_a_fraction_is_not_expired_at_once, test_what_expired_is_not_returned],
}


@dataclass
class StoreReport:
    """How many specs of each capability passed, and which failed or were skipped."""

    passed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


async def validate_store(factory: Callable[[], BaseStore]) -> StoreReport:
    """
    Run every spec against a store, each capability on a fresh one.

    Specs of ``ttl`` are skipped where the store does not claim to support it.
    """
    report = StoreReport()
    for capability, specs in SPECS.items():
        store = factory()
        if capability == "ttl" and not store.supports_ttl:
            report.skipped.append(capability)
            continue
        for spec in specs:
            try:
                await spec(store)
            except Exception as error:
                report.failed.setdefault(capability, []).append(f"{spec.__name__}: {error!r}")
            else:
                report.passed[capability] = report.passed.get(capability, 0) + 1
    return report


def validate_stores(postgres: str) -> int:
    """Print the table of stores; return how much of ours failed or was skipped."""
    print("\n| store | face | " + " | ".join(SPECS) + " |")
    print("|" + " --- |" * (2 + len(SPECS)))
    failures = 0
    for sealing in ("plain", "sealed"):
        for face in ("async", "sync"):
            report = _run(postgres, sealing, face)
            _print_row(f"SemanticStore, {sealing}", face, report)
            failures += len(report.skipped) + sum(map(len, report.failed.values()))
    memory = asyncio.run(validate_store(lambda: InMemoryStore(index=INDEX)))
    _print_row("InMemoryStore", "async", memory)
    return failures


def _run(postgres: str, sealing: str, face: str) -> StoreReport:
    name = f"store_{next(_numbers)}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(f"CREATE DATABASE {name}")
    keyring = Keyring.generate() if sealing == "sealed" else None
    url = postgres.replace("/postgres?", f"/{name}?")

    async def run() -> StoreReport:
        async with SemanticStore.from_conn_string(url, index=INDEX, keyring=keyring) as store:
            return await validate_store(lambda: SyncStoreFace(store) if face == "sync" else store)

    report = asyncio.run(run())
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    return report


def _print_row(name: str, face: str, report: StoreReport) -> None:
    cells = []
    for capability in SPECS:
        failed = report.failed.get(capability, [])
        passed = report.passed.get(capability, 0)
        text = f"{passed} of {passed + len(failed)}" if failed else str(passed)
        cells.append("not supported" if capability in report.skipped else text)
    print(f"| {name} | {face} | " + " | ".join(cells) + " |")
    for messages in report.failed.values():
        for message in messages:
            print(f"  {name}, {face}: {message}")
