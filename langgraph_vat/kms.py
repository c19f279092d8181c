"""
Keys that wrap keys, kept somewhere else: by a process behind a socket, or by AWS KMS.

``python -m langgraph_vat.kms --keys FILE --socket PATH`` keeps a keyring, and wraps and
unwraps data keys for whoever may open the socket, which is its owner alone. A worker
that uses `SocketKeyWrapper` has data keys in its memory, and no key of the keyring.

A request is its length in 4 bytes, big-endian, and that many bytes: 1 for what is
wanted (1 wrap, 2 unwrap, 3 is it current), the length of the associated data in 4
bytes, those, and the secret or what wrapped it. The answer is a length likewise, 1
byte (0 done, 1 refused, 2 key unknown) and the result, or what the error says. One
connection is one request.
"""

import argparse
import hashlib
import os
import signal
import socket
import socketserver
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from langgraph_vat.errors import ConfigurationError, SealError, UnavailableError, UnknownKeyError
from langgraph_vat.keyring import AES, Keyring, KeyWrapper, refuse_cipher

_WRAP, _UNWRAP, _IS_CURRENT = 1, 2, 3
_DONE, _REFUSED, _UNKNOWN = 0, 1, 2
_LENGTH_BYTES = 4
# Associated data name a thread, of which an id may have some kilobytes.
_MOST_BYTES = 2**20
_WAIT_S = 10.0


class SocketKeyWrapper:
    """
    Wraps by a key server: `python -m langgraph_vat.kms`.

    What it wraps has the form that the server's keyring gives it, so workers with that
    keyring open it, too. Safe in any thread, and after a fork.

    Args:
        path: Of the server's socket.
        timeout_s: Seconds to wait for an answer.
        cipher: See `Keyring.with_cipher`.

    Raises:
        ConfigurationError: There is no such cipher.
    """

    def __init__(self, path: str | Path, *, timeout_s: float = 5.0, cipher: str = AES) -> None:
        refuse_cipher(cipher)
        self.cipher = cipher
        self._path = str(path)
        self._timeout_s = timeout_s

    def wrap(self, plaintext: bytes, *, associated_data: bytes) -> bytes:
        """Return a secret encrypted under the primary key of the server's keyring."""
        return self._ask(_WRAP, plaintext, associated_data)

    def unwrap(self, wrapped: bytes, *, associated_data: bytes) -> bytes:
        """Return the secret that was wrapped by a key of the server's keyring."""
        return self._ask(_UNWRAP, bytes(wrapped), associated_data)

    def is_current(self, wrapped: bytes) -> bool:
        """Whether the server's primary key wrapped this."""
        return self._ask(_IS_CURRENT, bytes(wrapped), b"") == b"\1"

    def _ask(self, what: int, payload: bytes, associated_data: bytes) -> bytes:
        request = bytes([what]) + len(associated_data).to_bytes(4) + associated_data + payload
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(self._timeout_s)
                connection.connect(self._path)
                _send(connection, request)
                answer = _receive(connection)
        except OSError as error:
            raise UnavailableError(
                f"the key server at {self._path} does not answer ({type(error).__name__}). Nothing"
                " was written. Threads whose data key is known here go on; start it for the others"
                " (python -m langgraph_vat.kms), and repeat this."
            ) from None
        if answer[0] == _DONE:
            return answer[1:]
        kind = UnknownKeyError if answer[0] == _UNKNOWN else SealError
        raise kind(answer[1:].decode("ascii", "replace"))

    def __repr__(self) -> str:
        return f"SocketKeyWrapper({self._path!r})"


class AwsKmsKeyWrapper:
    """
    Wraps by a key of AWS KMS (``pip install "langgraph-vat[aws]"``).

    What a wrapped key is bound to goes to KMS as a SHA-256, in its encryption context,
    which CloudTrail logs. A wrapped key is a byte 2, the length of the key's ARN in 2
    bytes, that, and the ciphertext of KMS.

    Args:
        key_id: Id, ARN or alias of a symmetric key.
        client: ``boto3.client("kms")``, with a region and timeouts of yours; one with
            boto3's defaults if None.
        before: Opens what was wrapped before by it, such as a `Keyring`; `rotate` then
            wraps that by the key of KMS.
        cipher: See `Keyring.with_cipher`.

    Raises:
        ConfigurationError: There is no such cipher, or no boto3.
    """

    def __init__(
        self,
        key_id: str,
        *,
        client: Any = None,
        before: KeyWrapper | None = None,
        cipher: str = AES,
    ) -> None:
        refuse_cipher(cipher)
        self.cipher = cipher
        self._key_id = key_id
        self._before = before
        self._client = client if client is not None else _default_client()

    def wrap(self, plaintext: bytes, *, associated_data: bytes) -> bytes:
        """Return a secret encrypted by KMS."""
        made = self._call(
            "encrypt", KeyId=self._key_id, Plaintext=plaintext, **_context(associated_data)
        )
        arn = made["KeyId"].encode()
        return b"".join((b"\2", len(arn).to_bytes(2), arn, made["CiphertextBlob"]))

    def unwrap(self, wrapped: bytes, *, associated_data: bytes) -> bytes:
        """Return the secret that KMS encrypted, or who came before it."""
        wrapped = bytes(wrapped)
        if wrapped[:1] != b"\2" and self._before is not None:
            return self._before.unwrap(wrapped, associated_data=associated_data)
        arn, blob = _divided(wrapped)
        found = self._call("decrypt", KeyId=arn, CiphertextBlob=blob, **_context(associated_data))
        return bytes(found["Plaintext"])

    def is_current(self, wrapped: bytes) -> bool:
        """Whether this very key of KMS wrapped it."""
        wrapped = bytes(wrapped)
        if wrapped[:1] != b"\2":
            return False
        # Of an alias: it may be given to another key.
        arn = self._call("describe_key", KeyId=self._key_id)["KeyMetadata"]["Arn"]
        return bool(_divided(wrapped)[0] == arn)

    def _call(self, method: str, **arguments: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self._client, method)(**arguments)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
        except BotoCoreError as error:
            code = type(error).__name__
        raise _refused(arguments["KeyId"], code)  # outside: its cause may hold what was sent

    def __repr__(self) -> str:
        return f"AwsKmsKeyWrapper({self._key_id!r})"


_CHANGED = frozenset(("InvalidCiphertextException", "IncorrectKeyException"))
_NOT_TO_BE_HAD = frozenset(
    (
        "AccessDeniedException",
        "DisabledException",
        "InvalidKeyUsageException",
        "KMSInvalidStateException",
        "NotFoundException",
    )
)


def _refused(key_id: str, code: str) -> SealError | UnavailableError:
    if code in _CHANGED:
        return SealError(
            "a wrapped key could not be opened by AWS KMS: it was changed, or belongs elsewhere"
        )
    if code in _NOT_TO_BE_HAD:
        return UnknownKeyError(
            f"AWS KMS refuses its key {key_id!r} ({code}). Nothing was changed. Enable it, or allow"
            " this role kms:Encrypt, kms:Decrypt and kms:DescribeKey."
        )
    return UnavailableError(
        f"AWS KMS does not answer for key {key_id!r} ({code}). Nothing was written; repeat it."
        " Threads whose data key is known here go on."
    )


def _divided(wrapped: bytes) -> tuple[str, bytes]:
    """Return the ARN of the key that wrapped, and the ciphertext."""
    end = 3 + int.from_bytes(wrapped[1:3])
    if wrapped[:1] != b"\2" or len(wrapped) <= end:
        raise SealError("a wrapped key is none of AWS KMS: it was changed, or belongs elsewhere")
    return wrapped[3:end].decode("ascii", "replace"), wrapped[end:]


def _context(associated_data: bytes) -> dict[str, Any]:
    return {"EncryptionContext": {"langgraph-vat": hashlib.sha256(associated_data).hexdigest()}}


def _default_client() -> Any:
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ConfigurationError(
            'AwsKmsKeyWrapper needs boto3: pip install "langgraph-vat[aws]"'
        ) from None
    try:
        return boto3.client("kms")
    except BotoCoreError as error:
        msg = f"boto3 makes no client of KMS ({type(error).__name__}); pass client="
        raise ConfigurationError(msg) from error


# --- the key server ------------------------------------------------------------


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(len(message).to_bytes(_LENGTH_BYTES) + message)


def _receive(connection: socket.socket) -> bytes:
    """Return one message; `OSError` where there is none, or it is too long to be one."""
    length = int.from_bytes(_exactly(connection, _LENGTH_BYTES))
    if not 1 <= length <= _MOST_BYTES:
        raise ConnectionError("no message")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(length - len(parts), 2**16))
        if not part:
            raise ConnectionError("ended")
        parts += part
    return bytes(parts)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, keyring: Keyring) -> None:
        self.keyring = keyring
        mask = os.umask(0o177)  # from its first moment on its owner's alone
        try:
            super().__init__(path, _Handler)
        finally:
            os.umask(mask)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: who sends no request gets no answer, and a secret may be near."""


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        with suppress(OSError):
            self.request.settimeout(_WAIT_S)
            _send(self.request, _answer(self.server.keyring, _receive(self.request)))


def _answer(keyring: Keyring, request: bytes) -> bytes:
    end = 5 + int.from_bytes(request[1:5])
    bound, payload = request[5:end], request[end:]
    try:
        if request[0] == _WRAP and end <= len(request):
            done = keyring.wrap(payload, associated_data=bound)
        elif request[0] == _UNWRAP and end <= len(request):
            done = keyring.unwrap(payload, associated_data=bound)
        elif request[0] == _IS_CURRENT and end <= len(request):
            done = bytes([keyring.is_current(payload)])
        else:
            return bytes([_REFUSED]) + b"no such request"
    except UnknownKeyError as error:
        return bytes([_UNKNOWN]) + str(error).encode()
    except SealError as error:
        return bytes([_REFUSED]) + str(error).encode()
    return bytes([_DONE]) + done


def serve(keys: str | Path, path: str | Path) -> NoReturn:
    """
    Keep a keyring, and wrap and unwrap at a socket until the process is ended.

    Raises:
        ConfigurationError: The keys cannot be used, or the socket cannot be made; another
            server has it, perhaps.
    """
    keyring = Keyring.from_file(keys)
    _remove_stale(str(path))
    try:
        server = _Server(str(path), keyring)
    except OSError as error:
        msg = f"no socket can be made at {path} ({type(error).__name__}: {error.strerror})"
        raise ConfigurationError(msg) from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.stdout.write(f"{keyring!r} at {path}\n")
    sys.stdout.flush()
    try:
        server.serve_forever()
    finally:
        server.server_close()
        Path(path).unlink(missing_ok=True)
    raise SystemExit(0)


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at: its server was killed."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
        except OSError:
            pass  # somebody else's: it cannot be made there, which is said


def main() -> None:
    """Run the key server."""
    parser = argparse.ArgumentParser(prog="python -m langgraph_vat.kms", description=serve.__doc__)
    parser.add_argument("--keys", required=True, help="file of the keyring, see Keyring.save")
    parser.add_argument("--socket", required=True, help="path of the socket to make")
    given = parser.parse_args()
    try:
        serve(given.keys, given.socket)
    except ConfigurationError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
