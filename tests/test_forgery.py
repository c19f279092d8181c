"""Whoever can write to the database, but has no key, cannot put a value into a sealed thread."""

from typing import Any, TypedDict

import psycopg
import pytest
from langgraph.graph import START, StateGraph

from langgraph_vat import HybridSaver, Keyring, SealError, SemanticStore

KEYRING = Keyring.generate()


class State(TypedDict):
    text: str
    other: str


def config(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread}, "metadata": {"note": "mine"}}


@pytest.fixture
def written(postgres_url):
    """Address of a database with two sealed threads; a new saver reads it from Postgres."""
    with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING) as saver:
        builder = StateGraph(State).add_node("n", lambda s: {"text": s["text"] + "!"})
        graph = builder.add_edge(START, "n").compile(checkpointer=saver)
        for thread in "tu":
            graph.invoke({"text": thread}, config(thread))
    return postgres_url


def forge(url: str, statement: str) -> None:
    with psycopg.connect(url) as connection:
        assert connection.execute(statement).rowcount


def read(url: str, **options: Any) -> Any:
    saver = HybridSaver.from_conn_string(url, **options)
    if options.get("redis"):
        saver.enable_hot()
    with saver:
        return saver.get_tuple(config())


FORGERIES = {
    "another thread's value": (
        "UPDATE checkpoint_blobs b SET blob = o.blob FROM checkpoint_blobs o WHERE b.thread_id ="
        " 't' AND o.thread_id = 'u' AND b.channel = o.channel AND b.type = o.type"
    ),
    "an older value": (
        "UPDATE checkpoint_blobs b SET blob = o.blob FROM checkpoint_blobs o WHERE b.thread_id ="
        " 't' AND o.thread_id = 't' AND b.channel = 'text' AND o.channel = 'text'"
        " AND b.version > o.version"
    ),
    "plaintext": "UPDATE checkpoint_blobs SET type = 'msgpack', blob = '\\xa466616b65'",
    "plaintext under the sealed label": "UPDATE checkpoint_blobs SET blob = '\\xa466616b65'",
    "another label": "UPDATE checkpoint_blobs SET type = 'bytes+aes256gcm' WHERE channel = 'text'",
    "plaintext metadata": "UPDATE checkpoints SET vat_type = 'json', vat_exact = '[{},{}]'",
    "metadata of another checkpoint": (
        "UPDATE checkpoints c SET vat_exact = o.vat_exact FROM checkpoints o"
        " WHERE c.checkpoint_id > o.checkpoint_id"
    ),
    "another thread's key": (
        "UPDATE vat_threads t SET data_key = o.data_key FROM vat_threads o"
        " WHERE t.thread_id <> o.thread_id"
    ),
    "no key": "UPDATE vat_threads SET data_key = NULL",
    "no thread": "DELETE FROM vat_threads",
    "another generation": "UPDATE vat_threads SET generation = gen_random_uuid()",
}


@pytest.mark.parametrize("statement", FORGERIES.values(), ids=FORGERIES)
def test_a_forgery_is_refused(written, statement):
    assert read(written, keyring=KEYRING).checkpoint["channel_values"]["text"] == "t!"
    forge(written, statement)
    with pytest.raises(SealError):
        read(written, keyring=KEYRING)


def test_a_sealed_thread_needs_its_keyring(written):
    with pytest.raises(SealError, match="no keyring"):
        read(written)
    with pytest.raises(SealError):
        read(written, keyring=Keyring.generate())
    with pytest.raises(SealError, match="'k1'"):
        read(written, keyring=Keyring.generate("k2"))
    rotated = KEYRING.with_key("k2").with_primary("k2")
    assert read(written, keyring=rotated).checkpoint["channel_values"]["text"] == "t!"


BESIDE = {
    "channel in the checkpoint": """
        UPDATE checkpoints SET checkpoint = jsonb_set(checkpoint, '{channel_values}',
        coalesce(checkpoint->'channel_values', '{}') || '{"other": "fake"}')""",
    "metadata": """
        UPDATE checkpoints SET vat_type = NULL, vat_exact = NULL,
        metadata = metadata || '{"note": "fake"}'""",
    "field of the checkpoint": """
        UPDATE checkpoints SET checkpoint = checkpoint || '{"pending_sends": ["fake"]}'""",
}


@pytest.mark.parametrize("has_redis", [False, True], ids=["durable", "hot"])
@pytest.mark.parametrize("statement", BESIDE.values(), ids=BESIDE)
def test_plaintext_beside_the_sealed_values_is_refused(written, redis_url, statement, has_redis):
    forge(written, statement)
    with pytest.raises(SealError):
        read(written, keyring=KEYRING, redis=redis_url if has_redis else None)


ITEM_FORGERIES = {
    "another key's value": (
        "UPDATE store s SET vat_value = o.vat_value FROM store o WHERE s.key <> o.key"
    ),
    "plaintext": """UPDATE store SET vat_type = NULL, vat_value = NULL, value = '{"a": 0}'""",
    "a plain type": "UPDATE store SET vat_type = 'msgpack', vat_value = '\\x80'",
    "nothing": "UPDATE store SET vat_value = NULL",
    "another namespace": "UPDATE store SET prefix = 'users.v'",
    "another root": "UPDATE store SET prefix = 'people'",
    "no data key": "DELETE FROM vat_store_keys",
}


@pytest.mark.parametrize("statement", ITEM_FORGERIES.values(), ids=ITEM_FORGERIES)
def test_a_forged_item_is_refused(postgres_url, statement):
    with SemanticStore.from_conn_string(postgres_url, keyring=KEYRING) as store:
        for number, key in enumerate("kl"):
            store.put(("users", "u"), key, {"a": number})
        assert [item.value["a"] for item in store.search(("users",))].count(1) == 1
    forge(postgres_url, statement)
    with SemanticStore.from_conn_string(postgres_url, keyring=KEYRING) as store:
        for root in ("users", "people"):
            if not store.list_namespaces(prefix=(root,)):
                continue
            with pytest.raises(SealError):
                store.search((root,))
