"""
Half an hour of work and faults leaves nothing behind.

`SOAK_S` says how many seconds, `FAULTS_SEED` repeats the choice of faults.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
import redis

from langgraph_vat import HybridSaver
from tests.faults.checker import Checker, read_logs
from tests.faults.cluster import Cluster
from tests.faults.test_faults import SEED, place

SOAK_S = float(os.environ.get("SOAK_S", "60"))
HEAD_TTL_S = 15
PAUSE_S = 2.0
WORKERS, TALKERS = 2, 16
POOL = 8
# The interpreter, its loops and LangGraph's executors; connections come on top.
_FEW = 40
# Megabytes of steps that wait in Redis while Postgres is away, which may be now or before;
# what leaks there is found in the end, when all heads have expired.
_SWING = 64
# Threads that are hot at one time, and a fault may have emptied Redis before.
_KEYS = 400


class Sample(NamedTuple):
    """What one worker, or a server, has at one instant."""

    memory: float
    count: int
    """Open files and threads of a process; keys of Redis; Postgres's connections."""


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_long_run_with_faults_leaves_nothing_behind(capsys):
    directory = Path(tempfile.mkdtemp(prefix="vat-f-"))
    directory.chmod(0o755)
    settings = {
        "flush_every": 4, "flush_after": 0.4, "epoch_ttl_s": 0.2, "timeout_s": 1.0,
        "pool_size": POOL, "head_ttl_s": HEAD_TTL_S,
    }  # fmt: skip
    cluster = Cluster(
        directory, SEED, disk_mb=400 + int(SOAK_S), workers=WORKERS, talkers=TALKERS,
        keeps=False, settings=settings,
    )  # fmt: skip
    try:
        samples, faults = _run(cluster)
        violations = _check(cluster)
        left = _left_in_redis(cluster)
    finally:
        cluster.close()
    with capsys.disabled():
        sys.stdout.write(f"\n{faults} faults in {SOAK_S:.0f} s, seed={SEED} logs={directory}\n")
        for name, of_name in samples.items():
            sys.stdout.write(f"  {name:8} memory, MB, and count: {_quarters(of_name)}\n")
    assert violations == []
    assert left == []
    for name, of_name in samples.items():
        early, late = of_name[: len(of_name) // 2], _quarters(of_name)[3]
        swing = _SWING if name == "redis" else 8
        assert late.memory < 1.15 * max(one.memory for one in early) + swing, name
        few = _KEYS if name == "redis" else _FEW
        assert late.count < 1.25 * max(one.count for one in early) + few, name


def _run(cluster: Cluster) -> tuple[dict[str, list[Sample]], int]:
    rng, faults = random.Random(SEED), 0
    # A worker that is killed takes with it what it leaked.
    kinds = [kind for kind in cluster.kinds() if kind != "fault_worker_killed"]
    samples: dict[str, list[Sample]] = {}
    cluster.wait_for_workers()
    until, next_at = time.monotonic() + SOAK_S, time.monotonic()
    while time.monotonic() < until:
        kind = rng.choice(kinds)
        start = time.monotonic_ns()
        getattr(cluster, kind)()
        cluster.note(kind, start)
        faults += 1
        next_at = max(next_at + PAUSE_S, time.monotonic() + 0.2)
        time.sleep(next_at - time.monotonic())
        for worker in cluster.workers:
            samples.setdefault(worker.log.stem, []).append(_of_process(worker.process.pid))
        samples.setdefault("redis", []).append(_of_redis(cluster))
        samples.setdefault("backends", []).append(Sample(0, _backends(cluster)))
    return samples, faults


def _of_process(pid: int) -> Sample:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(int(status["VmRSS"].split()[0]) / 1024, files + int(status["Threads"]))


def _of_redis(cluster: Cluster) -> Sample:
    with redis.Redis.from_url(cluster.redis_url) as client:
        return Sample(client.info("memory")["used_memory"] / 2**20, client.dbsize())


def _backends(cluster: Cluster) -> int:
    """Return how many connections to Postgres are ours."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'langgraph-vat'"
    with psycopg.connect(cluster.postgres.url) as connection:
        row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0


def _quarters(samples: list[Sample]) -> list[Sample]:
    """Return the median of each quarter of the time."""
    size = max(len(samples) // 4, 1)
    quarters = [samples[start : start + size] for start in range(0, 4 * size, size)]
    return [
        Sample(round(statistics.median(memories), 1), int(statistics.median(counts)))
        for memories, counts in (zip(*quarter, strict=True) for quarter in quarters)
    ]


def _check(cluster: Cluster) -> list[str]:
    cluster.settle()
    cluster.finish()
    records = read_logs(worker.log for worker in cluster.workers)
    ends = [record for record in records if record["op"] == "end"]
    wrong = [] if len(ends) == WORKERS else ["a worker did not end"]
    wrong += [f"left behind: {end}" for end in ends if end["sockets"]]
    wrong += [
        f"left behind: {end}" for end in ends if set(end["threads"]) != {"MainThread", "tell"}
    ]
    wrong += [f"{left} backends left behind"] if (left := _backends(cluster)) else []
    with HybridSaver.from_conn_string(cluster.postgres.url, redis=cluster.redis_url) as saver:
        saver.flush()
        found = {place(one.config): one for one in saver.list(None)}
    return wrong + Checker(records, cluster.uncertain).violations(found)


def _left_in_redis(cluster: Cluster) -> list[bytes]:
    """Return the keys that are there when all heads have expired, but the one that stays."""
    url = cluster.redis_url
    with (
        redis.Redis.from_url(url) as client,
        # It opens what a process closed that could not reach Redis again.
        HybridSaver.from_conn_string(cluster.postgres.url, redis=url, flush_after=0.4) as saver,
    ):
        until = time.monotonic() + 2 * HEAD_TTL_S
        while True:
            saver.flush()
            left = [key for key in client.keys("*") if not key.endswith(b":identity")]
            if not left or time.monotonic() > until:
                return left
            time.sleep(0.2)
