"""
Every statement on the table of items that wait for their vectors.

A row goes with its item, and is replaced with it: by `since` it is known for which put
it stands. Whoever takes it holds no lock on it while the embedder is asked; for so long
nobody else takes it.
"""

from typing import LiteralString

from langgraph_vat._durable.namespaces import ORDER

TABLE: dict[str, str] = {
    "vat_store_pending": "prefix key paths since attempts error tried_at taken_until due_at"
}

SCHEMA: tuple[LiteralString, ...] = (
    """
CREATE TABLE IF NOT EXISTS vat_store_pending (
    prefix TEXT NOT NULL,
    key TEXT NOT NULL,
    paths JSONB,
    since TIMESTAMPTZ NOT NULL DEFAULT now(),
    attempts INT NOT NULL DEFAULT 0,
    error TEXT NOT NULL,
    tried_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    taken_until TIMESTAMPTZ NOT NULL DEFAULT '-infinity',
    due_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (prefix, key),
    FOREIGN KEY (prefix, key) REFERENCES store (prefix, key) ON DELETE CASCADE
)""",
    "CREATE INDEX IF NOT EXISTS vat_store_pending_due_at ON vat_store_pending (due_at)",
)

# When a pass over the queue begins: it takes what was not tried since.
NOW: LiteralString = "SELECT now()"

# What is due by index vat_store_pending_due_at, for a while: whoever dies has lost it then.
TAKE: LiteralString = """
WITH n AS MATERIALIZED (
    SELECT prefix, key FROM vat_store_pending
    WHERE due_at <= %(due)s::timestamptz AND tried_at < %(begun)s AND taken_until <= now()
    ORDER BY due_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
UPDATE vat_store_pending p
SET attempts = p.attempts + 1, tried_at = now(),
    taken_until = now() + %(taken_s)s * interval '1 s',
    due_at = now() + least(600, 2 ^ least(p.attempts, 10)) * interval '1 s'
FROM n WHERE p.prefix = n.prefix AND p.key = n.key
RETURNING p.prefix, p.key, p.since, p.paths
"""

# What is locked by others goes, with its item or because that is put again.
GIVE_BACK: LiteralString = """
WITH n AS MATERIALIZED (
    SELECT p.prefix, p.key, n.error, n.is_due
    FROM unnest(%(prefixes)s::text[], %(keys)s::text[], %(sinces)s::timestamptz[],
                %(errors)s::text[], %(are_due)s::bool[])
        AS n (prefix, key, since, error, is_due)
    JOIN vat_store_pending p ON p.prefix = n.prefix AND p.key = n.key AND p.since = n.since
    FOR UPDATE OF p SKIP LOCKED
)
UPDATE vat_store_pending p
SET error = coalesce(n.error, p.error), taken_until = '-infinity',
    due_at = CASE WHEN n.is_due THEN now() ELSE p.due_at END
FROM n WHERE p.prefix = n.prefix AND p.key = n.key RETURNING 1
"""

# Items that nobody put again, or deleted, since they were read; in the order of all who lock them.
LOCK_UNCHANGED: LiteralString = (
    """
SELECT s.prefix, s.key
FROM unnest(%(prefixes)s::text[], %(keys)s::text[], %(updated)s::timestamptz[])
    AS n (prefix, key, updated_at)
JOIN store s ON s.prefix = n.prefix AND s.key = n.key
WHERE s.updated_at IS NOT DISTINCT FROM n.updated_at"""
    + ORDER
    + " FOR NO KEY UPDATE OF s"
)

# Whoever deletes the row has indexed the item; of two nobody does it twice.
FINISH: LiteralString = """
DELETE FROM vat_store_pending p
USING unnest(%(prefixes)s::text[], %(keys)s::text[], %(sinces)s::timestamptz[])
    AS n (prefix, key, since)
WHERE p.prefix = n.prefix AND p.key = n.key AND p.since = n.since
RETURNING p.prefix, p.key
"""

COUNT: LiteralString = """
SELECT count(*), min(since),
    coalesce((SELECT error FROM vat_store_pending ORDER BY tried_at DESC LIMIT 1), '')
FROM vat_store_pending
"""

# Of an item that is put again.
FORGET: LiteralString = """
DELETE FROM vat_store_pending p USING unnest(%(prefixes)s::text[], %(keys)s::text[])
    AS n (prefix, key)
WHERE p.prefix = n.prefix AND p.key = n.key
"""

ADD: LiteralString = """
INSERT INTO vat_store_pending (prefix, key, paths, error)
SELECT prefix, key, paths::jsonb, error
FROM unnest(%(prefixes)s::text[], %(keys)s::text[], %(paths)s::text[], %(errors)s::text[])
    AS n (prefix, key, paths, error)
"""
