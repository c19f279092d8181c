"""
What Postgres, Redis and the disk really contain, read behind the product's back.

Searched for as plain bytes and, where Postgres prints bytes in hex, as hex.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from redis import Redis

OUR_TABLES = """
    SELECT schemaname, tablename FROM pg_tables
    WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1, 2
"""
NEWEST_STEP = """
    SELECT max((metadata->>'step')::int) FROM checkpoints
    WHERE thread_id = %s AND checkpoint_ns = ''
"""
COUNT_CHECKPOINTS = "SELECT count(*) FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = ''"
LARGEST_BLOB = """
    SELECT channel, type, blob FROM checkpoint_blobs
    WHERE thread_id = %s AND blob IS NOT NULL ORDER BY length(blob) DESC LIMIT 1
"""


@dataclass
class Searched:
    """How much was read in one place, and how often each needle was in it."""

    place: str
    pieces: int = 0
    size: int = 0
    hits: dict[str, int] = field(default_factory=dict)

    def read(self, content: bytes, needles: list[str]) -> None:
        """Search one more piece."""
        self.pieces += 1
        self.size += len(content)
        for needle in needles:
            raw = needle.encode()
            found = content.count(raw) + content.count(raw.hex().encode())
            self.hits[needle] = self.hits.get(needle, 0) + found


def search_postgres(address: str, needles: list[str]) -> Searched:
    """Read every row of every table, whole."""
    searched = Searched("Postgres rows")
    with psycopg.connect(address) as connection:
        for row in _rows(connection):
            searched.read(row.encode(), needles)
    return searched


def search_redis(address: str, needles: list[str]) -> Searched:
    """Read every key with its value."""
    searched = Searched("Redis keys")
    with Redis.from_url(address) as client:
        for key in client.scan_iter():
            searched.read(repr((key, _value(client, key))).encode(), needles)
    return searched


def search_disk(directory: Path, postgres: str, redis: str, needles: list[str]) -> Searched:
    """Read every file below a directory, after both servers wrote theirs: data, WAL, logs."""
    with psycopg.connect(postgres, autocommit=True) as connection, Redis.from_url(redis) as client:
        connection.execute("CHECKPOINT")
        client.save()
    searched = Searched("files on disk")
    for file in directory.rglob("*"):
        if file.is_file():
            searched.read(file.read_bytes(), needles)
    return searched


def newest_step(address: str, thread: str) -> int:
    """Return the newest super-step of a thread that Postgres alone holds."""
    return int(_one(address, NEWEST_STEP, thread)[0])


def checkpoints(address: str, thread: str) -> int:
    """Return how many checkpoints of a thread Postgres alone holds."""
    return int(_one(address, COUNT_CHECKPOINTS, thread)[0])


def largest_blob(address: str, thread: str) -> tuple[str, str, bytes]:
    """Return channel, type tag and bytes of the largest stored value of a thread."""
    channel, tag, blob = _one(address, LARGEST_BLOB, thread)
    return channel, tag, bytes(blob)


def _one(address: str, query: LiteralString, thread: str) -> tuple[Any, ...]:
    with psycopg.connect(address) as connection:
        row = connection.execute(query, (thread,)).fetchone()
    assert row is not None
    return row


def _rows(connection: psycopg.Connection[Any]) -> Iterator[str]:
    for names in connection.execute(OUR_TABLES).fetchall():
        query = sql.SQL("SELECT t::text FROM {} AS t").format(sql.Identifier(*names))
        for (row,) in connection.execute(query):
            yield row


def _value(client: Redis, key: bytes) -> object:
    readers = {
        b"string": lambda: client.get(key),
        b"hash": lambda: client.hgetall(key),
        b"list": lambda: client.lrange(key, 0, -1),
        b"set": lambda: client.smembers(key),
        b"zset": lambda: client.zrange(key, 0, -1, withscores=True),
        b"stream": lambda: client.xrange(key),
    }
    kind = client.type(key)
    return readers[kind]() if kind in readers else None  # it expired meanwhile
