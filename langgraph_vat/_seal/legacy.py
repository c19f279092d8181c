"""Values that LangGraph's own ``EncryptedSerializer`` encrypted: they are read, never written."""

import importlib.util
import os
from collections.abc import Iterable
from typing import Any, NoReturn

from langgraph_vat._seal.strict import StrictSerializer
from langgraph_vat.errors import ConfigurationError, SealError

_NAME = "aes"
_VARIABLE = "LANGGRAPH_AES_KEY"
_KEY_BYTES = (16, 24, 32)
# A message is a nonce, a tag and the ciphertext.
_NONCE_BYTES = 16
_TAG_BYTES = 16


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
        self._eax = _Eax(os.environ.get(_VARIABLE, "").encode() if key is None else key)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """
        Decrypt, if it is encrypted, and deserialize.

        Raises:
            SealError: It was changed, or encrypted by another key.
            TypeNotAllowedError: It holds a type that is not allowed.
            UnreadableError: It is damaged, or of a class that is not there any more.
        """
        return super().loads_typed(self.decrypted(*data) if self.is_encrypted(data[0]) else data)

    @staticmethod
    def is_encrypted(type_: str) -> bool:
        """Whether a type tag is that of what LangGraph's serializer encrypted."""
        return type_.split("+")[1:] == [_NAME]

    def decrypted(self, type_: str, data: bytes) -> tuple[str, bytes]:
        """
        Return what was encrypted, as the serializer before it left it.

        Raises:
            SealError: It was changed, or encrypted by another key.
        """
        return type_.removesuffix(f"+{_NAME}"), self._eax.decrypt(data)


class _Eax:
    """A key of AES in the mode EAX, which is not printed, copied or pickled."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if not isinstance(key, bytes) or len(key) not in _KEY_BYTES:
            msg = f"key, or {_VARIABLE}, must be 16, 24 or 32 bytes"
            raise ConfigurationError(msg)
        if importlib.util.find_spec("Crypto") is None:
            raise ConfigurationError('this needs pip install "langgraph-vat[eax]"')
        self._key = key

    def decrypt(self, message: bytes) -> bytes:
        from Crypto.Cipher import AES

        try:
            nonce, rest = message[:_NONCE_BYTES], message[_NONCE_BYTES:]
            tag, ciphertext = rest[:_TAG_BYTES], rest[_TAG_BYTES:]
            cipher = AES.new(self._key, AES.MODE_EAX, nonce=nonce)
            plain: bytes = cipher.decrypt_and_verify(ciphertext, tag)
        except (ValueError, TypeError):  # it is too short, or is not there
            raise SealError(
                "a value that LangGraph's EncryptedSerializer wrote could not be decrypted: it was"
                " changed, or the key is another one. It was not used."
            ) from None
        return plain

    def __reduce__(self) -> NoReturn:
        raise TypeError("a LegacySerializer holds a secret and cannot be pickled")

    __getstate__ = __reduce__
