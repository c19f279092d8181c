"""Values to (type tag, bytes) and back, bound to where they live if they are sealed."""

import json
from typing import Any, Protocol

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langgraph_vat._seal.associated_data import encoded
from langgraph_vat._seal.data_key import SUFFIXES, DataKey, OtherKeyError, suffix_of
from langgraph_vat.errors import InvalidInputError, SealError


class Codec(Protocol):
    """
    Serializes values for their place, and seals them; `place` tells one value from all others.

    In between a value is serialized and open: what stands there may be packed.
    """

    def dump(self, value: Any, *place: str) -> tuple[str, bytes]:
        """
        Return type tag and bytes of `value` at `place`.

        Raises:
            InvalidInputError: The serializer refuses it.
        """
        ...

    def load(self, type_: str, data: bytes, *place: str) -> Any:
        """
        Return the value of what `dump` returned for the same `place`.

        Raises:
            SealError: It is sealed and does not open here.
        """
        ...

    def seal(self, type_: str, data: bytes, *place: str) -> tuple[str, bytes]:
        """Return what is stored of a value that is serialized already."""
        ...

    def open(self, type_: str, data: bytes, *place: str) -> tuple[str, bytes]:
        """
        Return what `seal` was given for the same `place`.

        Raises:
            SealError: It is sealed and does not open here.
        """
        ...

    def parse(self, type_: str, data: bytes) -> Any:
        """Return the value of what is open, and not packed."""
        ...


class PlainCodec:
    """The serializer alone; a place means nothing to it."""

    def __init__(self, serde: SerializerProtocol) -> None:
        self._serde = serde

    def dump(self, value: Any, *_place: str) -> tuple[str, bytes]:
        """Serialize."""
        return _dump(self._serde, value)

    def load(self, type_: str, data: bytes, *place: str) -> Any:
        """Deserialize."""
        return self.parse(*self.open(type_, data, *place))

    def seal(self, type_: str, data: bytes, *_place: str) -> tuple[str, bytes]:
        """Leave as it is."""
        return type_, data

    def open(self, type_: str, data: bytes, *_place: str) -> tuple[str, bytes]:
        """Refuse what is sealed."""
        if is_sealed(type_):
            raise OtherKeyError(
                "this data is sealed, and no keyring was given or its data key was taken away. It"
                " was not used. Pass keyring=, or restore it from a backup."
            )
        return type_, data

    def parse(self, type_: str, data: bytes) -> Any:
        """Deserialize."""
        return self._serde.loads_typed((type_, data))


class SealedCodec:
    """
    Seals what the serializer returns under a data key.

    The associated data are `base`, the place and the type tag: a value that
    was moved, relabelled, or replaced by plaintext is refused.
    """

    def __init__(self, serde: SerializerProtocol, data_key: DataKey, *base: str) -> None:
        self._serde = serde
        self._data_key = data_key
        self._parts = len(base) + 1  # and the type
        self._base = encoded(*base)

    def dump(self, value: Any, *place: str) -> tuple[str, bytes]:
        """Serialize and seal."""
        return self.seal(*_dump(self._serde, value), *place)

    def load(self, type_: str, data: bytes, *place: str) -> Any:
        """Open and deserialize; nothing is parsed before it is authenticated."""
        return self.parse(*self.open(type_, data, *place))

    def seal(self, type_: str, data: bytes, *place: str) -> tuple[str, bytes]:
        """Encrypt."""
        sealed = self._data_key.seal(data, associated_data=self._bound(place, type_))
        return type_ + self._data_key.suffix, sealed

    def open(self, type_: str, data: bytes, *place: str) -> tuple[str, bytes]:
        """Authenticate and decrypt."""
        header, suffix = self._data_key.header, self._data_key.suffix
        # What this very key sealed, as nearly all is, says so by its first bytes.
        is_own = type_ and data and data[: len(header)] == header and type_.endswith(suffix)
        inner = type_.removesuffix(suffix) if is_own else opened_type(type_, data)
        return inner, self._data_key.open(data, associated_data=self._bound(place, inner))

    def _bound(self, place: tuple[str, ...], type_: str) -> bytes:
        number = self._parts + len(place)
        return b"".join((number.to_bytes(4), self._base, encoded(*place, type_)))

    def parse(self, type_: str, data: bytes) -> Any:
        """Deserialize."""
        return self._serde.loads_typed((type_, data))


def _dump(serde: SerializerProtocol, value: Any) -> tuple[str, bytes]:
    has_json = isinstance(serde, JsonPlusSerializer)
    try:
        type_, data = serde.dumps_typed(value)
    except InvalidInputError:
        raise
    except Exception as error:
        if has_json and (as_json := _dump_json(value)):
            return as_json
        raise InvalidInputError(
            f"a value of type {type(value).__name__} cannot be serialized ({type(error).__name__});"
            " nothing was written. Keep it out of the state, or pass a serde= that can."
        ) from error
    if has_json and type_ == "msgpack" and b"?" in data and _has_surrogates(value):
        return _dump_json(value) or (type_, data)
    return type_, data


def _has_surrogates(value: Any) -> bool:
    """Whether a JSON value has some: JsonPlusSerializer writes "?" for them, in messages, too."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (TypeError, ValueError, RecursionError):
        pass  # not JSON
    return False


def _dump_json(value: Any) -> tuple[str, bytes] | None:
    """
    Return what gives a JSON value back equal; None for any other value.

    JsonPlusSerializer's older form, which it still reads, can hold what msgpack cannot: lone
    surrogates, and integers of more than 64 bits; not a dict with a key "lc", for which it looks
    there to make an object of it.
    """
    try:
        text = json.dumps(value)
        is_equal = '"lc"' not in text and json.loads(text) == value
    except (TypeError, ValueError, RecursionError):
        return None
    return ("json", text.encode()) if is_equal else None


def is_sealed(type_: str) -> bool:
    """Whether a type tag is that of something sealed."""
    return type_.endswith(SUFFIXES)


def refuse_unsealed(type_: str | None) -> None:
    """
    Refuse what has no seal by its type tag.

    Raises:
        SealError: It has none.
    """
    if not is_sealed(type_ or ""):
        raise SealError(
            "data that must be sealed is not. It was not used: whoever writes to the database may"
            " have put it there. Restore it, or copy old unsealed data with an unsealed saver."
        )


def opened_type(type_: str, sealed: bytes | memoryview | None) -> str:
    """
    Return the type tag below the seal.

    Raises:
        SealError: There is no seal, or the message has another.
    """
    refuse_unsealed(type_)
    suffix = suffix_of(sealed)
    if not suffix or not type_.endswith(suffix):
        raise SealError(
            "sealed data is labelled as what it is not. It was not used: it was changed. Restore it"
            " from a backup."
        )
    return type_.removesuffix(suffix)
