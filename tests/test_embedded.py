"""Embedded servers: shared, survived, adopted, and stopped by the last one who leaves."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import redis

from langgraph_vat import ConfigurationError, UnavailableError
from langgraph_vat.embedded import EmbeddedServers, _socket_directory

USER = """
import sys, time
from langgraph_vat.embedded import EmbeddedServers
with EmbeddedServers.start(sys.argv[1]) as servers:
    print("ready", flush=True)
    sys.stdin.read()
"""


def _use_in_another_process(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", USER, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def _leave(process: subprocess.Popen) -> None:
    process.communicate("", timeout=60)
    assert process.returncode == 0


def _pids(servers: EmbeddedServers) -> list[int]:
    return [server.pid() for server in servers._servers]


def _are_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_data_is_kept_across_runs_and_the_servers_stop(own_directory):
    path = own_directory / ("a" * 100) / "deep"  # longer than a socket's name may be
    with EmbeddedServers.start(path) as servers:
        with psycopg.connect(servers.postgres, autocommit=True) as connection:
            connection.execute("CREATE TABLE t AS SELECT 42 AS x")
            connection.execute("CREATE EXTENSION vector")
            version = connection.execute("SHOW server_version").fetchone()[0]
            assert version.startswith("18")
            assert connection.execute("SHOW fsync").fetchone()[0] == "on"
        with redis.Redis.from_url(servers.redis) as client:
            client.set("x", 43)
            assert client.config_get("appendonly") == {"appendonly": "yes"}
        pids = _pids(servers)
    assert _are_gone(pids)
    servers.stop()  # again: nothing happens
    with EmbeddedServers.start(path) as servers:
        with psycopg.connect(servers.postgres) as connection:
            assert connection.execute("SELECT x FROM t").fetchone() == (42,)
        with redis.Redis.from_url(servers.redis) as client:
            assert client.get("x") == b"43"


def test_the_last_user_stops_the_servers(own_directory):
    other = _use_in_another_process(own_directory)
    with EmbeddedServers.start(own_directory) as servers:
        pids = _pids(servers)
        _leave(other)  # it had started them
        with EmbeddedServers.start(own_directory) as again:
            assert _pids(again) == pids
        psycopg.connect(servers.postgres).close()
    assert _are_gone(pids)


def test_nothing_of_a_killed_process_blocks_the_next(own_directory):
    other = _use_in_another_process(own_directory)
    other.kill()
    other.communicate()
    with EmbeddedServers.start(own_directory) as servers:
        pids = _pids(servers)
    assert _are_gone(pids)


@pytest.mark.parametrize("killed", [0, 1], ids=["postgres", "redis"])
def test_a_killed_server_is_started_again(own_directory, killed):
    other = _use_in_another_process(own_directory)
    with EmbeddedServers.start(own_directory) as servers:
        pid = _pids(servers)[killed]
        os.kill(pid, signal.SIGKILL)
        assert _are_gone([pid])
        time.sleep(0.5)
        with EmbeddedServers.start(own_directory) as again:
            psycopg.connect(again.postgres).close()
            with redis.Redis.from_url(again.redis) as client:
                assert client.ping()
        _leave(other)


def test_many_may_start_at_once(own_directory):
    with ThreadPoolExecutor(4) as pool:
        started = list(pool.map(lambda _: EmbeddedServers.start(own_directory), range(4)))
    assert len({tuple(_pids(servers)) for servers in started}) == 1
    pids = _pids(started[0])
    for servers in started:
        servers.stop()
    assert _are_gone(pids)


def test_an_unusable_path_is_named(own_directory):
    (own_directory / "file").write_text("not a directory")
    with pytest.raises(ConfigurationError, match="file"):
        EmbeddedServers.start(own_directory / "file")


def test_a_server_that_does_not_start_says_why(own_directory):
    with EmbeddedServers.start(own_directory):
        pass
    (own_directory / "postgres" / "PG_VERSION").write_text("12\n")
    with pytest.raises(UnavailableError, match=r"not compatible|incompatible"):
        EmbeddedServers.start(own_directory)


@pytest.mark.parametrize("planted", ["link", "open"])
def test_a_planted_socket_directory_is_refused(tmp_path, monkeypatch, planted):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    directory = _socket_directory(tmp_path / "data")
    directory.rmdir()
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    if planted == "link":
        directory.symlink_to(victim)
    else:
        directory.mkdir()
        directory.chmod(0o777)
    owner = victim.stat().st_uid
    with pytest.raises(ConfigurationError, match="not a private directory"):
        _socket_directory(tmp_path / "data")
    assert victim.stat().st_uid == owner
