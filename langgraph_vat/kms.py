"""
Keys that wrap keys, kept somewhere else: by a process behind a socket, or by AWS KMS.

``python -m langgraph_vat.kms --keys FILE --socket PATH`` keeps a keyring, and wraps and
unwraps data keys for whoever may open the socket: its owner, and with ``--group`` a
group. A worker that uses `SocketKeyWrapper` has data keys in its memory, and no key of
the keyring; run it as another user than the server's, who cannot read the key file.
"""

import hashlib
import os
import pwd
import re
import socket
import struct
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any, NoReturn

from langgraph_vat._key_server import (
    DONE,
    IS_CURRENT,
    MOST_BYTES,
    UNKNOWN,
    UNWRAP,
    WRAP,
    left,
    main,
    receive,
    refuse_long,
    send,
)
from langgraph_vat.errors import (
    ConfigurationError,
    InvalidInputError,
    SealError,
    UnavailableError,
    UnknownKeyError,
    VatError,
)
from langgraph_vat.keyring import AES, KeyWrapper, refuse_cipher

_PAUSE_S = 0.02


class SocketKeyWrapper:
    """
    Wraps by a key server: `python -m langgraph_vat.kms`.

    What it wraps has the form that the server's keyring gives it, so workers with that
    keyring open it, too. Nothing is sent before it is sure whose process listens. A server
    that is restarted, or busy, is asked again until `timeout_s` is over. Safe in any
    thread, and after a fork.

    Args:
        path: Of the server's socket.
        owner: Id or name of the user that runs the server; this process's own if None.
            Root may, too.
        timeout_s: Seconds for one answer, in all.
        cipher: See `Keyring.with_cipher`.

    Raises:
        ConfigurationError: There is no such cipher, no such user, or the path is too long.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        owner: int | str | None = None,
        timeout_s: float = 5.0,
        cipher: str = AES,
    ) -> None:
        refuse_cipher(cipher)
        self.cipher = cipher
        self._path = str(path)
        refuse_long(self._path)
        self._owner = None if owner is None else _uid(owner)
        self._timeout_s = timeout_s

    def wrap(self, plaintext: bytes, *, associated_data: bytes) -> bytes:
        """Return a secret encrypted under the primary key of the server's keyring."""
        return self._ask(WRAP, plaintext, associated_data)

    def unwrap(self, wrapped: bytes, *, associated_data: bytes) -> bytes:
        """Return the secret that was wrapped by a key of the server's keyring."""
        return self._ask(UNWRAP, bytes(wrapped), associated_data)

    def is_current(self, wrapped: bytes) -> bool:
        """Whether the server's primary key wrapped this."""
        return self._ask(IS_CURRENT, bytes(wrapped), b"") == b"\1"

    def _ask(self, what: int, payload: bytes, associated_data: bytes) -> bytes:
        request = bytes([what]) + len(associated_data).to_bytes(4) + associated_data + payload
        if len(request) > MOST_BYTES:
            raise InvalidInputError(
                f"a key server takes requests of up to {MOST_BYTES} bytes, and this has"
                f" {len(request)}; nothing was written. Use shorter ids of threads."
            )
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                answer = self._exchanged(request, deadline)
                break
            except OSError as error:
                problem = type(error)
            if not issubclass(problem, _PASSING) or time.monotonic() + _PAUSE_S >= deadline:
                raise self._failure(problem)  # outside: its context would hold what was sent
            time.sleep(_PAUSE_S)
        if answer[0] == DONE:
            return answer[1:]
        kind = UnknownKeyError if answer[0] == UNKNOWN else SealError
        raise kind(answer[1:].decode("ascii", "replace"))

    def _exchanged(self, request: bytes, deadline: float) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(left(deadline))
            connection.connect(self._path)
            self._refuse_strangers(connection)
            send(connection, request, deadline)
            return receive(connection, deadline)

    def _refuse_strangers(self, connection: socket.socket) -> None:
        """Refuse a listener that could keep what it is sent, or answer with keys of its own."""
        owner = os.geteuid() if self._owner is None else self._owner
        found = _peer(connection, self._path)
        if found not in (0, owner):
            raise ConfigurationError(
                f"at {self._path} listens a process of user {found}, who is neither {owner} nor"
                " root. Nothing was sent to it, and nothing was written. If it is the key server,"
                f" pass owner={found}; if not, somebody took its place."
            )

    def _failure(self, problem: type[OSError]) -> ConfigurationError | UnavailableError:
        if problem is PermissionError:
            return ConfigurationError(
                f"this user may not open the key server's socket at {self._path}. Nothing was"
                " written. Start the server with --group and a group that this user is in, and"
                " let that group into the socket's directory (chmod g+x)."
            )
        return UnavailableError(
            f"the key server at {self._path} does not answer ({problem.__name__}). Nothing"
            " was written. Threads whose data key is known here go on; start it for the others"
            " (python -m langgraph_vat.kms), and repeat this."
        )

    def __repr__(self) -> str:
        return f"SocketKeyWrapper({self._path!r})"


# A queue that is full, or a server that is being started anew. To ask again harms nothing.
_PASSING = (BlockingIOError, ConnectionError, FileNotFoundError)


def _uid(owner: int | str) -> int:
    try:
        return owner if isinstance(owner, int) else pwd.getpwnam(owner).pw_uid
    except (KeyError, TypeError):
        pass
    raise ConfigurationError(f"owner={owner!r} is no user of this system; give a name or an id")


def _peer(connection: socket.socket, path: str) -> int:
    """Return the id of the user whose process listens."""
    if sys.platform == "linux":
        size = struct.calcsize("iII")
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("iII", found)[1])
    return os.lstat(path).st_uid  # elsewhere that of the file has to do


class AwsKmsKeyWrapper:
    """
    Wraps by a key of AWS KMS (``pip install "langgraph-vat[aws]"``).

    What a wrapped key is bound to goes to KMS as a SHA-256, in its encryption context,
    which CloudTrail logs. A wrapped key is a byte 2, the length of the key's ARN in 2
    bytes, that, and the ciphertext of KMS. It is opened only by the key that `key_id`
    stands for and those of `also`: whoever writes to the database may name a key of his
    own, which this role is allowed to use.

    Args:
        key_id: Id, ARN or alias of a symmetric key. Of an alias KMS is asked again which
            key it stands for, at most once a second. With an ARN it never is.
        client: ``boto3.client("kms")``, with a region and timeouts of yours; one with
            boto3's defaults if None.
        before: Opens what was wrapped before by it, such as a `Keyring`; `rotate` then
            wraps that by the key of KMS.
        also: ARNs of earlier keys of KMS, which still open what they wrapped. Before an
            alias is given to another key, every process needs the old one here; `rotate`
            then wraps that by the new one.
        cipher: See `Keyring.with_cipher`.

    Raises:
        ConfigurationError: There is no such cipher, or no boto3, or one of the others is
            not what it must be.
    """

    def __init__(
        self,
        key_id: str,
        *,
        client: Any = None,
        before: KeyWrapper | None = None,
        also: Iterable[str] = (),
        cipher: str = AES,
    ) -> None:
        refuse_cipher(cipher)
        if not isinstance(key_id, str) or not key_id:
            raise ConfigurationError("key_id must be the id, ARN or alias of a key of AWS KMS")
        if not isinstance(before, KeyWrapper | None):
            msg = f"before must be a Keyring, or another KeyWrapper, not {type(before).__name__}"
            raise ConfigurationError(msg)
        self.cipher = cipher
        self._key_id = key_id
        self._before = before
        self._also = _arns(also)
        # The key that wraps, and until when it is sure that it is.
        self._resolved = (key_id, inf) if _ARN.fullmatch(key_id) else ("", -inf)
        self._client = client if client is not None else _default_client()

    def wrap(self, plaintext: bytes, *, associated_data: bytes) -> bytes:
        """Return a secret encrypted by KMS."""
        made = self._call(
            "encrypt", KeyId=self._key_id, Plaintext=plaintext, **_context(associated_data)
        )
        arn = self._resolve(made["KeyId"]).encode()
        return b"".join((b"\2", len(arn).to_bytes(2), arn, made["CiphertextBlob"]))

    def unwrap(self, wrapped: bytes, *, associated_data: bytes) -> bytes:
        """Return the secret that KMS encrypted, or who came before it."""
        wrapped = bytes(wrapped)
        if wrapped[:1] != b"\2" and self._before is not None:
            return self._before.unwrap(wrapped, associated_data=associated_data)
        if wrapped[:1] == b"\1":
            raise UnknownKeyError(_NO_KEYRING)
        arn, blob = _divided(wrapped)
        self._refuse_strange(arn)
        with suppress(ConfigurationError):
            return self._decrypted(arn, blob, associated_data)
        # KMS says that it is denied, or no request, to who may do all but sends a ciphertext that
        # was changed: it must not keep `rotate` from all the others.
        self._decrypted(*_divided(self.wrap(b"?", associated_data=b"")), b"")
        raise UnknownKeyError(
            f"AWS KMS opens others, and not this data key, by {arn!r}. Nothing was changed. It was"
            " changed, or this role needs kms:Decrypt for that key."
        )

    def _decrypted(self, arn: str, blob: bytes, associated_data: bytes) -> bytes:
        found = self._call("decrypt", KeyId=arn, CiphertextBlob=blob, **_context(associated_data))
        if found["KeyId"] != arn:
            raise SealError(f"AWS KMS opened a wrapped key by another key than its own, {arn!r}")
        return bytes(found["Plaintext"])

    def is_current(self, wrapped: bytes) -> bool:
        """Whether this very key of KMS wrapped it."""
        wrapped = bytes(wrapped)
        return wrapped[:1] == b"\2" and _divided(wrapped)[0] == self._arn()

    def _refuse_strange(self, arn: str) -> None:
        """Refuse a key that is none of ours, and do not ask KMS to use it."""
        if arn == self._resolved[0] or arn in self._also or arn == self._arn():
            return
        raise UnknownKeyError(
            f"data was sealed under a data key that names {arn[:256]!r} as the key of AWS KMS which"
            f" wrapped it, and {self._key_id!r} stands for {self._resolved[0]!r}. KMS was not"
            " asked to use it, and nothing was changed. If it is an earlier key of yours, pass it"
            " in also=; if not, somebody wrote to the database who should not."
        )

    def _arn(self) -> str:
        """Return the ARN of the key that wraps; of an alias, as it was a second ago at most."""
        arn, sure_until = self._resolved
        if time.monotonic() < sure_until:
            return arn
        found = self._call("describe_key", KeyId=self._key_id)
        return self._resolve(found["KeyMetadata"]["Arn"])

    def _resolve(self, arn: str) -> str:
        is_alias = "alias/" in self._key_id
        self._resolved = arn, time.monotonic() + _ALIAS_S if is_alias else inf
        return arn

    def _call(self, method: str, **arguments: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self._client, method)(**arguments)
        except ClientError as error:
            code, is_passing = _told(error.response)
        except BotoCoreError as error:
            code, is_passing = type(error).__name__, isinstance(error, _passing())
        # Outside: its cause may hold what was sent.
        raise _refused(arguments["KeyId"], code, is_passing=is_passing)

    def __repr__(self) -> str:
        return f"AwsKmsKeyWrapper({self._key_id!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AwsKmsKeyWrapper holds credentials and cannot be copied or pickled")

    __getstate__ = __reduce__


_ARN = re.compile(r"arn:[\w-]+:kms:[\w-]+:\d+:key/[\w-]+", re.ASCII)
# For how long an alias stands for what it stood for: `rotate` asks of each row.
_ALIAS_S = 1.0
_NO_KEYRING = (
    "a data key was wrapped by a keyring, or a key server, and not by AWS KMS. Nothing was changed."
    " Pass that keyring in before=, and rotate() wraps it by the key of KMS."
)
_CHANGED = frozenset(("InvalidCiphertextException", "IncorrectKeyException"))
_NOT_TO_BE_HAD = frozenset(
    (
        "DisabledException",
        "InvalidKeyUsageException",
        "KMSInvalidStateException",
        "NotFoundException",
    )
)
# Of these KMS says 400, or 429, and means 503.
_BUSY = frozenset(
    (
        "LimitExceededException",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    )
)


def _arns(also: Iterable[str]) -> frozenset[str]:
    arns = () if isinstance(also, str) or not isinstance(also, Iterable) else tuple(also)
    if (also and not arns) or not all(isinstance(one, str) and _ARN.fullmatch(one) for one in arns):
        raise ConfigurationError(
            "also must be a list of ARNs of keys of AWS KMS: arn:aws:kms:REGION:ACCOUNT:key/ID"
        )
    return frozenset(arns)


def _told(response: Any) -> tuple[str, bool]:
    """Return the code of an answer of KMS, and whether another time it may be another."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
    return code, code in _BUSY or status >= 500  # noqa: PLR2004


def _passing() -> tuple[type[Exception], ...]:
    """Return botocore's errors of what may be there again later."""
    from botocore import exceptions

    return (
        exceptions.ConnectionError,
        exceptions.CredentialRetrievalError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.MetadataRetrievalError,
        exceptions.TokenRetrievalError,
    )


def _refused(key_id: str, code: str, *, is_passing: bool) -> VatError:
    if is_passing:
        return UnavailableError(
            f"AWS KMS does not answer for key {key_id!r} ({code}). Nothing was written; repeat it."
            " Threads whose data key is known here go on."
        )
    if code in _CHANGED:
        return SealError(
            "a wrapped key could not be opened by AWS KMS: it was changed, or belongs elsewhere"
        )
    if code in _NOT_TO_BE_HAD:
        return UnknownKeyError(
            f"AWS KMS cannot use its key {key_id!r} ({code}). Nothing was changed. Enable or"
            " restore it, or correct its name or the client's region."
        )
    return ConfigurationError(
        f"AWS KMS refuses what is asked with key {key_id!r} ({code}), and will again. Nothing was"
        " changed. Allow this role kms:Encrypt, kms:Decrypt and kms:DescribeKey for that key, or"
        " correct the credentials, the clock or key_id=."
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


if __name__ == "__main__":
    main()
