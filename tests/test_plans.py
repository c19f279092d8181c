"""
What a question costs does not depend on how much else there is.

Postgres says how many rows it looked at, on a thread with a long history and after
VACUUM ANALYZE, when its planner knows what it is about.
"""

from collections.abc import Iterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.sql import SQL, Composed

from langgraph_vat import HybridSaver, Keyring
from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable.blind import page_by_tokens

STEPS = 3_000
FILL = (
    """
INSERT INTO vat_threads (thread_id, generation, steps, metadata, updated_at)
SELECT 'other ' || n, gen_random_uuid(), 1, '{"user": "else"}', now() - n * interval '1 s'
FROM generate_series(1, %(steps)s) AS n
""",
    """
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id,
                         checkpoint, metadata)
SELECT 'long', '', lpad(n::text, 16, '0'), lpad((n - 1)::text, 16, '0'),
    jsonb_build_object('v', 4, 'channel_versions', jsonb_build_object('a', lpad(n::text, 32, '0'),
        'b', lpad((n - 1)::text, 32, '0'))),
    jsonb_build_object('user', CASE WHEN n = 7 THEN 'me' ELSE 'else' END, 'vat_blind',
        jsonb_build_object('owner', CASE WHEN n = 7 THEN '7f' ELSE '00' END,
                           'plan', (n %% 100)::text))
FROM generate_series(1, %(steps)s) AS n
""",
    """
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob, vat_step,
                              vat_bases)
SELECT 'long', '', channel, lpad(n::text, 32, '0'), 'bytes', 'x', 1,
    ARRAY[lpad((n - n %% 64)::text, 32, '0')]
FROM unnest(ARRAY['a', 'b']) AS c (channel), generate_series(1, %(steps)s) AS n
""",
    """
INSERT INTO checkpoint_writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, channel,
                               type, blob)
SELECT 'long', '', lpad(n::text, 16, '0'), 'task', 0, 'a', 'bytes', 'x'
FROM generate_series(1, %(steps)s) AS n
""",
    "VACUUM ANALYZE",
)
NOTHING: dict[str, Any] = dict.fromkeys(
    ("thread", "namespace", "checkpoint", "before", "after_id", "after_thread", "after_namespace")
) | {"filter": "{}", "exact": "{}", "prefix": "vat-tenant:", "scoped": False, "limit": 10}
OWNER, BOTH = '{"vat_blind": {"owner": "7f"}}', '{"vat_blind": {"owner": "7f", "plan": "7"}}'
TOKENS = {**NOTHING, "filter_0": "{}", "filter_1": OWNER, "filter_2": BOTH}
LONG = {"thread": "long", "namespace": ""}
MIDDLE = f"{STEPS // 2:016}"
QUESTIONS: dict[str, tuple[LiteralString | Composed, dict[str, Any]]] = {
    "the newest": (sql.SELECT_LATEST, LONG),
    "one by its id": (sql.SELECT_ONE, {**LONG, "checkpoint": MIDDLE}),
    "a page of a thread": (sql.SELECT_PAGE, {**NOTHING, **LONG}),
    "a page before one": (sql.SELECT_PAGE, {**NOTHING, **LONG, "before": MIDDLE}),
    "a page of all threads": (sql.SELECT_PAGE, NOTHING),
    "a page of few": (sql.SELECT_LIGHT_PAGE, {**NOTHING, "filter": '{"user": "me"}'}),
    "a page by a token": (page_by_tokens(SQL(sql.LIGHT_SNAPSHOT), ["owner"]), TOKENS),
    "a page by two, with values": (page_by_tokens(SQL(sql.SNAPSHOT), ["owner", "plan"]), TOKENS),
    "threads": (
        sql.SEARCH_THREADS,
        {"tenant": "", "metadata": "{}", "before": "infinity", "before_id": "", "limit": 10},
    ),
}


@pytest.fixture
def long(postgres_url) -> Iterator[psycopg.Connection]:
    with HybridSaver.from_conn_string(
        postgres_url, keyring=Keyring.generate(), filterable_metadata=("owner", "plan")
    ):
        pass
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for statement in FILL:
            connection.execute(statement, {"steps": STEPS})
        yield connection


def looked_at(node: dict[str, Any]) -> float:
    """Return how many rows of tables a plan read, those that it dropped again included."""
    own = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
    own += node.get("Rows Removed by Index Recheck", 0)
    rows = own * node["Actual Loops"] if "Relation Name" in node else 0
    return rows + sum(looked_at(inner) for inner in node.get("Plans", ()))


def looked_at_by(long: psycopg.Connection, question: str) -> float:
    statement, params = QUESTIONS[question]
    asked = statement if isinstance(statement, Composed) else SQL(statement)
    explain = SQL("EXPLAIN (ANALYZE, FORMAT JSON) ") + asked
    (plan,) = long.execute(explain, params).fetchone()
    return looked_at(plan[0]["Plan"])


def test_as_few_rows_are_looked_at_as_are_wanted(long):
    long.execute("SET plan_cache_mode = force_custom_plan")
    found = {question: looked_at_by(long, question) for question in QUESTIONS}
    long.execute("SET plan_cache_mode = force_generic_plan")
    for question in ("the newest", "one by its id"):  # the others are planned anew each time
        found[f"{question}, planned for all"] = looked_at_by(long, question)
    assert {question: rows for question, rows in found.items() if rows > 100} == {}
