"""
The key server: keeps a keyring, and wraps and unwraps at a Unix socket.

A request is its length in 4 bytes, big-endian, and that many bytes: 1 for what is
wanted (1 wrap, 2 unwrap, 3 is it current), the length of the associated data in 4
bytes, those, and the secret or what wrapped it. The answer is a length likewise, 1
byte (0 done, 1 refused, 2 key unknown) and the result, or what the error says. One
connection is one request, and has `_WAIT_S` seconds in all.
"""

import argparse
import ctypes
import errno
import grp
import os
import signal
import socket
import socketserver
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from langgraph_vat.errors import ConfigurationError, SealError, UnknownKeyError
from langgraph_vat.keyring import Keyring

WRAP, UNWRAP, IS_CURRENT = 1, 2, 3
DONE, REFUSED, UNKNOWN = 0, 1, 2
# Associated data name a thread, of which an id may have some kilobytes.
MOST_BYTES = 2**20
_LENGTH_BYTES = 4
_WAIT_S = 5.0
# More wait until one of these is done; a request takes far less than a millisecond.
_MOST_AT_ONCE = 128
_MOST_PATH_BYTES = 107 if sys.platform == "linux" else 103
_PR_SET_DUMPABLE = 4
_ENDINGS = (signal.SIGTERM, signal.SIGINT)


class OversizedError(ConnectionError):
    """A message is empty, or longer than any is."""


def send(connection: socket.socket, message: bytes, deadline: float) -> None:
    """Send one message."""
    connection.settimeout(left(deadline))
    connection.sendall(len(message).to_bytes(_LENGTH_BYTES) + message)


def receive(connection: socket.socket, deadline: float) -> bytes:
    """Return one message; `OSError` where there is none, or it is too long to be one."""
    length = int.from_bytes(_exactly(connection, _LENGTH_BYTES, deadline))
    if not 1 <= length <= MOST_BYTES:
        raise OversizedError
    return _exactly(connection, length, deadline)


def left(deadline: float) -> float:
    """Return the seconds until then; `TimeoutError` if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _exactly(connection: socket.socket, length: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        # Anew for each part: who sends a byte now and then gets no more time than others.
        connection.settimeout(left(deadline))
        part = connection.recv(min(length - len(parts), 2**16))
        if not part:
            raise ConnectionError("ended")
        parts += part
    return bytes(parts)


def refuse_long(path: str) -> None:
    """
    Refuse a path that no socket can have.

    Raises:
        ConfigurationError: It is too long.
    """
    size = len(os.fsencode(path))
    if size > _MOST_PATH_BYTES:
        raise ConfigurationError(
            f"the socket's path {path} has {size} bytes, and the system allows"
            f" {_MOST_PATH_BYTES}; choose a shorter one"
        )


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 1024  # else more than 5 clients at once are turned away

    def __init__(self, path: str, keyring: Keyring) -> None:
        self.keyring = keyring
        self._places = threading.BoundedSemaphore(_MOST_AT_ONCE)
        mask = os.umask(0o177)  # from its first moment on its owner's alone
        try:
            super().__init__(path, _Handler)
        finally:
            os.umask(mask)
        self._made = _inode(path)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; wait while there are too many, and let clients wait in the queue."""
        self._places.acquire()
        try:
            super().process_request(request, client_address)
        except Exception:  # there is no thread that gives it back
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: who sends no request gets no answer, and a secret may be near."""

    def remove(self) -> None:
        """Close, and remove the socket; not one that another server has made there since."""
        path = str(self.server_address)
        with suppress(OSError):
            # While it is open nobody else's has its inode.
            if _inode(path) == self._made:
                Path(path).unlink()
        self.server_close()


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        deadline = time.monotonic() + _WAIT_S
        with suppress(OSError):
            try:
                answer = _answer(self.server.keyring, receive(self.request, deadline))
            except OversizedError:
                answer = bytes([REFUSED]) + b"a request has 1 to %d bytes" % MOST_BYTES
            send(self.request, answer, deadline)


def _answer(keyring: Keyring, request: bytes) -> bytes:
    end = 5 + int.from_bytes(request[1:5])
    bound, payload = request[5:end], request[end:]
    try:
        if request[0] == WRAP and end <= len(request):
            done = keyring.wrap(payload, associated_data=bound)
        elif request[0] == UNWRAP and end <= len(request):
            done = keyring.unwrap(payload, associated_data=bound)
        elif request[0] == IS_CURRENT and end <= len(request):
            done = bytes([keyring.is_current(payload)])
        else:
            return bytes([REFUSED]) + b"no such request"
    except UnknownKeyError as error:
        return bytes([UNKNOWN]) + str(error).encode()
    except SealError as error:
        return bytes([REFUSED]) + str(error).encode()
    return bytes([DONE]) + done


def serve(keys: str | Path, path: str | Path, group: str | None = None) -> NoReturn:
    """
    Keep a keyring, and wrap and unwrap at a socket until the process is ended.

    Whoever may open the socket may ask: its owner, root, and `group` if one is given.
    No other process of its user may read its memory, on Linux, and no core dump has it.

    Raises:
        ConfigurationError: The keys cannot be used, or the socket cannot be made; another
            server has it, perhaps.
    """
    # They wait until it is their turn, and interrupt nothing.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
    _hide_memory()  # before there is a key in it
    keyring = Keyring.from_file(keys)
    server = _made(str(path), keyring)
    try:
        if group is not None:
            _open_to(group, str(path))
        sys.stdout.write(f"{keyring!r} at {path}\n")
        sys.stdout.flush()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        signal.sigwait(_ENDINGS)
    finally:
        server.remove()
    raise SystemExit(0)


def _hide_memory() -> None:
    """Keep other processes of this user out: they could attach as a debugger does."""
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise ConfigurationError(
            "the kernel refuses prctl(PR_SET_DUMPABLE), so other processes of this user could read"
            " the keys in memory. No key was read; allow that call"
        )


_REASONS = {
    errno.EADDRINUSE: "something is there: another server, which was left alone, or a file",
    errno.EACCES: "this user may not write to its directory",
    errno.ENOENT: "its directory does not exist",
}


def _made(path: str, keyring: Keyring) -> _Server:
    refuse_long(path)
    try:
        _refuse_open_directory(path)
        _remove_stale(path)
        return _Server(path, keyring)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, f"{type(error).__name__}, {error.strerror}")
    raise ConfigurationError(f"no socket can be made at {path}: {reason}. Nobody is served")


def _refuse_open_directory(path: str) -> None:
    """Refuse a directory where others could put a server of theirs in this one's place."""
    directory = Path(path).absolute().parent
    status = directory.stat()
    is_open = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    if is_open or status.st_uid not in (0, os.geteuid()):
        raise ConfigurationError(
            f"others may write to {directory}, and could put a server of theirs in the place of"
            " this one. Nobody is served; choose a directory of this user's or of root's, without"
            " write permission for its group and others (chmod go-w)"
        )


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at: its server was killed."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
        except OSError:
            pass  # somebody else's, or busy: it cannot be made there, which is said


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _open_to(group: str, path: str) -> None:
    try:
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        os.chown(path, -1, gid)
        Path(path).chmod(0o660)
    except KeyError:
        reason = "there is no such group"
    except OSError:
        reason = "this user is not in it"
    else:
        return
    raise ConfigurationError(
        f"the socket cannot be opened to group {group!r}: {reason}. Nobody is served"
    )


def main() -> None:
    """Run the key server."""
    parser = argparse.ArgumentParser(
        prog="python -m langgraph_vat.kms",
        description="Keep a keyring, and wrap and unwrap data keys at a socket until ended.",
    )
    parser.add_argument("--keys", required=True, help="file of the keyring, see Keyring.save")
    parser.add_argument("--socket", required=True, help="path of the socket to make")
    parser.add_argument("--group", help="name or id of a group that may use the socket, too")
    given = parser.parse_args()
    try:
        serve(given.keys, given.socket, given.group)
    except ConfigurationError as error:
        parser.error(str(error))
