"""
Blind indexes: sealed rows are found by a value that nobody can read there.

Beside the row stands a keyed hash of the value, its token. Equal values of a field
have equal tokens, so a filter for equality is one for a token. Whoever has the database
and not the key learns which rows have the same value, and how often; not which.

A token is the first 16 bytes, as hexadecimal digits, of HMAC-SHA-256 (RFC 2104) over the
canonical encoding of ``blind index``, where the field belongs, its name, the kind of the
value and the value; docs/sealed-format.md has the details. Who finds a row by its token
compares the opened value: tokens are not authenticated.
"""

import hmac
import os
import struct
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, Self

from langgraph_vat._seal.associated_data import associated_data
from langgraph_vat.errors import SealError
from langgraph_vat.keyring import KeyWrapper

BLIND = "vat_blind"
"""The field of the readable part that holds the tokens of a sealed row, by their fields."""

Tokens = dict[str, str | None]

_KEY_BYTES = 32
_TOKEN_BYTES = 16


class IndexKey:
    """
    The key of the tokens of one database. Cannot be printed, copied or pickled.

    It is never replaced: with another one nothing would be found by the old tokens.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != _KEY_BYTES:
            raise SealError(
                "the key of the blind indexes is damaged; nothing was written. Restore it."
            )
        self._secret = secret

    @classmethod
    def generate(cls) -> Self:
        """Return a new random key."""
        return cls(os.urandom(_KEY_BYTES))

    def wrap(self, keyring: KeyWrapper, *, associated_data: bytes) -> bytes:
        """Return it encrypted under the keyring's primary key, bound to `associated_data`."""
        return keyring.wrap(self._secret, associated_data=associated_data)

    @classmethod
    def unwrap(cls, wrapped: bytes, keyring: KeyWrapper, *, associated_data: bytes) -> Self:
        """
        Return the key that `wrap` encrypted.

        Raises:
            UnknownKeyError: The keyring lacks the key that wrapped it.
            SealError: It was changed, or belongs elsewhere.
        """
        return cls(keyring.unwrap(wrapped, associated_data=associated_data))

    def token(self, value: Any, *where: str) -> str | None:
        """Return the token of a value; None if it is of a kind that has none."""
        canonical = _canonical(value)
        if canonical is None:
            return None
        message = associated_data("blind index", *where, *canonical)
        return hmac.digest(self._secret, message, "sha256")[:_TOKEN_BYTES].hex()

    def tokens(self, values: Mapping[str, Any], fields: Collection[str], *where: str) -> Tokens:
        """
        Return the tokens of a row.

        None stands for what is equal to no value that has a token: for nothing, lists and
        objects. A field whose value may equal another one of another type, as that of an
        enum does, is left out: its row must be opened to be compared.
        """
        found: Tokens = {}
        for field in fields:
            value = values.get(field)
            token = self.token(value, *where, field)
            if token is not None or type(value) in _UNEQUAL:
                found[field] = token
        return found

    def derived(self, *purpose: str | bytes) -> bytes:
        """Return a key of 32 bytes for another purpose, from which this one cannot be told."""
        return hmac.digest(self._secret, associated_data("derived key", *purpose), "sha256")

    def __repr__(self) -> str:
        return "IndexKey()"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an IndexKey holds a secret and cannot be copied or pickled")


_UNEQUAL = (type(None), list, tuple, dict)


def _canonical(value: Any) -> tuple[str, str] | None:
    """
    Return kind and text of a value, the same for all that Python takes for equal.

    Of these very types: what is derived from them may have an equality of its own.
    """
    kind = type(value)
    if kind is str:
        return "string", value
    if kind is int or kind is bool:
        return "integer", f"{value:x}"
    if kind is float:
        if value.is_integer():
            return "integer", f"{int(value):x}"
        return "float", struct.pack(">d", value).hex()
    return None
