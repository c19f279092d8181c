"""Stores whose embedder does what a test wants."""

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from langgraph_vat import SemanticStore
from tests.store.embedder import DIMS, Embedder


@pytest.fixture
def no_pauses(monkeypatch):
    """Nobody waits before he asks again; and nothing is indexed by itself."""
    monkeypatch.setattr("langgraph_vat._lifecycle._INDEX_S", 3_600.0)
    monkeypatch.setattr("langgraph_vat._ops.embedding.PAUSES_S", (0.0, 0.0))


@pytest.fixture
def embedder() -> Iterator[Embedder]:
    embedder = Embedder()
    yield embedder
    embedder.gate.set()


@pytest.fixture
def make(postgres_url, no_pauses) -> Iterator[Callable[..., SemanticStore]]:
    """Make a store of this database, with this embedder."""
    made: list[SemanticStore] = []

    def one(embedder: Any, **more: Any) -> SemanticStore:
        index: Any = {"dims": DIMS, "embed": embedder, "fields": ["text"]}
        store = SemanticStore.from_conn_string(postgres_url, index=index, **more)
        store.setup()
        made.append(store)
        return store

    yield one
    for store in made:
        store.close()


@pytest.fixture
def query(postgres_url) -> Iterator[Callable[..., list[Any]]]:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        yield lambda sql: connection.execute(sql).fetchall()
