"""
Vectors in Redis, by what they are of: a text is paid for once.

1. A key tells model, dimensions and text by a hash; a vector stands behind a checksum over
   that hash and itself. What does not fit, whoever put it there, is not there.
2. With a keyring the hash is keyed, and the vector sealed; both keys come from that of the
   blind indexes. Each writing has a key of its own, which is made again from its id.
3. There is room for so many vectors: one takes the place of another whose hash has the same
   remainder. So no more memory is used, whatever the server's policy.
4. Redis may fail, or be slow. Then the embedder is asked, and Redis is left alone for a while.
"""

import hashlib
import hmac
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from langchain_core.embeddings import Embeddings
from langgraph.store.base.embed import EmbeddingsLambda

from langgraph_vat._durable import items as sql
from langgraph_vat._hot.keys import Keys
from langgraph_vat._io.protocols import Backend
from langgraph_vat._ops.keys import open_index_key
from langgraph_vat._ops.search import VectorIndex
from langgraph_vat._ops.shared import now
from langgraph_vat._seal.associated_data import associated_data
from langgraph_vat._seal.blind_index import IndexKey
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.errors import ConfigurationError, SealError
from langgraph_vat.keyring import KeyWrapper

TTL_S = 7 * 86_400
# Seconds for which a Redis that failed is left alone.
_LEFT_ALONE_S = 10.0
_SUM_BYTES = 16
_ID_BYTES = 8
# Of Redis's own, and of the key; about.
_OVERHEAD_BYTES = 150


def model_of(config: Mapping[str, Any], embeddings: Embeddings) -> str | None:
    """
    Return which model embeds: what ``index["model"]`` says, or the embedder; None if neither does.

    Raises:
        ConfigurationError: It says something that is no name.
    """
    model = config.get("model")
    if not (model is None or (isinstance(model, str) and model)):
        raise ConfigurationError("model of index must be a string that names the embedder's model")
    if model is None and isinstance(config.get("embed"), str):
        model = config["embed"]
    if model is not None or isinstance(embeddings, EmbeddingsLambda):
        return model
    name = getattr(embeddings, "model", None) or getattr(embeddings, "model_name", None)
    kind = type(embeddings)
    return f"{kind.__module__}.{kind.__qualname__}:{name}" if isinstance(name, str) else None


class EmbeddingCache:
    """
    The vectors of one model.

    Args:
        model: Its name.
        index: What its vectors must be like.
        keyring: Keeps the key behind hashes and seals; None for plain ones.
        keys: Names of Redis's keys.
        most_bytes: About how much memory all vectors may take.
    """

    def __init__(
        self,
        model: str,
        index: VectorIndex,
        keyring: KeyWrapper | None,
        keys: Keys,
        most_bytes: int,
    ) -> None:
        self._dims = int(index.dims or 0)
        self._about = associated_data("embedding", model, str(self._dims))
        self._index = index
        self._keyring = keyring
        self._keys = keys
        self._places = most_bytes // (4 * self._dims + _OVERHEAD_BYTES)
        self._key: IndexKey | None = None
        self._hash_key = b""
        self._left_alone_until = float("-inf")

    async def get(self, backend: Backend, kind: str, texts: Sequence[str]) -> dict[str, str]:
        """Return those vectors that are there, as pgvector's literals."""
        if not texts or not self._may_ask(backend):
            return {}
        assert backend.cache is not None
        try:
            await self._open(backend)
            hashes = [self._hash(kind, text) for text in texts]
            found = await backend.cache.read_each("GET", [self._place(one) for one in hashes])
            read = (self._read(*pair) for pair in zip(hashes, found, strict=True))
            return {text: one for text, one in zip(texts, read, strict=True) if one is not None}
        except Exception:  # noqa: BLE001 - without it there is the embedder
            self._left_alone_until = now() + _LEFT_ALONE_S
            return {}

    async def set(self, backend: Backend, kind: str, vectors: Mapping[str, str]) -> None:
        """Keep vectors, if Redis takes them."""
        if not self._may_ask(backend):
            return
        assert backend.cache is not None
        try:
            await self._open(backend)
            key_id = os.urandom(_ID_BYTES)
            entries = {}
            for text, literal in vectors.items():
                name = self._hash(kind, text)
                entries[self._place(name)] = self._entry(name, orjson.loads(literal), key_id)
            await backend.cache.set_each(entries, TTL_S)
        except Exception:  # noqa: BLE001 - likewise
            self._left_alone_until = now() + _LEFT_ALONE_S

    def _may_ask(self, backend: Backend) -> bool:
        return backend.cache is not None and self._places > 0 and now() >= self._left_alone_until

    async def _open(self, backend: Backend) -> None:
        if self._keyring is not None and self._key is None:
            statements = sql.SELECT_INDEX_KEY, sql.ADD_INDEX_KEY
            place = associated_data("index key", "store")
            key = await open_index_key(backend, self._keyring, statements, place)
            self._hash_key = key.derived("embedding cache hash")
            self._key = key

    def _hash(self, kind: str, text: str) -> bytes:
        # What is before the text tells its own length.
        message = self._about + associated_data(kind) + text.encode(errors="surrogatepass")
        if self._keyring is None:
            return hashlib.sha256(message).digest()
        return hmac.digest(self._hash_key, message, "sha256")

    def _place(self, name: bytes) -> bytes:
        return self._keys.vector(int.from_bytes(name[:8]) % self._places)

    def _entry(self, name: bytes, numbers: Sequence[float], key_id: bytes) -> bytes:
        packed = struct.pack(f"<{self._dims}f", *numbers)
        if self._keyring is None:
            return _sum(name, packed) + packed
        return self._data_key(key_id).seal(packed, associated_data=name)

    def _read(self, name: bytes, entry: Any) -> str | None:
        try:
            packed = self._opened(name, bytes(entry or b""))
            numbers = struct.unpack(f"<{self._dims}f", packed)
            return self._index.literals([numbers], 1)[0]
        except (SealError, ConfigurationError, struct.error, TypeError, ValueError):
            return None

    def _opened(self, name: bytes, entry: bytes) -> bytes:
        if self._keyring is not None:
            return self._data_key(entry[2 : 2 + _ID_BYTES]).open(entry, associated_data=name)
        packed = entry[_SUM_BYTES:]
        return packed if hmac.compare_digest(_sum(name, packed), entry[:_SUM_BYTES]) else b""

    def _data_key(self, key_id: bytes) -> DataKey:
        assert self._key is not None
        assert self._keyring is not None
        secret = self._key.derived("embedding cache seal", key_id)
        return DataKey.derived(key_id, secret, self._keyring.cipher)


def _sum(name: bytes, packed: bytes) -> bytes:
    return hashlib.sha256(name + packed).digest()[:_SUM_BYTES]
