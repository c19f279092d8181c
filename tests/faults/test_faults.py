"""
Faults of every kind, one after another, while workers run real graphs.

`FAULTS` says how many faults a run injects, `FAULTS_SEED` repeats their choice,
`FAULTS_ONLY` limits it to some kinds.
"""

import os
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from langgraph_vat import HybridSaver
from tests.faults.checker import Checker, read_logs
from tests.faults.cluster import Cluster

FAULTS = int(os.environ.get("FAULTS", "33"))
QUICK = {"flush_after": 0.4, "epoch_ttl_s": 0.2, "timeout_s": 1.0, "pool_size": 8}
ONLY = os.environ.get("FAULTS_ONLY", "").split()
SEED = os.environ.get("FAULTS_SEED") or secrets.token_hex(4)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("flush_every", [1, 4, 16])
def test_no_single_fault_breaks_the_contract(flush_every, capsys):
    directory = Path(tempfile.mkdtemp(prefix="vat-f-"))
    directory.chmod(0o755)
    settings = {**QUICK, "flush_every": flush_every}
    # What is written while one fault lasts takes half a megabyte.
    cluster = Cluster(directory, SEED, disk_mb=300 + FAULTS, settings=settings)
    try:
        counts, violations = _run(cluster, f"{SEED}.{flush_every}")
    finally:
        cluster.close()
    with capsys.disabled():
        sys.stdout.write(f"\nflush_every={flush_every} seed={SEED} logs={directory}\n")
        for kind, count in sorted(counts.items()):
            sys.stdout.write(f"  {count:6} {kind}\n")
        sys.stdout.write(f"  {len(violations):6} violations\n")
    assert violations == []
    assert all(counts[kind.removeprefix("fault_")] for kind in _kinds(cluster))
    assert counts["acknowledged put"] > FAULTS


def _run(cluster: Cluster, seed: str) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter({"clocks minutes apart": 1})
    wrong: list[str] = []
    cluster.wait_for_workers()
    for kind in _sequence(_kinds(cluster), random.Random(seed)):
        method = getattr(cluster, kind)
        if method.takes != "nothing":
            cluster.settle()  # of a worker and of Redis's memory only one may be lost
        start = time.monotonic_ns()
        method()
        cluster.note(kind, start)
        counts[kind.removeprefix("fault_")] += 1
        time.sleep(0.1)
        if sum(counts.values()) % 5 == 0:
            wrong += [f"not whole: {row}" for row in cluster.is_whole()]
    cluster.settle()
    cluster.finish()
    records = read_logs(worker.log for worker in cluster.workers)
    checker = Checker(records, cluster.uncertain)
    for op, count in checker.counts().items():
        counts[f"acknowledged {op}"] = count
    with HybridSaver.from_conn_string(cluster.postgres.url, redis=cluster.redis_url) as saver:
        saver.flush()
        found = {place(one.config): one for one in saver.list(None)}
    for path in cluster.directory.glob("*.err"):
        wrong += (
            [f"{path.name}: {path.read_text()[-2000:]}"] if "Traceback" in path.read_text() else []
        )
    return counts, wrong + checker.violations(found)


def _kinds(cluster: Cluster) -> list[str]:
    kinds = cluster.kinds()
    return [kind for kind in kinds if kind.removeprefix("fault_") in ONLY] if ONLY else kinds


def _sequence(kinds: list[str], rng: random.Random) -> list[str]:
    """Return as many faults as wanted, each kind as often as another, in any order."""
    chosen: list[str] = []
    while len(chosen) < FAULTS:
        chosen += rng.sample(kinds, len(kinds))
    return chosen[:FAULTS]


def place(config) -> tuple[str, str, str]:
    found = config["configurable"]
    return found["thread_id"], found["checkpoint_ns"], found["checkpoint_id"]
