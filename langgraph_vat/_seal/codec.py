"""Values to (type tag, bytes) and back, bound to where they live if they are sealed."""

from typing import Any, Protocol

from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_vat._seal.associated_data import associated_data
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.errors import SealError

SUFFIX = "+aes256gcm"


class Codec(Protocol):
    """Serializes values for their place; `place` is what tells one value from all others."""

    def dump(self, value: Any, *place: str) -> tuple[str, bytes]:
        """Return type tag and bytes of `value` at `place`."""
        ...

    def load(self, type_: str, data: bytes, *place: str) -> Any:
        """
        Return the value of what `dump` returned for the same `place`.

        Raises:
            SealError: It is sealed and does not open here.
        """
        ...


class PlainCodec:
    """The serializer alone; a place means nothing to it."""

    def __init__(self, serde: SerializerProtocol) -> None:
        self._serde = serde

    def dump(self, value: Any, *_place: str) -> tuple[str, bytes]:
        """Serialize."""
        return self._serde.dumps_typed(value)

    def load(self, type_: str, data: bytes, *_place: str) -> Any:
        """Deserialize."""
        if type_.endswith(SUFFIX):
            raise SealError("this data is sealed and no keyring was given; pass keyring=")
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
        self._base = base

    def dump(self, value: Any, *place: str) -> tuple[str, bytes]:
        """Serialize and seal."""
        type_, data = self._serde.dumps_typed(value)
        bound = associated_data(*self._base, *place, type_)
        return type_ + SUFFIX, self._data_key.seal(data, associated_data=bound)

    def load(self, type_: str, data: bytes, *place: str) -> Any:
        """Open and deserialize; nothing is parsed before it is authenticated."""
        inner = opened_type(type_)
        bound = associated_data(*self._base, *place, inner)
        return self._serde.loads_typed((inner, self._data_key.open(data, associated_data=bound)))


def opened_type(type_: str) -> str:
    """
    Return the type tag below the seal.

    Raises:
        SealError: There is no seal.
    """
    if not (type_ or "").endswith(SUFFIX):
        raise SealError(
            "data that must be sealed is not. It was not used: whoever writes to the database may"
            " have put it there. Restore it, or copy old unsealed data with an unsealed saver."
        )
    return type_.removesuffix(SUFFIX)
