"""
``python -m benchmarks.million``: whether a large database is slower than a small one.

Databases of 10,000 and of 1,000,000 checkpoints (``CHECKPOINTS=``), 20 a thread, the
same questions to both: medians in milliseconds. Then a sweep of the half that has
expired, and how long steps of others take meanwhile.
"""

import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from langgraph.checkpoint.base import empty_checkpoint

from langgraph_vat import HybridSaver, Retention
from langgraph_vat.embedded import EmbeddedServers

SIZES = (10_000, int(os.environ.get("CHECKPOINTS", "1000000")))
STEPS = 20
QUESTIONS = 300
SWEEP_S = 20.0
# Every thread has the same steps, a user of a hundredth of all, and half of them are old.
FILL = (
    """
INSERT INTO vat_threads (thread_id, generation, steps, bytes, head_id, metadata, created_at,
                         updated_at)
SELECT 'thread ' || n, gen_random_uuid(), %(steps)s, 20000,
    lpad(to_hex(n * %(steps)s + %(steps)s - 1), 16, '0'),
    jsonb_build_object('user_id', 'user ' || n %% (%(threads)s / 100 + 1)),
    now() - interval '2 days', now() - (n %% 2) * interval '1 day' - n * interval '1 ms'
FROM generate_series(1, %(threads)s) AS n
""",
    """
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id,
                         checkpoint, metadata)
SELECT 'thread ' || n, '', lpad(to_hex(n * %(steps)s + s), 16, '0'),
    CASE WHEN s > 0 THEN lpad(to_hex(n * %(steps)s + s - 1), 16, '0') END,
    jsonb_build_object('v', 4, 'id', lpad(to_hex(n * %(steps)s + s), 16, '0'), 'ts', now()::text,
        'channel_versions', jsonb_build_object('messages', lpad(s::text, 32, '0')),
        'versions_seen', '{}'::jsonb),
    jsonb_build_object('source', 'loop', 'step', s, 'parents', '{}'::jsonb,
        'user_id', 'user ' || n %% (%(threads)s / 100 + 1), 'run_id', 'run ' || n)
FROM generate_series(1, %(threads)s) AS n, generate_series(0, %(steps)s - 1) AS s
""",
    """
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob, vat_step)
SELECT 'thread ' || n, '', 'messages', lpad(s::text, 32, '0'), 'bytes',
    decode(repeat(md5(n || ' ' || s), 32), 'hex'), 0
FROM generate_series(1, %(threads)s) AS n, generate_series(0, %(steps)s - 1) AS s
""",
)


def _at(thread: int | str, **more: Any) -> Any:
    return {"configurable": {"thread_id": f"thread {thread}", "checkpoint_ns": "", **more}}


def _median_ms(question: Callable[[int], Any], threads: int) -> float:
    dice, times = random.Random(7), []
    for _ in range(QUESTIONS):
        thread = dice.randint(1, threads)
        begun = time.perf_counter()
        question(thread)
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def _ask(saver: HybridSaver, threads: int) -> dict[str, float]:
    users = threads // 100 + 1
    questions: dict[str, Callable[[int], Any]] = {
        "latest, from Postgres": lambda n: saver.get_tuple(_at(n)),
        "latest, hot": lambda _: saver.get_tuple(_at(1)),
        "list(thread, limit=10)": lambda n: list(saver.list(_at(n), limit=10)),
        "list(None, limit=10)": lambda _: list(saver.list(None, limit=10)),
        "list(filter=user, limit=10)": lambda n: list(
            saver.list(None, filter={"user_id": f"user {n % users}"}, limit=10)
        ),
        "threads.search()": lambda _: saver.threads.search(limit=10),
        "threads.search(user)": lambda n: saver.threads.search(
            metadata={"user_id": f"user {n % users}"}, limit=10
        ),
    }
    return {name: _median_ms(question, threads) for name, question in questions.items()}


def _sweep(saver: HybridSaver, checkpoints: int, url: str) -> str:
    """Sweep for a while beside a writer; return how fast, and how long its steps took."""
    is_over = threading.Event()
    took: list[float] = []

    def write() -> None:
        config = _at("of a writer")
        while not is_over.is_set():
            begun = time.perf_counter()
            config = saver.put(config, empty_checkpoint(), {"step": 1}, {})
            took.append(time.perf_counter() - begun)
            time.sleep(0.002)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(2)
    alone, begun = list(took), time.perf_counter()
    took.clear()
    sweeping = threading.Thread(
        target=saver.threads.sweep, args=[Retention(default_ttl=12 * 60)], daemon=True
    )
    sweeping.start()
    sweeping.join(SWEEP_S)
    seconds = time.perf_counter() - begun
    is_over.set()
    writer.join()
    written = len(alone) + len(took)
    with psycopg.connect(url) as connection:
        (left,) = connection.execute("SELECT count(*) FROM checkpoints").fetchone() or (0,)
    swept = checkpoints + written - left
    return (
        f"swept {swept:,} checkpoints in {seconds:.1f} s: {swept / seconds:,.0f}/s; a writer's put"
        f" alone {1e3 * statistics.median(alone):.1f} ms (longest {1e3 * max(alone):.0f}), beside"
        f" it {1e3 * statistics.median(took):.1f} ms (longest {1e3 * max(took):.0f})\n"
    )


def main() -> None:
    """Start servers, fill, ask, sweep, print."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="vat-bench-") as path:
        Path(path).chmod(0o755)
        servers = EmbeddedServers.start(Path(path))
        try:
            for size in SIZES:
                found[size] = _measure(servers, size)
        finally:
            servers.stop()
    small, large = found[SIZES[0]], found[SIZES[-1]]
    for name in small:
        ratio = large[name] / small[name]
        sys.stdout.write(f"{name:28} {small[name]:8.2f} {large[name]:8.2f} {ratio:6.2f}\n")


def _measure(servers: EmbeddedServers, size: int) -> dict[str, float]:
    name = f"c{size}"
    with psycopg.connect(servers.postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = servers.postgres.replace("/postgres?", f"/{name}?")
    options: Any = {
        "redis": servers.redis,
        "key_prefix": name,
        "thread_metadata": ("user_id",),
        "flush_every": 1,
    }
    with HybridSaver.from_conn_string(url):
        pass
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in FILL:
            connection.execute(statement, {"threads": size // STEPS, "steps": STEPS})
        connection.execute("VACUUM ANALYZE")
        bytes_ = connection.execute("SELECT pg_database_size(current_database())").fetchone()[0]
    sys.stdout.write(f"{size:,} checkpoints, {bytes_ / 1e6:,.0f} MB\n")
    saver = HybridSaver.from_conn_string(url, **options)
    saver.enable_hot()
    with saver:
        found = _ask(saver, size // STEPS)
        sys.stdout.write(_sweep(saver, size, url))
    return found


if __name__ == "__main__":
    main()
