"""
Encryption for any saver, and which serializer and keyring a saver of ours uses.

In a saver of ours every value is bound to its place and sealed under its
thread's own key. Another saver tells a serializer nothing about places: there
a message is bound to its type alone, so that it cannot be read, changed,
relabelled or replaced by plaintext, but one message can stand in for another
sealed by the same keyring.

A message is a data key wrapped by the keyring, after its length as 2 bytes,
and what that key sealed. The data key belongs to the serializer and is made
with it: the keyring is asked once, not once a message.
"""

import copy
from collections.abc import Collection
from functools import lru_cache
from typing import Any, Self

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langgraph_vat._seal.associated_data import associated_data
from langgraph_vat._seal.codec import (
    Codec,
    PlainCodec,
    SealedCodec,
    opened_type,
    refuse_unsealed,
)
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat._seal.strict import StrictSerializer
from langgraph_vat.errors import ConfigurationError
from langgraph_vat.keyring import KeyWrapper

_WRAPPED_FOR = associated_data("data key", "serializer")
# Data keys of other processes' serializers that one keeps open.
_MOST_OPENED = 1024


class EncryptedSerializer(SerializerProtocol):
    """
    Seals what another serializer returns, with the keyring's cipher.

    Making one asks the keyring to wrap its data key, and a message of another process's has
    it asked again, where it stands: behind a key server or a KMS that is a call which waits,
    in an event loop too. Make it before the loop runs, or by ``asyncio.to_thread``.

    Args:
        keyring: Wraps the key that seals.
        serde: The serializer in front; a `StrictSerializer` if None.
    """

    def __init__(self, keyring: KeyWrapper, serde: SerializerProtocol | None = None) -> None:
        self.keyring = keyring
        self.serde = serde if serde is not None else StrictSerializer()
        self._data_key = DataKey.generate(keyring.cipher)
        wrapped = self._data_key.wrap(keyring, associated_data=_WRAPPED_FOR)
        self._prefix = len(wrapped).to_bytes(2) + wrapped
        self._opened = {wrapped: self._data_key}

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        """Serialize `obj` and seal it; the tag ends in ``+`` and the cipher's name."""
        type_, data = self.serde.dumps_typed(obj)
        sealed = self._data_key.seal(data, associated_data=_bound(type_))
        return type_ + self._data_key.suffix, self._prefix + sealed

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """
        Open and deserialize what `dumps_typed` returned.

        Raises:
            UnknownKeyError: The keyring lacks the key it was sealed under.
            SealError: It was changed or relabelled, or is not sealed at all.
        """
        type_, message = data[0], data[1] or b""
        refuse_unsealed(type_)
        if message[: len(self._prefix)] == self._prefix:
            key, length = self._data_key, len(self._prefix)
        else:
            length = 2 + int.from_bytes(message[:2])
            key = self._key(bytes(message[2:length]))
        sealed = memoryview(message)[length:]
        inner = opened_type(type_, sealed)
        return self.serde.loads_typed((inner, key.open(sealed, associated_data=_bound(inner))))

    def with_msgpack_allowlist(self, extra_allowlist: Collection[tuple[str, ...]]) -> Self:
        """Return a serializer that admits more types; this one if nothing changes."""
        if not isinstance(self.serde, JsonPlusSerializer):
            return self
        serde = self.serde.with_msgpack_allowlist(extra_allowlist)
        if serde is self.serde:
            return self
        clone = copy.copy(self)
        clone.serde = serde
        return clone

    def _key(self, wrapped: bytes) -> DataKey:
        key = self._opened.get(wrapped)
        if key is None:
            if len(self._opened) >= _MOST_OPENED:
                self._opened = {self._prefix[2:]: self._data_key}
            key = DataKey.unwrap(wrapped, self.keyring, associated_data=_WRAPPED_FOR)
            self._opened[wrapped] = key
        return key


@lru_cache(maxsize=64)
def _bound(type_: str) -> bytes:
    return associated_data("serializer", type_)


def codec_for(serde: SerializerProtocol, data_key: DataKey | None, *base: str) -> Codec:
    """
    Return the codec of one thread or store root.

    Args:
        serde: The saver's serializer. Of an `EncryptedSerializer` the one in
            front is used: nothing is sealed twice.
        data_key: Seals; None leaves values as `serde` writes them.
        *base: What all its values are bound to.
    """
    inner = serde.serde if isinstance(serde, EncryptedSerializer) else serde
    if data_key is None:
        return PlainCodec(inner)
    return SealedCodec(inner, data_key, *base)


def sealing(keyring: KeyWrapper | None, serde: SerializerProtocol | None) -> KeyWrapper | None:
    """
    Return the keyring that seals: the one given, or that of an `EncryptedSerializer`.

    Raises:
        ConfigurationError: One of them is something else.
    """
    if not isinstance(keyring, KeyWrapper | None):
        msg = f"keyring must be a Keyring, or another KeyWrapper, not {type(keyring).__name__}"
        raise ConfigurationError(msg)
    if serde is not None and not isinstance(serde, SerializerProtocol):
        msg = f"serde must have dumps_typed and loads_typed; {type(serde).__name__} has not"
        raise ConfigurationError(msg)
    return keyring or (serde.keyring if isinstance(serde, EncryptedSerializer) else None)
