"""Input that cannot be stored is refused before anything is written; odd ids stay apart."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.base import empty_checkpoint

from langgraph_vat.errors import ConfigurationError, InvalidInputError
from langgraph_vat.keyring import Keyring
from langgraph_vat.saver import HybridSaver
from langgraph_vat.settings import Settings

ODD = ["*", ":", "{a}", "a|b", "100%", "[a]", "a\nb", "\N{GRINNING FACE}", "a", "a*", "?"]


@pytest.fixture
def saver(postgres_url: str, redis_url: str) -> Iterator[HybridSaver]:
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, flush_every=3) as made:
        yield made


def at(thread_id: Any) -> Any:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}


@pytest.mark.parametrize("thread_id", ["", 7, None, "a\0b", "x" * 10_000, "\ud800"])
def test_refused_id_writes_nothing(saver: HybridSaver, postgres_url: str, thread_id: Any) -> None:
    with pytest.raises(InvalidInputError):
        saver.put(at(thread_id), empty_checkpoint(), {}, {})
    saver.flush()
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM checkpoints").fetchone() == (0,)


def test_odd_ids_are_isolated(saver: HybridSaver) -> None:
    ids = {odd: saver.put(at(odd), empty_checkpoint(), {}, {}) for odd in ODD}
    saver.delete_thread("*")
    assert saver.get_tuple(at("*")) is None
    for odd in ODD[1:]:
        found = saver.get_tuple(at(odd))
        assert found is not None
        assert found.config == ids[odd]


def test_unusable_settings_and_keys() -> None:
    with pytest.raises(ConfigurationError):
        Settings(flush_every=0)
    with pytest.raises(ConfigurationError):
        Keyring([("k", b"short")])
