"""
Data keys: what actually encrypts. One for each thread, and each root of a store.

A sealed message, version 1:

======  ==============================================
bytes   meaning
======  ==============================================
1       version of this format: 1
1       algorithm: 1 is AES-256-GCM
8       id of the data key, random, not secret
12      nonce, random for each message
rest    ciphertext, the last 16 bytes its tag
======  ==============================================

The header before the nonce is authenticated together with the associated
data. With random nonces a key may seal 2**32 messages (NIST SP 800-38D,
8.3); a thread does not come near that.
"""

import os
from typing import NoReturn, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from langgraph_vat.errors import SealError
from langgraph_vat.keyring import Keyring

_VERSION_AND_ALGORITHM = b"\x01\x01"
_ID_BYTES = 8
_KEY_BYTES = 32
_NONCE_BYTES = 12
_HEADER_BYTES = len(_VERSION_AND_ALGORITHM) + _ID_BYTES
_NONCE_END = _HEADER_BYTES + _NONCE_BYTES
_TAG_BYTES = 16

_REFUSED = (
    "sealed data could not be opened: it was changed, moved or truncated, or sealed with another"
    " key. It was not used. Restore it from a backup, or check which keyring wrote it."
)


class DataKey:
    """One AES-256-GCM key. Cannot be printed, copied or pickled; can be wrapped by a keyring."""

    __slots__ = ("_cipher", "_header", "_secret")

    def __init__(self, key_id: bytes, secret: bytes) -> None:
        self._header = _VERSION_AND_ALGORITHM + key_id
        self._secret = secret
        # Made once: setting up a cipher costs more than sealing a small value.
        self._cipher = AESGCM(secret)

    @classmethod
    def generate(cls) -> Self:
        """Return a new random key."""
        return cls(os.urandom(_ID_BYTES), AESGCM.generate_key(bit_length=256))

    def wrap(self, keyring: Keyring, *, associated_data: bytes) -> bytes:
        """Return this key encrypted under the keyring's primary key, bound to `associated_data`."""
        return keyring.wrap(self._header[2:] + self._secret, associated_data=associated_data)

    @classmethod
    def unwrap(cls, wrapped: bytes, keyring: Keyring, *, associated_data: bytes) -> Self:
        """
        Return the key that `wrap` encrypted.

        Raises:
            UnknownKeyError: The keyring lacks the key that wrapped it.
            SealError: It was changed, or belongs elsewhere.
        """
        opened = keyring.unwrap(wrapped, associated_data=associated_data)
        if len(opened) != _ID_BYTES + _KEY_BYTES:
            raise SealError(_REFUSED)
        return cls(opened[:_ID_BYTES], opened[_ID_BYTES:])

    def seal(self, plaintext: bytes, *, associated_data: bytes) -> bytes:
        """Return `plaintext` encrypted and authenticated together with `associated_data`."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, plaintext, self._header + associated_data)
        return b"".join((self._header, nonce, sealed))

    def open(self, sealed: bytes | memoryview, *, associated_data: bytes) -> bytes:
        """
        Return the plaintext of what `seal` returned for the same `associated_data`.

        Raises:
            SealError: Anything differs, by as much as a bit.
        """
        # What whoever writes to the database set to NULL is refused like all else.
        view = memoryview(sealed or b"")
        if len(view) < _NONCE_END + _TAG_BYTES or view[:_HEADER_BYTES] != self._header:
            raise SealError(_REFUSED)
        nonce, body = view[_HEADER_BYTES:_NONCE_END], view[_NONCE_END:]
        try:
            return self._cipher.decrypt(nonce, body, self._header + associated_data)
        except InvalidTag:
            raise SealError(_REFUSED) from None

    def __repr__(self) -> str:
        return f"DataKey(id={self._header[2:].hex()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a DataKey holds a secret and cannot be copied or pickled; wrap it instead")
