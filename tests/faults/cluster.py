"""Servers, proxies and workers of one fault run, and everything that can be done to them."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psycopg
import redis

from langgraph_vat._hot.keys import Keys
from langgraph_vat.embedded import PostgresServer, RedisServer, _give_to_user
from tests.faults.order import Order
from tests.faults.proxy import Proxy
from tests.fix_servers import Killable, _free_ports

# What writers take to notice that Redis failed, if nothing keeps them.
NOTICE_S = 2.5
# As docs/operations.md says: else glibc keeps for each of many threads what it once used.
FEW_ARENAS = {"MALLOC_ARENA_MAX": "2"}
# They flush what they hold in a moment, unless another fault keeps them from it.
MOST_S = 60.0


Fault = Any


def fault(*, takes: str = "nothing") -> Callable[[Fault], Fault]:
    """
    Mark a method as a fault.

    Args:
        takes: What is lost: Redis's ``memory``, a ``worker``, or nothing. Of
            both together more may be lost, so there is a pause between them.
    """

    def mark(method: Fault) -> Fault:
        method.takes = takes
        return method

    return mark


class Worker:
    """One process; killed, it is replaced by another that writes to the same log."""

    def __init__(self, order: Order) -> None:
        self.log = Path(order.log)
        self._order = order
        self._lives = 0
        self.start()

    def start(self) -> None:
        self._lives += 1
        order = replace(self._order, seed=f"{self._order.seed}.{self._lives}")
        command = [sys.executable, "-m", "tests.faults.worker", json.dumps(asdict(order))]
        with Path(f"{self.log}.err").open("a") as said:
            self.process = subprocess.Popen(
                command, stderr=said, cwd=Path(__file__).parents[2], env=os.environ | FEW_ARENAS
            )

    def oldest(self) -> float:
        """Until when it has confirmed everything, on the monotonic clock."""
        try:
            return float(Path(f"{self.log}.oldest").read_text())
        except (FileNotFoundError, ValueError):
            return 0.0


class Cluster:
    """
    Postgres, a Redis and its replica, a proxy before each, and workers.

    Every method whose name begins with ``fault_`` injects one fault and undoes it.

    Args:
        directory: Of all their files.
        seed: Of all random choices.
        disk_mb: Size of Postgres's disk, which gets full.
        workers: How many processes.
        order: What each of them is told, beside its place.
    """

    def __init__(
        self, directory: Path, seed: str, *, disk_mb: int, workers: int = 3, **order: Any
    ) -> None:
        self.directory = directory
        self.uncertain: list[tuple[int, int]] = []
        self._watches: list[threading.Thread] = []
        self._rng = random.Random(seed)
        sockets = directory / "s"
        sockets.mkdir()
        _give_to_user(sockets)
        self._disk = directory / "disk"
        self._disk.mkdir()
        self._has_disk = _mount(self._disk, disk_mb)
        self.postgres = Killable(
            PostgresServer(
                self._disk / "pg", sockets, max_wal_size="64MB", min_wal_size="32MB",
                max_connections="200", full_page_writes="off",
            )
        )  # fmt: skip
        self._ports = _free_ports(2)
        self._redis = [
            Killable(
                RedisServer(
                    directory / f"r{port}", sockets / f"{port}.sock", port=str(port),
                    bind="127.0.0.1", **{"repl-diskless-sync-delay": "0"},
                )
            )
            for port in self._ports
        ]  # fmt: skip
        self._follow()
        self.postgres_proxy = Proxy(str(sockets / ".s.PGSQL.5432"))
        self.redis_proxy = Proxy(str(sockets / f"{self._ports[0]}.sock"))
        self._start_workers(seed, workers, order)

    def _start_workers(self, seed: str, workers: int, order: dict[str, Any]) -> None:
        postgres = f"postgresql://postgres@127.0.0.1:{self.postgres_proxy.port}/postgres"
        redis_url = f"redis://127.0.0.1:{self.redis_proxy.port}"
        skews = (0, -120, 120)  # clocks that are minutes apart
        self.workers = [
            Worker(
                Order(
                    log=str(self.directory / f"w{i}.log"),
                    name=f"w{i}",
                    postgres=postgres,
                    redis=redis_url,
                    seed=f"{seed}.{i}",
                    skew_s=skews[i % 3],
                    **order,
                )
            )
            for i in range(workers)
        ]

    @property
    def redis_url(self) -> str:
        return self._redis[0].url

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
        self.redis_proxy.close()
        self.postgres_proxy.close()
        for server in (self.postgres, *self._redis):
            server.stop()
        shutil.copy(self._disk / "postgres.log", self.directory)
        if self._has_disk:
            subprocess.run(["umount", "-l", str(self._disk)], check=True)

    def wait_for_workers(self) -> None:
        """Wait until every one has a connection and begins."""
        while not all(worker.oldest() for worker in self.workers):
            time.sleep(0.1)

    def finish(self) -> None:
        """Have the workers end as they do in peace."""
        for watch in self._watches:
            watch.join()
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            try:
                worker.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                worker.process.send_signal(signal.SIGUSR1)
                time.sleep(1)
                raise

    def kinds(self) -> list[str]:
        """Return the faults that can be injected here."""
        found = [name for name in dir(self) if name.startswith("fault_")]
        return found if self._has_disk else [n for n in found if n != "fault_postgres_disk_full"]

    def note(self, kind: str, start: int) -> None:
        """Write down when a fault was injected, for whoever reads the workers' logs."""
        line = {"op": kind, "start": start, "end": time.monotonic_ns()}
        with (self.directory / "faults.log").open("a") as log:
            log.write(json.dumps(line) + "\n")

    # --- to one another -------------------------------------------------------

    def settle(self) -> None:
        """Wait until everything acknowledged before now is in Postgres."""
        begun, keys = time.monotonic(), Keys("vat")
        with self._client() as client:
            at_ms = int(client.time()[0] * 1000)
            while True:
                dirty = [
                    thread.decode()
                    for bucket in keys.buckets
                    for thread in client.zrangebyscore(bucket, "-inf", at_ms)
                ]
                held = any(
                    worker.oldest() < begun
                    for worker in self.workers
                    if worker.process.poll() is None
                )
                if not dirty and not held:
                    return
                if time.monotonic() > begun + 90:
                    left = {
                        t: (client.hgetall(keys.meta(t)), client.xlen(keys.journal(t)))
                        for t in dirty
                    }
                    raise AssertionError(f"did not settle: {held=} {left=}")
                time.sleep(0.05)

    def is_whole(self) -> list[Any]:
        """Return the checkpoints in Postgres at this instant that lack a parent or a value."""
        query = """
        SELECT c.thread_id, c.checkpoint_ns, c.checkpoint_id FROM checkpoints c
        WHERE c.parent_checkpoint_id IS NOT NULL AND NOT EXISTS (
            SELECT FROM checkpoints p WHERE p.thread_id = c.thread_id
            AND p.checkpoint_ns = c.checkpoint_ns AND p.checkpoint_id = c.parent_checkpoint_id)
        OR EXISTS (
            SELECT FROM jsonb_each_text(c.checkpoint -> 'channel_versions') v
            WHERE v.key IN ('thread', 'size') AND NOT EXISTS (
                SELECT FROM checkpoint_blobs b WHERE b.thread_id = c.thread_id
                AND b.checkpoint_ns = c.checkpoint_ns AND b.channel = v.key AND b.version = v.value
            ))
        """
        with psycopg.connect(self.postgres.url) as connection:
            return connection.execute(query).fetchall()

    @contextlib.contextmanager
    def _uncertainty(self) -> Iterator[None]:
        """Note from when to when what others wrote may be missed: until all have flushed it."""
        start = time.monotonic_ns()
        yield
        at = time.monotonic()
        watch = threading.Thread(target=self._until_confirmed, args=(start, at), daemon=True)
        watch.start()
        self._watches.append(watch)

    def _until_confirmed(self, start: int, at: float) -> None:
        while time.monotonic() < at + NOTICE_S or any(
            worker.oldest() < at for worker in self.workers
        ):
            if time.monotonic() > at + MOST_S:
                break
            time.sleep(0.05)
        self.uncertain.append((start, time.monotonic_ns()))

    def _client(self) -> redis.Redis:
        return redis.Redis.from_url(self._redis[0].url, socket_timeout=5)

    def _follow(self) -> None:
        """Make the second Redis a replica of the first."""
        with redis.Redis.from_url(self._redis[1].url) as replica:
            replica.execute_command("REPLICAOF", "127.0.0.1", self._ports[0])

    def _until_trusted(self) -> None:
        """Wait until steps are in Redis alone again: before, its memory is no loss."""
        until = time.monotonic() + 10
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            query = "SELECT FROM vat_state WHERE degraded_until IS NOT NULL"
            while connection.execute(query).fetchall() and time.monotonic() < until:
                time.sleep(0.05)
        self._wait(0.1, 0.5)

    def _wait(self, least_s: float, most_s: float) -> None:
        time.sleep(self._rng.uniform(least_s, most_s))

    def _pause(self, server: Killable) -> None:
        server.pause()
        self._wait(0.1, 1.5)
        server.resume()

    # --- workers --------------------------------------------------------------

    @fault(takes="worker")
    def fault_worker_killed(self) -> None:
        worker = self._rng.choice(self.workers)
        worker.process.kill()
        worker.process.wait()
        worker.start()
        self._wait(0.3, 1.0)

    @fault()
    def fault_worker_paused(self) -> None:
        worker = self._rng.choice(self.workers)
        worker.process.send_signal(signal.SIGSTOP)
        self._wait(0.1, 1.0)  # several times what a lease or an epoch is good for
        worker.process.send_signal(signal.SIGCONT)

    # --- Redis ----------------------------------------------------------------

    @fault()
    def fault_redis_killed(self) -> None:
        with self._uncertainty():
            self._redis[0].kill()
            self._wait(0.0, 0.5)
            self._redis[0].start()

    @fault()
    def fault_redis_paused(self) -> None:
        with self._uncertainty():
            self._pause(self._redis[0])

    @fault(takes="memory")
    def fault_redis_emptied(self) -> None:
        self._until_trusted()
        with self._uncertainty(), self._client() as client:
            client.flushall()

    @fault(takes="memory")
    def fault_redis_failed_over_to_a_lagging_replica(self) -> None:
        self._until_trusted()
        with self._uncertainty():
            old, new = self._redis
            with redis.Redis.from_url(new.url) as replica:
                replica.execute_command("REPLICAOF", "NO", "ONE")
            self._wait(0.0, 0.3)  # what the old one takes now, the new one will not have
            old.kill()
            self._redis.reverse()
            self._ports.reverse()
            self.redis_proxy.upstream = new.url.removeprefix("unix://")
            self.redis_proxy.cut()
            old.start()
            self._follow()

    @fault()
    def fault_redis_full(self) -> None:
        with self._uncertainty(), self._client() as client:
            client.config_set("maxmemory", "1mb")
            self._wait(0.1, 0.8)
            client.config_set("maxmemory", "0")

    @fault()
    def fault_redis_evicts_heads(self) -> None:
        with self._client() as client:
            for head in client.keys("*}:h:*"):
                if self._rng.random() < 0.7:
                    client.delete(head)

    @fault()
    def fault_redis_cut(self) -> None:
        with self._uncertainty():
            self.redis_proxy.cut()

    @fault()
    def fault_redis_half_open(self) -> None:
        with self._uncertainty():
            self.redis_proxy.swallow()
            self._wait(0.1, 1.5)
            self.redis_proxy.heal()

    @fault()
    def fault_redis_slow(self) -> None:
        self.redis_proxy.slow(0.05)
        self._wait(0.1, 0.8)
        self.redis_proxy.heal()

    # --- Postgres -------------------------------------------------------------

    @fault()
    def fault_postgres_killed(self) -> None:
        self.postgres.kill()
        self._wait(0.0, 0.5)
        self.postgres.start()

    @fault()
    def fault_postgres_paused(self) -> None:
        self._pause(self.postgres)

    @fault()
    def fault_postgres_backends_terminated(self) -> None:
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            pids = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'langgraph-vat'"
            ).fetchall()
            for (pid,) in pids:
                connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
                self._wait(0.0, 0.02)

    @fault()
    def fault_postgres_cut(self) -> None:
        self.postgres_proxy.cut()

    @fault()
    def fault_postgres_half_open(self) -> None:
        self.postgres_proxy.swallow()
        self._wait(0.1, 1.5)
        self.postgres_proxy.heal()

    @fault()
    def fault_postgres_slow(self) -> None:
        self.postgres_proxy.slow(0.05)
        self._wait(0.1, 0.8)
        self.postgres_proxy.heal()

    @fault()
    def fault_postgres_disk_full(self) -> None:
        filler = self._disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 2**16)
        self._wait(0.2, 1.0)
        filler.unlink()
        self.postgres.start()  # without room for its log it stops


def _mount(path: Path, size_mb: int) -> bool:
    """Put a small disk below `path`, where this user may."""
    options = f"size={size_mb}m,mode=755"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if shutil.which("mount") is None or os.geteuid() != 0:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
