"""
Keys that wrap keys. One is primary and wraps; all of them unwrap what they wrapped.

A wrapped secret, version 1:

======  ==============================================
bytes   meaning
======  ==============================================
1       version of this format: 1
1       length of the key id
n       key id, ASCII
12      nonce, random
rest    AES-256-GCM ciphertext, the last 16 bytes its tag
======  ==============================================

All that precedes the nonce is authenticated with the associated data. The key
is found by its id, never by trying.
"""

import base64
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn, Protocol, Self, runtime_checkable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from langgraph_vat.errors import ConfigurationError, SealError, UnknownKeyError

AES, CHACHA = "aes256gcm", "chacha20poly1305"
_KEY_BYTES = 32
_NONCE_BYTES = 12
_PAIR = 2
_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")
_REFUSED = "a wrapped key could not be opened: it was changed, or belongs elsewhere"


@runtime_checkable
class KeyWrapper(Protocol):
    """
    Wraps data keys: a `Keyring` here, or a KMS or HSM somewhere else.

    It is asked once for each data key that a process meets, in a thread of its own
    where an event loop would have to wait; so it must be safe to use from any thread.
    """

    @property
    def cipher(self) -> str:
        """With which values are sealed under new data keys; see `Keyring.with_cipher`."""
        ...

    def wrap(self, plaintext: bytes, *, associated_data: bytes) -> bytes:
        """
        Return a secret encrypted by the key that is current, bound to `associated_data`.

        Raises:
            UnavailableError: It does not answer.
            ConfigurationError: It answers nobody who asks like this: no permission, perhaps.
        """
        ...

    def unwrap(self, wrapped: bytes, *, associated_data: bytes) -> bytes:
        """
        Return the secret that `wrap` encrypted, by this key or an earlier one.

        Raises:
            UnknownKeyError: The key that wrapped it is not to be had.
            SealError: It was changed, or belongs elsewhere.
            UnavailableError: It does not answer.
            ConfigurationError: It answers nobody who asks like this: no permission, perhaps.
        """
        ...

    def is_current(self, wrapped: bytes) -> bool:
        """Whether `wrap` would use the key that this was wrapped by."""
        ...


class Keyring:
    """
    Several 256-bit keys, each with an id; the first is the primary one.

    Their text form is ``id:base64`` for each key, the primary one first,
    separated by commas or white space. To rotate, give every process a new
    key behind the others, then in front of them; wrap anew; then remove the old.

    Cannot be printed, copied or pickled.

    Args:
        keys: Pairs of id (1 to 32 of ``A-Z a-z 0-9 _ -``) and 32 bytes.
        cipher: See `with_cipher`.

    Raises:
        ConfigurationError: There is no key, or one is unusable, or no such cipher.
    """

    __slots__ = ("_ciphers", "_keys", "cipher")

    def __init__(self, keys: Iterable[tuple[str, bytes]], *, cipher: str = AES) -> None:
        self.cipher = cipher
        """With which values are sealed under data keys that are made from now on."""
        self._keys: dict[str, bytes] = {}
        try:
            refuse_cipher(cipher)
            self._keys = _collected(keys)
        except ConfigurationError as error:
            # Tools that report the variables of each frame would report keys.
            del keys
            raise error.with_traceback(None) from None
        self._ciphers = {key_id: AESGCM(key) for key_id, key in self._keys.items()}

    @classmethod
    def generate(cls, key_id: str = "k1") -> Self:
        """Return a keyring with one new random key. Save it, or what it seals is lost with it."""
        return cls([(key_id, AESGCM.generate_key(bit_length=256))])

    @classmethod
    def from_env(cls, variable: str = "LANGGRAPH_VAT_KEYS") -> Self:
        """
        Return the keyring whose text form an environment variable holds.

        Raises:
            ConfigurationError: It is not set, or a key in it is unusable.
        """
        if not os.environ.get(variable):
            state = "empty" if variable in os.environ else "not set"
            raise ConfigurationError(
                f"environment variable {variable} is {state}; give it id:base64 keys"
            )
        try:
            return cls(_parse(os.environ[variable]))
        except ConfigurationError as error:
            # Tools that report the variables of each frame would report keys.
            raise error.with_traceback(None) from None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """
        Return the keyring whose text form a file holds.

        Raises:
            ConfigurationError: It is not there, its group or others may use
                it, or a key in it is unusable. Of a file of root's, who is not
                its reader, the group may read: secrets are mounted so.
        """
        try:
            with Path(path).open("rb") as file:
                _refuse_open_to_others(file.fileno(), path)
                return cls(_parse(file.read().decode("ascii", "replace")))
        except OSError as error:
            raise ConfigurationError(
                f"key file {path} cannot be read: {type(error).__name__}"
            ) from None
        except ConfigurationError as error:
            # Tools that report the variables of each frame would report keys.
            raise error.with_traceback(None) from None

    def save(self, path: str | Path) -> None:
        """
        Write the text form, secrets included, to a new file that only its owner may read.

        Raises:
            ConfigurationError: The file is there already, and was left as it
                is: keys that are overwritten are lost with all they sealed. Or
                it cannot be made.
        """
        try:
            self._write(Path(path))
        except FileExistsError:
            problem = (
                "exists and was not overwritten; save to another path, and remove the old file once"
                " nobody reads it"
            )
        except OSError as error:
            problem = (
                f"cannot be made ({type(error).__name__}: {error.strerror}); the keys were not"
                " saved. Save them to a directory that exists, that you may write to, and that has"
                " room"
            )
        else:
            return
        raise ConfigurationError(f"key file {path} {problem}")

    def _write(self, path: Path) -> None:
        """Make the whole file or none, and have it on disk."""
        descriptor, beside = tempfile.mkstemp(prefix=".keys-", dir=path.parent)  # its owner's alone
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(self.export_secret_text())
                file.flush()
                os.fsync(file.fileno())
            os.link(beside, path)  # a rename would overwrite
        finally:
            Path(beside).unlink()
        try:
            _sync(path.parent)
        except OSError:
            path.unlink()
            raise

    def export_secret_text(self) -> str:
        """Return the text form, secrets included: for a secret store, and for nothing else."""
        return "".join(f"{i}:{base64.b64encode(key).decode()}\n" for i, key in self._keys.items())

    @property
    def primary_id(self) -> str:
        """Id of the key that wraps."""
        return next(iter(self._keys))

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Ids of all keys, the primary one first."""
        return tuple(self._keys)

    def with_key(self, key_id: str, key: bytes | None = None) -> "Keyring":
        """
        Return a keyring with this key, new and random unless given, behind the others.

        Every process must have it before any wraps with it. Save the keyring
        before it is used: a key that was in memory only is gone with the
        process, and with it what it sealed.

        Raises:
            ConfigurationError: It has a key with this id, or the new one is unusable.
        """
        fresh = AESGCM.generate_key(bit_length=256) if key is None else key
        _refuse_unusable(key_id, fresh)  # here: a frame further in has all keys
        if key_id in self._keys:
            raise ConfigurationError(f"the keyring has two keys with the id {key_id!r}")
        return self._with([*self._keys.items(), (key_id, fresh)])

    def with_primary(self, key_id: str) -> "Keyring":
        """
        Return a keyring with this key in front of the others, which it has: see `with_key`.

        Raises:
            ConfigurationError: It does not have it.
        """
        self._refuse_missing(key_id)
        rest = [one for one in self._keys.items() if one[0] != key_id]
        return self._with([(key_id, self._keys[key_id]), *rest])

    def without(self, key_id: str) -> "Keyring":
        """
        Return a keyring that has lost a key.

        Raises:
            ConfigurationError: It does not have it, or no other.
        """
        self._refuse_missing(key_id)
        return self._with(one for one in self._keys.items() if one[0] != key_id)

    def with_cipher(self, cipher: str) -> "Keyring":
        """
        Return a keyring under which values are sealed with another cipher.

        Data keys that are there keep theirs until `reseal` replaces them; data keys
        themselves are always wrapped with AES-256-GCM.

        Args:
            cipher: ``aes256gcm``; or ``chacha20poly1305``, which is the faster one where the
                processor has no instructions for AES.

        Raises:
            ConfigurationError: It is neither.
        """
        return Keyring(self._keys.items(), cipher=cipher)

    def _refuse_missing(self, key_id: str) -> None:
        _refuse_no_id(key_id)
        if key_id not in self._keys:
            raise ConfigurationError(
                f"the keyring has no key {key_id!r}; it has {', '.join(self.key_ids)}."
                " with_key() adds one"
            )

    def _with(self, keys: Iterable[tuple[str, bytes]]) -> "Keyring":
        return Keyring(keys, cipher=self.cipher)

    def wrap(self, plaintext: bytes, *, associated_data: bytes) -> bytes:
        """Return a secret encrypted under the primary key, bound to `associated_data`."""
        key_id = self.primary_id
        header = bytes([1, len(key_id)]) + key_id.encode()
        nonce = os.urandom(_NONCE_BYTES)
        cipher = self._ciphers[key_id]
        return header + nonce + cipher.encrypt(nonce, plaintext, header + associated_data)

    def is_current(self, wrapped: bytes) -> bool:
        """Whether `wrap` would use the key that this was wrapped by."""
        key_id = self.primary_id.encode()
        return bytes(wrapped[: 2 + len(key_id)]) == bytes([1, len(key_id)]) + key_id

    def unwrap(self, wrapped: bytes, *, associated_data: bytes) -> bytes:
        """
        Return the secret that `wrap` encrypted.

        Raises:
            UnknownKeyError: No key has the id it was wrapped under.
            SealError: It was changed, or belongs elsewhere.
        """
        wrapped = bytes(wrapped)
        end = 2 + wrapped[1] if len(wrapped) > 1 else 0
        if wrapped[:1] != b"\x01" or len(wrapped) < end + _NONCE_BYTES:
            raise SealError(_REFUSED)
        header, nonce, body = (
            wrapped[:end],
            wrapped[end : end + _NONCE_BYTES],
            wrapped[end + _NONCE_BYTES :],
        )
        try:
            return self._cipher(header[2:]).decrypt(nonce, body, header + associated_data)
        except InvalidTag:
            key_id = header[2:].decode()
            raise SealError(
                f"a wrapped key could not be opened with key {key_id!r} of the keyring. Nothing was"
                f" changed. Either {key_id!r} is not the key that it was before, or the wrapped key"
                " was changed or belongs elsewhere."
            ) from None

    def _cipher(self, raw_id: bytes) -> AESGCM:
        key_id = raw_id.decode("ascii", "replace")
        if not _ID.fullmatch(key_id):
            raise SealError(_REFUSED)
        if key_id not in self._ciphers:
            raise UnknownKeyError(
                f"the keyring has no key {key_id!r}, under which this data was sealed; it has"
                f" {', '.join(self.key_ids)}. Nothing was changed. Add that key behind the primary."
            )
        return self._ciphers[key_id]

    def __repr__(self) -> str:
        return f"Keyring(primary={next(iter(self._keys), None)!r}, keys={len(self._keys)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Keyring holds secrets and cannot be copied or pickled")

    __getstate__ = __reduce__


def _sync(directory: Path) -> None:
    """Have the names in a directory on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_cipher(cipher: str) -> None:
    """
    Refuse what values are not sealed with.

    Raises:
        ConfigurationError: It is no such cipher.
    """
    if cipher not in (AES, CHACHA):
        raise ConfigurationError(f"cipher must be {AES!r} or {CHACHA!r}")


def _refuse_open_to_others(descriptor: int, path: str | Path) -> None:
    """Refuse a key file as Postgres refuses one of TLS."""
    status = os.fstat(descriptor)
    # Secrets that a container is given are root's; its user reads them by its group.
    is_mounted = status.st_uid == 0 != os.geteuid()
    refused = stat.S_IRWXO | (stat.S_IWGRP | stat.S_IXGRP if is_mounted else stat.S_IRWXG)
    if status.st_mode & refused:
        allowed = "640" if is_mounted else "600"
        raise ConfigurationError(
            f"key file {path} is open to its group or to others; it was not used. Run:"
            f" chmod {allowed} {shlex.quote(str(path))}"
        )


def _collected(keys: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    pairs = list(keys) if isinstance(keys, Iterable) else [keys]
    if not pairs:
        raise ConfigurationError("the keyring is empty; it needs at least one id:base64 key")
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != _PAIR:
            raise ConfigurationError("a keyring is made of pairs: of a key's id, and its 32 bytes")
        key_id, key = pair
        _refuse_unusable(key_id, key)
        if key_id in found:
            raise ConfigurationError(f"the keyring has two keys with the id {key_id!r}")
        found[key_id] = bytes(key)
    return found


def _refuse_no_id(key_id: str) -> None:
    # Not named: it may be a key, in the id's place.
    if not isinstance(key_id, str) or not _ID.fullmatch(key_id):
        raise ConfigurationError("a key id must be 1 to 32 letters, digits, '_' or '-'")


def _refuse_unusable(key_id: str, key: bytes) -> None:
    _refuse_no_id(key_id)
    if not isinstance(key, bytes | bytearray):
        raise ConfigurationError(f"key {key_id!r} is {type(key).__name__} and must be bytes")
    if len(key) != _KEY_BYTES:
        raise ConfigurationError(f"key {key_id!r} has {len(key)} bytes and must have {_KEY_BYTES}")
    if len(set(key)) == 1:
        raise ConfigurationError(f"key {key_id!r} is one byte repeated; generate a random one")


def _parse(text: str) -> list[tuple[str, bytes]]:
    return [_parse_key(item) for item in re.split(r"[,\s]+", text) if item]


def _parse_key(item: str) -> tuple[str, bytes]:
    key_id, separator, encoded = item.partition(":")
    # What is no id is not named either: it may be the key, in the id's place.
    if not separator or not _ID.fullmatch(key_id):
        raise ConfigurationError(
            "a key must be written as id:base64, with an id of 1 to 32 letters, digits, '_' or '-'"
            " and the base64 of 32 bytes"
        )
    key = _decoded(encoded)
    if key is None:
        raise ConfigurationError(f"key {key_id!r} is not valid base64")
    return key_id, key


def _decoded(encoded: str) -> bytes | None:
    # Its error has the text in a frame, and would be the context of ours.
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError:
        return None
