"""
Every statement on the tables of the store.

`store` and `store_vectors` are langgraph-checkpoint-postgres's, with three
columns added: the exact value where jsonb cannot hold or may not show it, and
the exact TTL. An item that has expired is not there, whether swept or not.
"""

from typing import LiteralString

from psycopg import sql

from langgraph_vat._durable import embedding, namespaces
from langgraph_vat._durable.namespaces import LIVING as _ALIVE
from langgraph_vat._durable.namespaces import OF_ROOT as _OF_ROOT
from langgraph_vat._durable.namespaces import ORDER as _ORDER
from langgraph_vat._durable.namespaces import SCOPE as _SCOPE

SCHEMA: tuple[LiteralString, ...] = (
    "CREATE TABLE IF NOT EXISTS store_migrations (v INTEGER PRIMARY KEY)",
    """
CREATE TABLE IF NOT EXISTS store (
    prefix TEXT COLLATE "C" NOT NULL,
    key TEXT NOT NULL,
    value JSONB NOT NULL,
    created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
    updated_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
    expires_at TIMESTAMPTZ,
    ttl_minutes INT,
    PRIMARY KEY (prefix, key)
)""",
    "ALTER TABLE store ADD COLUMN IF NOT EXISTS expires_at TIMESTAMPTZ",
    "ALTER TABLE store ADD COLUMN IF NOT EXISTS ttl_minutes INT",
    """
CREATE INDEX IF NOT EXISTS idx_store_expires_at ON store (expires_at)
WHERE expires_at IS NOT NULL""",
    "INSERT INTO store_migrations (v) SELECT generate_series(0, 3) ON CONFLICT DO NOTHING",
    """
ALTER TABLE store
    ADD COLUMN IF NOT EXISTS vat_type TEXT,
    ADD COLUMN IF NOT EXISTS vat_value BYTEA,
    ADD COLUMN IF NOT EXISTS vat_ttl DOUBLE PRECISION""",
    "CREATE TABLE IF NOT EXISTS vat_store_keys (root TEXT PRIMARY KEY, data_key BYTEA NOT NULL)",
    namespaces.INDEX,
)

# What the statements name.
TABLES = {
    "store": "prefix key value created_at updated_at expires_at ttl_minutes vat_type vat_value"
    " vat_ttl",
    "vat_store_keys": "root data_key",
}
VECTOR_TABLES = {
    **TABLES,
    "store_vectors": "prefix key field_name embedding",
    **embedding.TABLE,
}

# The type of the vectors as the table has it, such as vector(384).
VECTOR_COLUMN: LiteralString = """
SELECT format_type(atttypid, atttypmod) FROM pg_attribute
WHERE attrelid = to_regclass('store_vectors') AND attname = 'embedding'
"""

BLOCKERS: LiteralString = """
SELECT DISTINCT a.pid, coalesce(nullif(a.application_name, ''), 'unnamed'), a.state
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.relation IN (to_regclass('store'), to_regclass('store_vectors'))
AND a.pid <> pg_backend_pid()
"""

# Where the extension is, and whether its types are found there.
FIND_EXTENSION: LiteralString = """
SELECT n.nspname, n.nspname = ANY(current_schemas(true))
FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'
"""
# One for all schemas of a database.
CREATE_EXTENSION: LiteralString = "CREATE EXTENSION IF NOT EXISTS vector SCHEMA public"


def vector_schema(column: str, kind: str, opclass: str, options: str) -> list[sql.Composable]:
    """Return the statements that make the table of vectors and its index."""
    create = sql.SQL("""
CREATE TABLE IF NOT EXISTS store_vectors (
    prefix TEXT NOT NULL,
    key TEXT NOT NULL,
    field_name TEXT NOT NULL,
    embedding {},
    created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
    updated_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (prefix, key, field_name),
    FOREIGN KEY (prefix, key) REFERENCES store (prefix, key) ON DELETE CASCADE
)""").format(sql.SQL(column))
    statements: list[sql.Composable] = [
        sql.SQL("CREATE TABLE IF NOT EXISTS vector_migrations (v INTEGER PRIMARY KEY)"),
        create,
        # It went with the extension, if somebody dropped that.
        sql.SQL("ALTER TABLE store_vectors ADD COLUMN IF NOT EXISTS embedding {}").format(
            sql.SQL(column)
        ),
    ]
    if kind != "flat":
        index = sql.SQL("""
CREATE INDEX IF NOT EXISTS store_vectors_embedding_idx ON store_vectors
USING {} (embedding {}){}""")
        parts = (sql.SQL(part) for part in (kind, opclass, options))
        statements.append(index.format(*parts))
    statements.append(
        sql.SQL("INSERT INTO vector_migrations SELECT generate_series(0, 2) ON CONFLICT DO NOTHING")
    )
    return statements


FIND_KEYS: LiteralString = "SELECT root, data_key FROM vat_store_keys WHERE root = ANY(%(roots)s)"

# Of two processes that add a key at once, both get the first one's. One that was
# destroyed makes room for another when nothing is left that it sealed.
ADD_KEY: LiteralString = (
    """
INSERT INTO vat_store_keys AS k (root, data_key) VALUES (%(root)s, %(data_key)s)
ON CONFLICT (root) DO UPDATE SET data_key = CASE
    WHEN k.data_key <> '' OR EXISTS (SELECT FROM store s WHERE """
    + _OF_ROOT
    + """) THEN k.data_key
    ELSE excluded.data_key
END
RETURNING data_key
"""
)

# What begins so: whether a root has a data key is decided alone, and holds for all who put
# something there until they commit. As many locks as a batch can hold whatever it puts: some
# roots share one.
_GUARD: LiteralString = "hashtext(root) & 1023"
_GUARDS: LiteralString = "hashtext('langgraph_vat root')"
GUARD_ROOTS: LiteralString = (
    "SELECT pg_advisory_xact_lock_shared("
    + _GUARDS
    + ", r.guard) FROM (SELECT DISTINCT "
    + _GUARD
    + " AS guard FROM unnest(%(roots)s::text[]) AS n (root) ORDER BY 1) AS r"
)
GUARD_ROOT_ALONE: LiteralString = (
    "SELECT pg_advisory_xact_lock("
    + _GUARDS
    + ", "
    + _GUARD
    + ") FROM (VALUES (%(root)s::text)) AS n (root)"
)

# Of these roots those that have items, and no data key. Two ranges, as in `namespaces`: each is
# looked up, however many items there are.
PLAIN_ROOTS: LiteralString = (
    """
SELECT r.root FROM unnest(%(roots)s::text[]) AS r (root)
WHERE NOT EXISTS (SELECT FROM vat_store_keys k WHERE k.root = r.root)
AND (EXISTS (SELECT FROM store s WHERE s.prefix COLLATE "C" = r.root AND """
    + _ALIVE
    + """)
    OR EXISTS (SELECT FROM store s WHERE s.prefix COLLATE "C" >= r.root || '.'
               AND s.prefix COLLATE "C" < r.root || '/' AND """
    + _ALIVE
    + """))
"""
)

# What has expired is not left in the clear beside a data key. One that is refreshed just now is
# waited for, and lives.
SWEEP_ROOT: LiteralString = (
    """
DELETE FROM store s USING (
    SELECT s.prefix, s.key FROM store s WHERE s.expires_at <= now() AND """
    + _OF_ROOT
    + _ORDER
    + """ FOR UPDATE
) AS n
WHERE s.prefix = n.prefix AND s.key = n.key
"""
)

# A page of those of a root that gets a data key.
PLAIN_ITEMS: LiteralString = (
    "SELECT s.prefix, s.key, s.value, s.vat_type, s.vat_value FROM store s WHERE "
    + namespaces.NEXT
    + namespaces.IN_ORDER
    + " FOR UPDATE"
)

SEAL_ITEMS: LiteralString = """
UPDATE store s SET value = n.value::jsonb, vat_type = n.type, vat_value = n.exact
FROM unnest(%(prefixes)s::text[], %(keys)s::text[], %(values)s::text[], %(types)s::text[],
            %(exacts)s::bytea[])
    AS n (prefix, key, value, type, exact)
WHERE s.prefix = n.prefix AND s.key = n.key
"""

LOCK_KEY: LiteralString = (
    "SELECT data_key FROM vat_store_keys WHERE root = %(root)s AND data_key <> '' FOR UPDATE"
)

SET_KEY: LiteralString = """
UPDATE vat_store_keys SET data_key = %(data_key)s WHERE root = %(root)s AND data_key <> ''
RETURNING root
"""

SEALED_ROOTS: LiteralString = """
SELECT root FROM vat_store_keys WHERE root > %(after)s AND data_key <> ''
AND (%(only)s = '' OR root = %(only)s) ORDER BY root LIMIT %(limit)s
"""

# Items that were sealed by another data key than the one whose messages begin so.
SEALED_ITEMS: LiteralString = (
    """
SELECT s.prefix, s.key, s.vat_type, s.vat_value FROM store s
WHERE substr(s.vat_value, 1, length(%(header)s)) <> %(header)s AND """
    + _OF_ROOT
    + _ORDER
    + " LIMIT %(limit)s OFFSET %(left)s FOR UPDATE"
)

RESEAL_ITEMS: LiteralString = """
UPDATE store s SET vat_type = n.type, vat_value = n.exact
FROM unnest(%(prefixes)s::text[], %(keys)s::text[], %(types)s::text[], %(exacts)s::bytea[])
    AS n (prefix, key, type, exact)
WHERE s.prefix = n.prefix AND s.key = n.key
"""

SELECT_KEYS: LiteralString = """
SELECT root, data_key FROM vat_store_keys
WHERE root > %(after)s AND data_key <> '' AND (%(only)s = '' OR root = %(only)s)
ORDER BY root LIMIT %(limit)s FOR UPDATE
"""

REPLACE_KEYS: LiteralString = """
UPDATE vat_store_keys k SET data_key = n.data_key
FROM unnest(%(owners)s::text[], %(data_keys)s::bytea[]) AS n (root, data_key)
WHERE k.root = n.root
"""

# Beside the roots, under the name that none has.
SELECT_INDEX_KEY: LiteralString = "SELECT data_key FROM vat_store_keys WHERE root = ''"

ADD_INDEX_KEY: LiteralString = """
INSERT INTO vat_store_keys AS k (root, data_key) VALUES ('', %(index_key)s)
ON CONFLICT (root) DO UPDATE SET data_key = k.data_key RETURNING data_key
"""

LOCK_INDEX_KEY: LiteralString = """
SELECT root, data_key FROM vat_store_keys
WHERE root = '' AND root >= %(after)s LIMIT %(limit)s FOR UPDATE
"""

FORGET_TOKENS: LiteralString = (
    """
UPDATE store s SET value = s.value || jsonb_build_object('vat_blind', (
    SELECT jsonb_object_agg(t.key, NULL) FROM jsonb_each(s.value -> 'vat_blind') AS t
))
WHERE s.vat_value IS NOT NULL AND jsonb_typeof(s.value -> 'vat_blind') = 'object'
AND s.value -> 'vat_blind' <> '{}' AND """
    + _OF_ROOT
)

# What was put before a field was declared.
ADD_TOKENS: LiteralString = """
UPDATE store s SET value = s.value || jsonb_build_object(
    'vat_blind', coalesce(s.value -> 'vat_blind', '{}') || n.tokens::jsonb
)
FROM unnest(%(prefixes)s::text[], %(keys)s::text[], %(tokens)s::text[]) AS n (prefix, key, tokens)
WHERE s.prefix = n.prefix AND s.key = n.key
"""

PLACE: LiteralString = "s.prefix, s.key"
ITEM: LiteralString = """
s.prefix, s.key, s.value, s.vat_type, s.vat_value, s.created_at, s.updated_at,
s.vat_ttl IS NOT NULL OR s.ttl_minutes IS NOT NULL"""

# By primary key, one lookup an item.
GET: LiteralString = (
    "SELECT"
    + ITEM
    + """
FROM unnest(%(prefixes)s::text[], %(keys)s::text[]) AS n (prefix, key)
JOIN store s ON s.prefix = n.prefix AND s.key = n.key
WHERE """
    + _ALIVE
)

REFRESH: LiteralString = (
    """
UPDATE store s
SET expires_at = now() + coalesce(s.vat_ttl, s.ttl_minutes) * interval '1 minute'
FROM (
    SELECT s.prefix, s.key FROM unnest(%(prefixes)s::text[], %(keys)s::text[]) AS n (prefix, key)
    JOIN store s ON s.prefix = n.prefix AND s.key = n.key
    WHERE coalesce(s.vat_ttl, s.ttl_minutes) IS NOT NULL"""
    + _ORDER
    + """ FOR NO KEY UPDATE OF s
) AS n
WHERE s.prefix = n.prefix AND s.key = n.key
"""
)

# An item put over an expired one is new. Nothing is put, and it fails, unless the roots have these
# very data keys, or none: nobody waits for its rows, so an error is all that is heard of it.
PUT: LiteralString = (
    """
INSERT INTO store AS s (prefix, key, value, vat_type, vat_value, vat_ttl, ttl_minutes, expires_at)
SELECT s.prefix, s.key, s.value::jsonb, s.type, s.exact, s.ttl, ceil(s.ttl),
    now() + s.ttl * interval '1 minute'
FROM unnest(%(prefixes)s::text[], %(keys)s::text[], %(values)s::text[], %(types)s::text[],
            %(exacts)s::bytea[], %(ttls)s::float8[])
    AS s (prefix, key, value, type, exact, ttl)
WHERE ln((NOT EXISTS (
    SELECT FROM unnest(%(roots)s::text[], %(data_keys)s::bytea[]) AS r (root, data_key)
    LEFT JOIN vat_store_keys k ON k.root = r.root
    WHERE k.data_key IS DISTINCT FROM r.data_key
))::int) = 0"""
    + _ORDER
    + """
ON CONFLICT (prefix, key) DO UPDATE
SET value = excluded.value, vat_type = excluded.vat_type, vat_value = excluded.vat_value,
    vat_ttl = excluded.vat_ttl, ttl_minutes = excluded.ttl_minutes,
    expires_at = excluded.expires_at, updated_at = now(),
    created_at = CASE WHEN s.expires_at <= now() THEN now() ELSE s.created_at END
"""
)

DELETE: LiteralString = (
    """
DELETE FROM store s USING (
    SELECT s.prefix, s.key FROM unnest(%(prefixes)s::text[], %(keys)s::text[]) AS n (prefix, key)
    JOIN store s ON s.prefix = n.prefix AND s.key = n.key"""
    + _ORDER
    + """ FOR UPDATE OF s
) AS n
WHERE s.prefix = n.prefix AND s.key = n.key
"""
)

DELETE_VECTORS: LiteralString = """
DELETE FROM store_vectors v USING unnest(%(prefixes)s::text[], %(keys)s::text[]) AS n (prefix, key)
WHERE v.prefix = n.prefix AND v.key = n.key
"""

INSERT_VECTORS = """
INSERT INTO store_vectors (prefix, key, field_name, embedding)
SELECT prefix, key, field, embedding::{type}
FROM unnest(%(prefixes)s::text[], %(keys)s::text[], %(fields)s::text[], %(embeddings)s::text[])
    AS n (prefix, key, field, embedding)
"""

SWEEP: LiteralString = """
DELETE FROM store s USING (
    SELECT prefix, key FROM store
    WHERE expires_at <= now() AND (%(only)s = '' OR prefix COLLATE "C" >= %(only)s || '.'
                                   AND prefix COLLATE "C" < %(only)s || '/')
    LIMIT 1000 FOR UPDATE SKIP LOCKED
) AS n
WHERE s.prefix = n.prefix AND s.key = n.key RETURNING 1
"""

LIST: LiteralString = (
    "SELECT {columns}, NULL::float8 FROM store s WHERE "
    + _SCOPE
    + """ AND {filter}
ORDER BY s.updated_at DESC, s.prefix, s.key LIMIT %(limit)s OFFSET %(offset)s"""
)

# Every candidate's best vector, then those without any; by cosine a vector of zeros is as
# none. Each row tells how many candidates there are; if they are more than `few`, that alone.
# They are joined one by one: no estimate of how many pass a filter can make it read all vectors.
EXACT: LiteralString = (
    """
WITH candidates AS MATERIALIZED (
    SELECT s.prefix, s.key, s.updated_at FROM store s WHERE """
    + _SCOPE
    + """ AND {filter} LIMIT %(few)s::bigint + 1
), counted AS MATERIALIZED (SELECT count(*) AS candidates FROM candidates),
best AS (
    SELECT c.prefix, c.key, c.updated_at, nullif(min(v.distance), 'NaN') AS distance
    FROM candidates c LEFT JOIN LATERAL (
        SELECT v.embedding {operator} (SELECT %(query)s::{type}) AS distance FROM store_vectors v
        WHERE v.prefix = c.prefix COLLATE "default" AND v.key = c.key OFFSET 0
    ) AS v ON true
    WHERE (SELECT candidates FROM counted) <= %(few)s
    GROUP BY c.prefix, c.key, c.updated_at
    ORDER BY distance NULLS LAST, c.updated_at DESC, c.prefix, c.key
    LIMIT %(limit)s OFFSET %(offset)s
)
SELECT {columns}, b.distance, n.candidates
FROM counted n LEFT JOIN (best b JOIN store s ON s.prefix = b.prefix AND s.key = b.key) ON true
ORDER BY b.distance NULLS LAST, b.updated_at DESC, b.prefix, b.key"""
)

# Nearest vectors through the index, which goes on until enough pass the conditions. The query
# is a subquery: planned once for all, its text would be parsed again for each row.
ITERATIVE_SCAN: LiteralString = "SET LOCAL hnsw.iterative_scan = strict_order"
NEAREST: LiteralString = (
    """
SELECT {columns}, nullif(v.embedding {operator} (SELECT %(query)s::{type}), 'NaN')
FROM store_vectors v JOIN store s ON s.prefix = v.prefix AND s.key = v.key
WHERE """
    + _SCOPE
    + """ AND {filter}
ORDER BY v.embedding {operator} (SELECT %(query)s::{type}) LIMIT %(limit)s"""
)
