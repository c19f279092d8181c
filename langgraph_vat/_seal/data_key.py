"""
Data keys: what actually encrypts. One for each thread, and each root of a store.

A sealed message, version 1:

======  ==============================================
bytes   meaning
======  ==============================================
1       version of this format: 1
1       algorithm: 1 is AES-256-GCM, 2 ChaCha20-Poly1305
8       id of the data key, not secret: when it was made (Unix
        seconds, 4 bytes), and 4 random bytes
12      nonce, random for each message
rest    ciphertext, the last 16 bytes its tag
======  ==============================================

The header before the nonce is authenticated together with the associated
data. With random nonces a key may seal 2**32 messages (NIST SP 800-38D,
8.3); a thread does not come near that.

A data key is of one algorithm for ever. It may have older ones behind it: it seals, and
all of them open. They are wrapped together, the newest first.
"""

import os
import time
from collections.abc import Sequence
from typing import NoReturn, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from langgraph_vat.errors import SealError
from langgraph_vat.keyring import AES, CHACHA, KeyWrapper

_VERSION = b"\x01"
_ALGORITHMS = {AES: b"\x01", CHACHA: b"\x02"}
_CIPHERS: dict[bytes, type[AESGCM | ChaCha20Poly1305]] = {
    b"\x01": AESGCM,
    b"\x02": ChaCha20Poly1305,
}
# How the type tag of what they sealed ends.
_SUFFIXES = {number: f"+{name}" for name, number in _ALGORITHMS.items()}
SUFFIXES = tuple(_SUFFIXES.values())
_ALGORITHM_BYTES = 1
_ID_BYTES = 8
_TIME_BYTES = 4
_KEY_BYTES = 32
_NONCE_BYTES = 12
_HEADER_BYTES = len(_VERSION) + _ALGORITHM_BYTES + _ID_BYTES
_NONCE_END = _HEADER_BYTES + _NONCE_BYTES
_TAG_BYTES = 16
# Where in a secret the key begins.
_KEY_AT = _ALGORITHM_BYTES + _ID_BYTES

_REFUSED = (
    "sealed data could not be opened: it was changed, moved or truncated, or sealed with another"
    " key. It was not used. Restore it from a backup, or check which keyring wrote it."
)


class OtherKeyError(SealError):
    """It was sealed under another data key: a newer one, perhaps, that is to be read first."""


class DataKey:
    """
    A key of AES-256-GCM or ChaCha20-Poly1305, and those that it replaced.

    Cannot be printed, copied or pickled; can be wrapped by a keyring.
    """

    __slots__ = ("_cipher", "_ciphers", "_secrets", "header", "suffix")

    def __init__(self, secrets: Sequence[bytes]) -> None:
        # Algorithm, id and key each, the newest first.
        self._secrets = tuple(secrets)
        # Made once: setting up a cipher costs more than sealing a small value.
        self._ciphers = {_VERSION + one[:_KEY_AT]: _cipher(one) for one in secrets}
        self.header = next(iter(self._ciphers))
        """What the messages begin with that it seals."""
        self.suffix = suffix_of(self.header)
        """What their type tags end with."""
        self._cipher = self._ciphers[self.header]

    @classmethod
    def generate(cls, cipher: str = AES) -> Self:
        """Return a new random key of a cipher that `Keyring.with_cipher` knows."""
        return cls([_secret(cipher)])

    @classmethod
    def derived(cls, key_id: bytes, secret: bytes, cipher: str = AES) -> Self:
        """Return the key of 32 bytes that whoever has them, and its id of 8, can make again."""
        if len(key_id) != _ID_BYTES or len(secret) != _KEY_BYTES:
            raise SealError(_REFUSED)
        return cls([_ALGORITHMS[cipher] + key_id + secret])

    @property
    def made_at(self) -> int:
        """When it was made, in Unix seconds; what it replaced was replaced then."""
        return int.from_bytes(self._secrets[0][_ALGORITHM_BYTES:][:_TIME_BYTES])

    @property
    def has_older(self) -> bool:
        """Whether it still opens what those sealed that it replaced."""
        return len(self._secrets) > 1

    def renewed(self, cipher: str = AES) -> "DataKey":
        """Return a new key that has this one, and those behind it, behind itself."""
        return DataKey([_secret(cipher), *self._secrets])

    def alone(self) -> "DataKey":
        """Return this key without those that it replaced."""
        return DataKey(self._secrets[:1])

    def can_open(self, sealed: bytes | None) -> bool:
        """Whether a message was sealed by this key or one behind it, if it was not changed."""
        return bytes((sealed or b"")[:_HEADER_BYTES]) in self._ciphers

    def wrap(self, keyring: KeyWrapper, *, associated_data: bytes) -> bytes:
        """Return it encrypted under the keyring's primary key, bound to `associated_data`."""
        return keyring.wrap(_joined(self._secrets), associated_data=associated_data)

    @classmethod
    def unwrap(cls, wrapped: bytes, keyring: KeyWrapper, *, associated_data: bytes) -> Self:
        """
        Return the key that `wrap` encrypted.

        Raises:
            UnknownKeyError: The keyring lacks the key that wrapped it.
            SealError: It was changed, or belongs elsewhere.
        """
        return cls(_divided(keyring.unwrap(wrapped, associated_data=associated_data)))

    def seal(self, plaintext: bytes, *, associated_data: bytes) -> bytes:
        """Return `plaintext` encrypted and authenticated together with `associated_data`."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, plaintext, self.header + associated_data)
        return b"".join((self.header, nonce, sealed))

    def open(self, sealed: bytes | memoryview, *, associated_data: bytes) -> bytes:
        """
        Return the plaintext of what `seal` returned for the same `associated_data`.

        Raises:
            SealError: Anything differs, by as much as a bit.
        """
        # What whoever writes to the database set to NULL is refused like all else.
        view = memoryview(sealed or b"")
        if len(view) < _NONCE_END + _TAG_BYTES:
            raise SealError(_REFUSED)
        header = bytes(view[:_HEADER_BYTES])
        cipher = self._ciphers.get(header)
        if cipher is None:
            raise OtherKeyError(_REFUSED)
        nonce, body = view[_HEADER_BYTES:_NONCE_END], view[_NONCE_END:]
        try:
            return cipher.decrypt(nonce, body, header + associated_data)
        except InvalidTag:
            raise SealError(_REFUSED) from None

    def __repr__(self) -> str:
        return f"DataKey(id={self.header[2:].hex()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a DataKey holds a secret and cannot be copied or pickled; wrap it instead")

    __getstate__ = __reduce__


def suffix_of(sealed: bytes | memoryview | None) -> str:
    """Return what the type tag of a sealed message must end with; nothing if it is none."""
    return _SUFFIXES.get(bytes((sealed or b"")[len(_VERSION) :][:_ALGORITHM_BYTES]), "")


def _secret(cipher: str) -> bytes:
    """Return algorithm, a new id and a new key."""
    made_at = int(time.time()).to_bytes(_TIME_BYTES)
    key_id = made_at + os.urandom(_ID_BYTES - _TIME_BYTES)
    return _ALGORITHMS[cipher] + key_id + os.urandom(_KEY_BYTES)


def _cipher(secret: bytes) -> AESGCM | ChaCha20Poly1305:
    return _CIPHERS[secret[:_ALGORITHM_BYTES]](secret[_KEY_AT:])


# As they are wrapped: ids and keys of AES alone, without an algorithm, so that a version
# which knows no other reads them; else a 2, and of each the algorithm in 2 bytes, id and
# key. The length of the one is even, of the other odd.
_MIXED = b"\x02"


def _joined(secrets: Sequence[bytes]) -> bytes:
    if all(one.startswith(_ALGORITHMS[AES]) for one in secrets):
        return b"".join(one[_ALGORITHM_BYTES:] for one in secrets)
    return _MIXED + b"".join(b"\0" + one for one in secrets)


def _divided(opened: bytes) -> list[bytes]:
    is_mixed = opened[:1] == _MIXED and len(opened) % 2 == 1
    prefix, size = (b"", _KEY_AT + _KEY_BYTES + 1) if is_mixed else (_ALGORITHMS[AES], 40)
    records = opened[1:] if is_mixed else opened
    if not records or len(records) % size:
        raise SealError(_REFUSED)
    found = [prefix + records[at : at + size] for at in range(0, len(records), size)]
    if not is_mixed:
        return found
    if any(one[:1] != b"\0" or one[1:2] not in _CIPHERS for one in found):
        raise SealError(_REFUSED)
    return [one[1:] for one in found]
