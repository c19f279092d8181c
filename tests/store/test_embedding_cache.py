"""A text that was embedded is not embedded again; nobody reads it in Redis, or believes lies."""

import asyncio
import hashlib
import hmac
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from langchain_core.embeddings import Embeddings

from langgraph_vat import ConfigurationError, Keyring, SemanticStore, UnavailableError, Vat
from langgraph_vat._ops.embedding_cache import TTL_S, model_of
from tests.store.embedder import DIMS, Embedder, embed
from tests.store.queue import HERE, PENDING, SECRET, VECTORS

KEYRING = Keyring.generate()


@pytest.fixture
def fresh(postgres_url, redis_url, no_pauses) -> Iterator[Callable[..., tuple[Any, Embedder]]]:
    """Make a store that knows nothing, as one of another process, and its embedder."""
    made: list[SemanticStore] = []

    def one(*, model: str | None = "m", **more: Any) -> tuple[SemanticStore, Embedder]:
        embedder = Embedder()
        index: Any = {"dims": DIMS, "embed": embedder, "fields": ["text"]}
        if model is not None:
            index["model"] = model
        options = {"redis": redis_url, "index": index, **more}
        store = SemanticStore.from_conn_string(postgres_url, **options)
        store.setup()
        made.append(store)
        return store, embedder

    yield one
    for store in made:
        store.close()


def keys(client: Any) -> list[bytes]:
    return list(client.scan_iter(b"*:e:*"))


@pytest.mark.parametrize("keyring", [None, KEYRING], ids=["plain", "sealed"])
@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_text_is_embedded_once_for_all_processes(fresh, client, query, keyring, face):
    for number in range(3):
        store, embedder = fresh(keyring=keyring)
        if face == "sync":
            store.put(HERE, str(number), {"text": "abc def"})
            found = store.search(HERE, query="abc def", limit=9)
        else:

            async def main(store: SemanticStore = store, key: str = str(number)) -> Any:
                await store.aput(HERE, key, {"text": "abc def"})
                found = await store.asearch(HERE, query="abc def", limit=9)
                await store.aclose()
                return found

            found = asyncio.run(main())
        assert embedder.calls == ([["abc def"]] if number == 0 else [])
        assert [item.score for item in found] == [pytest.approx(1.0)] * (number + 1)
    vectors = {row[0] for row in query("SELECT embedding::text FROM store_vectors")}
    assert len(vectors) == 1
    (key,) = keys(client)
    assert 0 < client.ttl(key) <= TTL_S


def test_another_model_or_kind_is_another_vector(fresh):
    class Asymmetric(Embeddings):
        model = "m"

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return embed(texts)

        def embed_query(self, text: str) -> list[float]:
            return embed([text[::-1]])[0][::-1]

    index: Any = {"dims": DIMS, "embed": Asymmetric(), "fields": ["text"]}
    for _ in range(2):
        store, _ = fresh(index=index)
        store.put(HERE, "k", {"text": "abc"})
        (found,) = store.search(HERE, query="abc")
        assert found.score < 0.99
    fresh(model="one")[0].put(HERE, "k", {"text": "abc"})
    store, embedder = fresh(model="two")
    store.put(HERE, "k", {"text": "abc"})
    assert embedder.calls == [["abc"]]


def test_of_an_embedder_without_a_name_nothing_is_kept(fresh, client):
    for _ in range(2):
        store, embedder = fresh(model=None)
        store.put(HERE, "k", {"text": "abc"})
        assert embedder.calls == [["abc"]]
    assert keys(client) == []


class Named(Embeddings):
    def __init__(self, **names: Any) -> None:
        vars(self).update(names)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return embed(texts)

    def embed_query(self, text: str) -> list[float]:
        return embed([text])[0]


def test_the_model_is_what_is_said_or_what_the_embedder_tells():
    kind = f"{__name__}.Named"
    assert model_of({"model": "x", "embed": "openai:y"}, Named()) == "x"
    assert model_of({"embed": "openai:y"}, Named(model="z")) == "openai:y"
    assert model_of({"embed": Named()}, Named(model="z")) == f"{kind}:z"
    assert model_of({"embed": Named()}, Named(model_name="z")) == f"{kind}:z"
    assert model_of({"embed": Named()}, Named()) is None
    assert model_of({"embed": Named()}, Named(model=7)) is None
    for bad in ("", 5, ["x"]):
        with pytest.raises(ConfigurationError, match="model"):
            model_of({"model": bad}, Named())


def test_no_more_is_kept_than_was_set(fresh, client, query):
    entry = 4 * DIMS + 150
    for order in (1, -1):
        store, embedder = fresh(embedding_cache_bytes=10 * entry)
        for number in range(50)[::order]:
            store.put(HERE, str(number), {"text": f"text {number}"})
        assert len(keys(client)) <= 10
    assert len(embedder.calls) < 50
    for number in range(50):  # one in the place of another is not taken for it
        (vector,) = query(f"SELECT embedding::text FROM store_vectors WHERE key = '{number}'")[0]
        assert [float(x) for x in vector[1:-1].split(",")] == pytest.approx(
            embed([f"text {number}"])[0]
        )
    client.flushall()
    store, embedder = fresh(embedding_cache_bytes=0)
    store.put(HERE, "k", {"text": "abc"})
    assert keys(client) == []


def test_redis_has_neither_the_text_nor_what_tells_it(fresh, client):
    store, _ = fresh(keyring=KEYRING)
    store.put(HERE, "k", {"text": SECRET})
    (key,) = keys(client)
    held = key + client.get(key)
    vector = struct.pack(f"<{DIMS}f", *embed([SECRET])[0])
    assert vector not in held
    assert SECRET.encode() not in held
    plain, _ = fresh(key_prefix="other")
    plain.put(("plain",), "k", {"text": SECRET})
    other = next(one for one in keys(client) if b"other" in one)
    assert client.get(other).endswith(vector)  # this is where it would be
    assert other.rpartition(b":")[2] != key.rpartition(b":")[2]  # nor is the hash the same


def _list(*parts: str | bytes) -> bytes:
    raw = [part.encode() if isinstance(part, str) else part for part in parts]
    return struct.pack(">I", len(raw)) + b"".join(struct.pack(">I", len(r)) + r for r in raw)


def test_the_format_is_that_of_the_page(fresh, client, query):
    """docs/sealed-format.md, implemented again with nothing of ours but the keyring."""
    store, _ = fresh(keyring=KEYRING)
    store.put(HERE, "k", {"text": "abc"})
    ((wrapped,),) = query("SELECT data_key FROM vat_store_keys WHERE root = ''")
    index_key = KEYRING.unwrap(wrapped, associated_data=_list("index key", "store"))

    def derived(*purpose: str | bytes) -> bytes:
        return hmac.digest(index_key, _list("derived key", *purpose), "sha256")

    message = _list("embedding", "m", str(DIMS)) + _list("document") + b"abc"
    name = hmac.digest(derived("embedding cache hash"), message, "sha256")
    (key,) = keys(client)
    place = int.from_bytes(name[:8]) % (64 * 2**20 // (4 * DIMS + 150))
    assert key == b"{vat:%d}:e:%d" % (place % 128, place)
    entry = client.get(key)
    cipher = AESGCM(derived("embedding cache seal", entry[2:10]))
    opened = cipher.decrypt(entry[10:22], entry[22:], entry[:10] + name)
    assert struct.unpack(f"<{DIMS}f", opened) == pytest.approx(embed(["abc"])[0])


def test_what_another_keyring_sealed_is_not_there(fresh, client, query):
    store, _ = fresh(keyring=KEYRING, embedding_cache_bytes=300)  # one place
    store.put(HERE, "k", {"text": "abc"})
    query("UPDATE vat_store_keys SET root = 'was' WHERE root = '' RETURNING 1")
    for _ in range(2):
        other, embedder = fresh(keyring=KEYRING, embedding_cache_bytes=300)
        other.put(HERE, "k", {"text": "abc"})
    assert embedder.calls == []
    assert len(query(VECTORS)) == 1


RUBBISH: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda entry: b"",
    "short": lambda entry: entry[:-4],
    "long": lambda entry: entry + bytes(4),
    "zeros": lambda entry: bytes(len(entry)),
    "noise": lambda entry: random.Random(1).randbytes(len(entry)),
    "a bit": lambda entry: entry[:-1] + bytes([entry[-1] ^ 1]),
    "nan": lambda entry: entry[:-4] + struct.pack("<f", float("nan")),
}


@pytest.mark.parametrize("keyring", [None, KEYRING], ids=["plain", "sealed"])
@pytest.mark.parametrize("rubbish", [*RUBBISH, "other", "list"])
def test_rubbish_is_not_believed(fresh, client, query, keyring, rubbish):
    store, _ = fresh(keyring=keyring)
    store.put(HERE, "k", {"text": "abc"})
    store.put(HERE, "other", {"text": "mno"})
    one, other = keys(client)
    entries = {one: client.get(one), other: client.get(other)}
    for key, entry in entries.items():
        client.delete(key)
        if rubbish == "list":
            client.lpush(key, "x")
        elif rubbish == "other":
            client.set(key, entries[other if key == one else one])
        else:
            client.set(key, RUBBISH[rubbish](entry))
    store, embedder = fresh(keyring=keyring)
    store.put(HERE, "again", {"text": "abc"})
    assert embedder.calls == [["abc"]]
    (vector,) = query("SELECT embedding::text FROM store_vectors WHERE key = 'again'")[0]
    assert [float(x) for x in vector[1:-1].split(",")] == pytest.approx(embed(["abc"])[0])


def test_a_valid_checksum_over_what_is_no_vector_is_not_believed(fresh, client):
    """Whoever may write to Redis can forge a plain entry: of what a vector can be, at least."""
    store, _ = fresh()
    store.put(HERE, "k", {"text": "abc"})
    cache = store._items.embedding.cache
    name = cache._hash("document", "abc")
    bad = struct.pack(f"<{DIMS}f", *[float("nan")] * DIMS)
    client.set(cache._place(name), hashlib.sha256(name + bad).digest()[:16] + bad)
    store, embedder = fresh()
    store.put(HERE, "k", {"text": "abc"})
    assert embedder.calls == [["abc"]]


@pytest.mark.parametrize("face", ["sync", "async"])
@pytest.mark.parametrize("fault", ["dead", "frozen", "full"])
def test_a_redis_that_fails_is_done_without(fresh, own_redis, query, fault, face):
    store, embedder = fresh(redis=own_redis.url)
    if fault == "dead":
        own_redis.kill()
    elif fault == "frozen":
        own_redis.pause()
    else:
        with redis.Redis.from_url(own_redis.url) as client:
            client.config_set("maxmemory", "1")

    async def puts() -> None:
        for number in range(3):
            await store.aput(HERE, str(number), {"text": f"text {number}"})
        await store.aclose()

    if face == "async":
        asyncio.run(puts())
    else:
        for number in range(3):
            store.put(HERE, str(number), {"text": f"text {number}"})
    assert len(embedder.calls) == len(query(VECTORS)) == 3
    assert store._items.embedding.cache._left_alone_until > 0  # it is not waited for each time


def test_what_is_kept_is_had_while_the_embedder_is_away(fresh, query):
    store, embedder = fresh()
    for text in ("abc", "text"):  # the one is what the embedder is tried with
        store.put(HERE, "k", {"text": text})
    embedder.fail()
    store.put(HERE, "new", {"text": "mno"})
    store.put(HERE, "again", {"text": "abc"})
    assert query(VECTORS) == [("again", "text"), ("k", "text")]
    assert query(PENDING) == [("new", None, 0, "ConnectionError")]
    assert store.search(HERE, query="abc", limit=1)[0].score == pytest.approx(1.0)
    with pytest.raises(UnavailableError):
        store.search(HERE, query="not known")
    assert store.index_pending() == 0
    assert query("SELECT due_at <= now() FROM vat_store_pending") == [(True,)]  # it is away
    embedder.work()
    assert store.index_pending() == 1
    store, embedder = fresh()
    store.put(HERE, "third", {"text": "mno"})
    assert embedder.calls == []


def test_a_vat_gives_its_store_its_redis(postgres_url, redis_url, client):
    embedder = Embedder()
    index: Any = {"dims": DIMS, "embed": embedder, "model": "m"}
    for key in ("one", "two"):
        with Vat.connect(postgres_url, redis_url, index=index) as vat:
            vat.store.put(HERE, key, {"text": "abc"})
    assert len(embedder.calls) == 1
    assert len(keys(client)) == 1


def test_a_cluster_keeps_vectors(fresh, redis_cluster_url):
    for number in range(2):
        store, embedder = fresh(redis=redis_cluster_url)
        for text in ("abc", "def", "mno"):
            store.put(HERE, text, {"text": text})
        assert len(embedder.calls) == (0 if number else 3)
