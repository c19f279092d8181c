"""
The serializers: which types are made again from what is stored, and encryption for any saver.

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
import importlib.util
import os
import threading
from collections.abc import Collection, Iterable
from functools import lru_cache
from types import NoneType
from typing import Any, NoReturn, Self

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.event_hooks import SerdeEvent, register_serde_event_listener
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
from langgraph_vat.errors import ConfigurationError, SealError, TypeNotAllowedError
from langgraph_vat.keyring import KeyWrapper

_WRAPPED_FOR = associated_data("data key", "serializer")
# Data keys of other processes' serializers that one keeps open.
_MOST_OPENED = 1024
_TAGS = frozenset(("null", "bytes", "bytearray", "json", "msgpack"))
_MOST_PROVEN = 1024
# What the serializer knows without naming a class.
_PLAIN = frozenset((NoneType, bool, int, float, str, bytes, bytearray, list, tuple, dict))


class StrictSerializer(JsonPlusSerializer):
    """
    LangGraph's serializer, which makes no object again but of types that are allowed.

    Those are the ones that LangGraph takes for safe (messages, dates, sets, `Send`, …),
    those of `allow`, and, with ``LANGGRAPH_STRICT_MSGPACK=true``, those that a compiled
    graph's schemas name. Another one is an error: when it is first written, if it is a value or
    stands directly in a list or dict, else when it is read. Nothing is ever pickled.

    Args:
        allow: Classes; or pairs of module and name.

    Raises:
        ConfigurationError: One is neither.
    """

    def __init__(self, allow: Iterable[type | tuple[str, str]] = ()) -> None:
        allowed = list(allow)
        for one in allowed:
            is_pair = isinstance(one, tuple) and [type(part) for part in one] == [str, str]
            if not (isinstance(one, type) or is_pair):
                msg = f"allow must hold classes, or pairs of module and name; not {one!r:.100}"
                raise ConfigurationError(msg)
        super().__init__(allowed_msgpack_modules=allowed or None)
        self._proven: frozenset[type] = _PLAIN

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        """
        Serialize.

        Raises:
            TypeNotAllowedError: It could not be read again.
        """
        typed = super().dumps_typed(obj)
        if new := _types(obj) - self._proven:
            self.loads_typed(typed)
            # Some make a class for each value: those are let go of again.
            self._proven = (self._proven if len(self._proven) < _MOST_PROVEN else _PLAIN) | new
        return typed

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """
        Deserialize what `dumps_typed` returned.

        Raises:
            TypeNotAllowedError: It holds a type that is not allowed.
        """
        if data[0] not in _TAGS:
            raise TypeNotAllowedError(
                f"a stored value has the type tag {data[0]!r:.40}: it was pickled, encrypted or"
                " written by another serializer, and was not loaded. Pass serde= the one that wrote"
                " it, if you trust whoever writes to the database."
            )
        blocked: list[tuple[str, str]] = []
        _blocked.types = blocked
        try:
            value = super().loads_typed(data)
        finally:
            _blocked.types = None
        if blocked:
            raise _not_allowed(*blocked[0])
        return value


class LegacySerializer(StrictSerializer):
    """
    Reads what LangGraph's own ``EncryptedSerializer`` wrote, too; writes like `StrictSerializer`.

    That is what ``EncryptedSerializer.from_pycryptodome_aes`` makes: AES in the mode EAX. It is
    not bound to its place. A thread of it is one in the clear, as far as `keyring=` goes:
    ``seal_existing()`` seals it anew. Needs ``pip install "langgraph-vat[eax]"``.

    Args:
        key: 16, 24 or 32 bytes; those of ``LANGGRAPH_AES_KEY`` if None.
        allow: As of `StrictSerializer`.

    Raises:
        ConfigurationError: There is no such key, or the extra is not installed.
    """

    def __init__(
        self, key: bytes | None = None, *, allow: Iterable[type | tuple[str, str]] = ()
    ) -> None:
        super().__init__(allow)
        self._eax = _Eax(os.environ.get(_EAX_VARIABLE, "").encode() if key is None else key)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """
        Decrypt, if it is encrypted, and deserialize.

        Raises:
            SealError: It was changed, or encrypted by another key.
            TypeNotAllowedError: It holds a type that is not allowed.
        """
        return super().loads_typed(self.decrypted(*data) if self.is_encrypted(data[0]) else data)

    @staticmethod
    def is_encrypted(type_: str) -> bool:
        """Whether a type tag is that of what LangGraph's serializer encrypted."""
        return type_.split("+")[1:2] == [_EAX_NAME]

    def decrypted(self, type_: str, data: bytes) -> tuple[str, bytes]:
        """
        Return what was encrypted, as the serializer before it left it.

        Raises:
            SealError: It was changed, or encrypted by another key.
        """
        return type_.removesuffix(f"+{_EAX_NAME}"), self._eax.decrypt(data)


class _Eax:
    """A key of AES in the mode EAX. A message is a nonce, a tag and the ciphertext."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if not isinstance(key, bytes) or len(key) not in _EAX_KEY_BYTES:
            msg = f"key, or {_EAX_VARIABLE}, must be 16, 24 or 32 bytes"
            raise ConfigurationError(msg)
        if importlib.util.find_spec("Crypto") is None:
            raise ConfigurationError('this needs pip install "langgraph-vat[eax]"')
        self._key = key

    def decrypt(self, message: bytes) -> bytes:
        from Crypto.Cipher import AES

        nonce, tag, ciphertext = message[:16], message[16:32], message[32:]
        try:
            cipher = AES.new(self._key, AES.MODE_EAX, nonce=nonce)
            return cipher.decrypt_and_verify(ciphertext, tag)
        except ValueError:
            raise SealError(
                "a value that LangGraph's EncryptedSerializer wrote could not be decrypted: it was"
                " changed, or the key is another one. It was not used."
            ) from None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a LegacySerializer holds a secret and cannot be pickled")


_EAX_NAME = "aes"
_EAX_VARIABLE = "LANGGRAPH_AES_KEY"
_EAX_KEY_BYTES = (16, 24, 32)


def _types(obj: Any) -> set[type]:
    """Return the type of a value, and of what stands directly in it."""
    kind = type(obj)
    if kind is list or kind is tuple:
        return {kind, *map(type, obj)}
    if kind is dict:
        return {kind, *map(type, obj.values())}
    return {kind}


# What LangGraph refuses it tells its listeners, and returns the raw data in its place.
_blocked = threading.local()


def _note_blocked(event: SerdeEvent) -> None:
    types = getattr(_blocked, "types", None)
    if types is not None and event["kind"] in ("msgpack_blocked", "msgpack_method_blocked"):
        types.append((event["module"], event["name"]))


register_serde_event_listener(_note_blocked)


def _not_allowed(module: str, name: str) -> TypeNotAllowedError:
    return TypeNotAllowedError(
        f"type {name!r:.100} of module {module!r:.100} is not among those that may be made from"
        " stored values, so it was neither written nor read. If it is yours, pass"
        f" serde=StrictSerializer(allow=[({module!r:.100}, {name!r:.100})]), or the class itself."
    )


class EncryptedSerializer(SerializerProtocol):
    """
    Seals what another serializer returns, with the keyring's cipher.

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
