"""Servers that stand in for others during a run: a promoted Postgres, a moving Redis Cluster."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from langgraph.checkpoint.base import empty_checkpoint

from langgraph_vat import HybridSaver, VatError
from langgraph_vat.embedded import PostgresServer, RedisServer, _give_to_user
from tests.fix_servers import Killable, _free_ports, _join, _sockets

QUICK: Any = {"flush_after": 0.5, "epoch_ttl_s": 0.2, "timeout_s": 2.0}


class Writers:
    """
    Threads that put one step after another, each on threads of its own, and remember the answers.

    Attributes:
        acknowledged: Ids of the checkpoints, by thread.
    """

    def __init__(self, saver: HybridSaver, count: int = 6) -> None:
        self.acknowledged: dict[str, list[str]] = {}
        self.problems: list[BaseException] = []
        self._saver = saver
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, more: int) -> None:
        """Let every one of them begin, and all of them be acknowledged `more` steps."""
        wanted = self._steps() + more
        deadline = time.monotonic() + 60
        while self._steps() < wanted:
            assert not self.problems
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> None:
        """Stop, and see that everything that was acknowledged is there."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        assert not self.problems
        self._saver.flush()
        for thread_id, ids in self.acknowledged.items():
            found = [one.checkpoint["id"] for one in self._saver.list(at(thread_id))]
            assert found[::-1] == sorted(found)
            assert set(ids) <= set(found)
            latest = self._saver.get_tuple(at(thread_id))
            assert latest.checkpoint["id"] == found[0]

    def _steps(self) -> int:
        return sum(map(len, list(self.acknowledged.values())))

    def _run(self, number: int) -> None:
        try:
            for turn in itertools.count():
                self._thread(f"{number}-{turn}")
                if self._ended.is_set():
                    return
        except BaseException as problem:
            self.problems.append(problem)

    def _thread(self, thread_id: str) -> None:
        config, acknowledged = at(thread_id), self.acknowledged.setdefault(thread_id, [])
        for step in range(10):
            versions = {"n": self._saver.get_next_version(step, None)}
            checkpoint = {
                **empty_checkpoint(),
                "channel_values": {"n": step},
                "channel_versions": versions,
            }
            while True:
                try:
                    after = self._saver.put(config, checkpoint, {"step": step}, versions)
                    break
                except VatError:
                    if self._ended.is_set():
                        return
                    time.sleep(0.05)
            config = after
            acknowledged.append(checkpoint["id"])
            seen = self._latest(thread_id)
            assert seen is None or seen >= checkpoint["id"], (thread_id, seen)

    def _latest(self, thread_id: str) -> str | None:
        try:
            found = self._saver.get_tuple(at(thread_id))
        except VatError:
            return None
        return found.checkpoint["id"] if found else ""


def at(thread_id: str) -> Any:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}


# --- Postgres ---------------------------------------------------------------------


@pytest.fixture
def replicated(own_directory: Path) -> Iterator[tuple[Killable, Killable, str]]:
    """A primary, its synchronous standby, and the connection string of both."""
    directories = [own_directory / name for name in ("one", "two")]
    for directory in directories:
        directory.mkdir()
        _give_to_user(directory)
    first, second = (
        PostgresServer(directory / "pg", _sockets(directory)) for directory in directories
    )
    primary = Killable(first)
    place = str(directories[0] / "s")
    second._run("pg_basebackup", "-R", "-h", place, "-U", "postgres", "-c", "fast")
    standby = Killable(second)
    with psycopg.connect(primary.url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        connection.execute("SELECT pg_reload_conf()")
        while connection.execute("SELECT sync_state FROM pg_stat_replication").fetchall() != [
            ("sync",)
        ]:
            time.sleep(0.05)
    hosts = ",".join(str(directory / "s") for directory in directories)
    yield primary, standby, f"postgresql://postgres@/postgres?host={hosts}"
    for server in (primary, standby):
        server.stop()


@pytest.mark.parametrize("flush_every", [1, 4])
def test_a_standby_is_promoted_and_nothing_acknowledged_is_lost(replicated, redis_url, flush_every):
    primary, standby, url = replicated
    with HybridSaver.from_conn_string(
        url, redis=redis_url, flush_every=flush_every, **QUICK
    ) as saver:
        writers = Writers(saver)
        writers.wait_for(100)
        primary.kill()
        time.sleep(0.5)
        with psycopg.connect(standby.url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        writers.wait_for(100)
        writers.end()
    with psycopg.connect(standby.url) as connection:
        (steps,) = connection.execute("SELECT count(*) FROM checkpoints").fetchone()
    assert steps >= 200


def test_a_primary_that_became_a_standby_is_left(replicated, redis_url):
    primary, standby, url = replicated
    with HybridSaver.from_conn_string(url, redis=redis_url, flush_every=1, **QUICK) as saver:
        saver.put(at("t"), empty_checkpoint(), {}, {})
        with psycopg.connect(primary.url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            connection.execute("SELECT pg_reload_conf()")
        with psycopg.connect(standby.url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        saver.put(at("u"), empty_checkpoint(), {}, {})
    with psycopg.connect(standby.url) as connection:
        assert connection.execute("SELECT thread_id FROM checkpoints ORDER BY 1").fetchall() == [
            ("t",),
            ("u",),
        ]


# --- Redis Cluster ----------------------------------------------------------------


class Masters:
    """Three masters of a cluster, and a replica of the first."""

    def __init__(self, directory: Path) -> None:
        self.ports = _free_ports(4)
        self._servers = {port: Killable(self._server(directory, port)) for port in self.ports}
        *masters, replica = self.ports
        _join(masters)
        self.clients = {port: redis.Redis(port=port, decode_responses=True) for port in self.ports}
        self.clients[replica].execute_command("CLUSTER", "MEET", "127.0.0.1", masters[0])
        first = self.node_id(masters[0])
        self._wait_for(lambda: first in str(self.clients[replica].execute_command("CLUSTER NODES")))
        self.clients[replica].execute_command("CLUSTER", "REPLICATE", first)
        linked = "master_link_status"
        self._wait_for(lambda: self.clients[replica].info("replication").get(linked) == "up")

    @staticmethod
    def _server(directory: Path, port: int) -> RedisServer:
        options = {"cluster-enabled": "yes", "cluster-node-timeout": "1000"}
        sockets = _sockets(directory) / f"{port}.sock"
        data = directory / f"c{port}"
        return RedisServer(data, sockets, port=str(port), bind="127.0.0.1", **options)

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        for server in self._servers.values():
            server.stop()

    @property
    def url(self) -> str:
        places = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis+cluster://{places}"

    def node_id(self, port: int) -> str:
        return self.clients[port].execute_command("CLUSTER", "MYID")

    def move(self, slots: int) -> int:
        """Move the first slots that have keys from the first master to the second, one by one."""
        source, target, *_ = self.ports
        one, other = self.clients[source], self.clients[target]
        moved = 0
        for slot in range(16_384 // 3):
            if moved == slots:
                break
            if not one.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot):
                continue
            other.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", self.node_id(source))
            one.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", self.node_id(target))
            while keys := one.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 2):
                one.execute_command(
                    "MIGRATE", "127.0.0.1", target, "", 0, 5000, "REPLACE", "KEYS", *keys
                )
                time.sleep(0.01)  # in between, half of a thread is here and half is there
            for client in (other, one):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", self.node_id(target))
            moved += 1
        return moved

    def fail_over(self) -> None:
        """Kill the first master; its replica takes its place."""
        first, *_, replica = self.ports
        self._servers[first].kill()
        self._wait_for(lambda: self.clients[replica].info("replication")["role"] == "master")

    @staticmethod
    def _wait_for(condition: Any) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def masters(own_directory: Path) -> Iterator[Masters]:
    made = Masters(own_directory)
    yield made
    made.close()


@pytest.mark.parametrize("flush_every", [1, 4])
def test_slots_move_and_a_master_fails_over_while_graphs_run(masters, postgres_url, flush_every):
    with HybridSaver.from_conn_string(
        postgres_url, redis=masters.url, flush_every=flush_every, **QUICK
    ) as saver:
        writers = Writers(saver)
        writers.wait_for(100)
        assert masters.move(15) >= 3
        writers.wait_for(100)
        masters.fail_over()
        writers.wait_for(100)
        writers.end()
        before = saver.stats.hits
        deadline = time.monotonic() + 30
        while saver.stats.hits == before:  # and Redis serves again
            saver.get_tuple(at("0-0"))
            assert time.monotonic() < deadline
