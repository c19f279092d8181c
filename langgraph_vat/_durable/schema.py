"""
The checkpoint tables, one migration after another.

LangGraph's tables come first, as langgraph-checkpoint-postgres 3.x defines
them, so its databases open in place and it can open ours. What we add is
additional columns that may be null, and tables whose names begin with
``vat_``. Every statement may run again.

A fresh table compares checkpoint ids by byte, the order of LangGraph's
InMemorySaver; with LangGraph's own ids any collation gives the same order.
"""

from typing import LiteralString

from langgraph_vat._durable import checkpoints

LOCK: LiteralString = "SELECT pg_advisory_xact_lock(hashtext('langgraph_vat'), 0)"
LOCK_TIMEOUT: LiteralString = "SET LOCAL lock_timeout = '10s'"

# Versions of langgraph-checkpoint-postgres that the statements below include.
LANGGRAPH_VERSION = 9
VERSION = 5

# In the schema that is ours, and in no other on the search path. It reads a table: a
# statement that reads none may not see what another session made a moment ago.
HAS_SCHEMA: LiteralString = """
SELECT EXISTS (
    SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = current_schema() AND c.relname = 'vat_schema'
)
"""
HAS_SEALED: LiteralString = "SELECT EXISTS (SELECT FROM vat_threads WHERE data_key IS NOT NULL)"
SELECT_VERSION: LiteralString = "SELECT coalesce(max(version), 0) FROM vat_schema"
# Who makes a schema change wait: for the message of a setup that gave up.
BLOCKERS: LiteralString = """
SELECT DISTINCT a.pid, coalesce(nullif(a.application_name, ''), 'unnamed'), a.state
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.relation IN (to_regclass('checkpoints'), to_regclass('checkpoint_blobs'),
                     to_regclass('checkpoint_writes'))
AND a.pid <> pg_backend_pid()
"""

# What the statements name.
TABLES = {
    "checkpoints": "thread_id checkpoint_ns checkpoint_id parent_checkpoint_id type checkpoint"
    " metadata vat_type vat_exact",
    "checkpoint_blobs": "thread_id checkpoint_ns channel version type blob vat_step vat_bases",
    "checkpoint_writes": "thread_id checkpoint_ns checkpoint_id task_id idx channel type blob"
    " task_path vat_epoch vat_bases",
    "vat_threads": "thread_id generation history data_key created_at updated_at steps bytes"
    " head_id metadata retention kept kept_last flushed tenant",
    "vat_floors": "thread_id checkpoint_ns floor",
    "vat_deleted_runs": "run_id deleted_at",
    "vat_state": "epoch hot_tier hot_prefix hot_runs degraded_until lease_s swept_at index_key",
    "vat_schema": "version",
}

SELECT_SCHEMA: LiteralString = """
SELECT n.oid IS NOT NULL, coalesce(has_schema_privilege(n.oid, 'USAGE'), false)
FROM (VALUES (%(schema)s)) AS s (name) LEFT JOIN pg_namespace n ON n.nspname = s.name
"""

CREATE_SCHEMA: LiteralString = """
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = {text}) THEN
        CREATE SCHEMA {name};
    END IF;
EXCEPTION WHEN duplicate_schema OR unique_violation THEN NULL;
END $$"""

# Null for a table that is not there.
SELECT_COLUMNS: LiteralString = """
SELECT name, CASE WHEN to_regclass(place) IS NOT NULL THEN ARRAY(
    SELECT attname::text FROM pg_attribute
    WHERE attrelid = to_regclass(place) AND attnum > 0 AND NOT attisdropped
) END
FROM unnest(%(tables)s::text[]) AS t (name)
CROSS JOIN LATERAL (SELECT quote_ident(current_schema()) || '.' || name) AS p (place)
"""

# What the role may not do with these tables.
LACKING: LiteralString = """
SELECT name, ARRAY(
    SELECT right_ FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS r (right_)
    WHERE NOT has_table_privilege(to_regclass(place), right_)
    AND (name <> 'vat_schema' OR right_ = 'SELECT')
)
FROM unnest(%(tables)s::text[]) AS t (name)
CROSS JOIN LATERAL (SELECT quote_ident(current_schema()) || '.' || name) AS p (place)
WHERE to_regclass(place) IS NOT NULL
"""

# Tables that let anything in: twice, or past Redis.
UNGUARDED: LiteralString = """
SELECT name, NOT EXISTS (
    SELECT FROM pg_constraint WHERE conrelid = to_regclass(place) AND contype = 'p'
), strpos(name, 'vat_') = 0 AND NOT EXISTS (
    SELECT FROM pg_trigger WHERE tgrelid = to_regclass(place)
    AND tgname = 'vat_refuse_strangers' AND tgenabled <> 'D'
)
FROM unnest(%(tables)s::text[]) AS t (name)
CROSS JOIN LATERAL (SELECT quote_ident(current_schema()) || '.' || name) AS p (place)
WHERE to_regclass(place) IS NOT NULL
"""

HAS_STATE: LiteralString = "SELECT FROM vat_state"

MIGRATION_1: tuple[LiteralString, ...] = (
    "CREATE TABLE IF NOT EXISTS checkpoint_migrations (v INTEGER PRIMARY KEY)",
    """
CREATE TABLE IF NOT EXISTS checkpoints (
    thread_id TEXT NOT NULL,
    checkpoint_ns TEXT NOT NULL DEFAULT '',
    checkpoint_id TEXT COLLATE "C" NOT NULL,
    parent_checkpoint_id TEXT COLLATE "C",
    type TEXT,
    checkpoint JSONB NOT NULL,
    metadata JSONB NOT NULL DEFAULT '{}',
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id)
)""",
    """
CREATE TABLE IF NOT EXISTS checkpoint_blobs (
    thread_id TEXT NOT NULL,
    checkpoint_ns TEXT NOT NULL DEFAULT '',
    channel TEXT NOT NULL,
    version TEXT NOT NULL,
    type TEXT NOT NULL,
    blob BYTEA,
    PRIMARY KEY (thread_id, checkpoint_ns, channel, version)
)""",
    """
CREATE TABLE IF NOT EXISTS checkpoint_writes (
    thread_id TEXT NOT NULL,
    checkpoint_ns TEXT NOT NULL DEFAULT '',
    checkpoint_id TEXT COLLATE "C" NOT NULL,
    task_id TEXT NOT NULL,
    idx INTEGER NOT NULL,
    channel TEXT NOT NULL,
    type TEXT,
    blob BYTEA NOT NULL,
    task_path TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id, task_id, idx)
)""",
    # A database of langgraph-checkpoint-postgres 2.x may lack these.
    "ALTER TABLE checkpoint_blobs ALTER COLUMN blob DROP NOT NULL",
    "ALTER TABLE checkpoint_writes ADD COLUMN IF NOT EXISTS task_path TEXT NOT NULL DEFAULT ''",
    """
INSERT INTO checkpoint_migrations (v) SELECT generate_series(0, 9) ON CONFLICT DO NOTHING""",
    # What JSON cannot hold exactly, or may not be read in the clear.
    """
ALTER TABLE checkpoints
    ADD COLUMN IF NOT EXISTS vat_type TEXT,
    ADD COLUMN IF NOT EXISTS vat_exact BYTEA""",
    "ALTER TABLE checkpoint_writes ADD COLUMN IF NOT EXISTS vat_epoch BIGINT",
    """
CREATE TABLE IF NOT EXISTS vat_threads (
    thread_id TEXT PRIMARY KEY,
    generation UUID NOT NULL,
    history BIGINT NOT NULL DEFAULT 0,
    data_key BYTEA,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT now()
)""",
    # Below its floor, an entry from before the prune stays away.
    """
CREATE TABLE IF NOT EXISTS vat_floors (
    thread_id TEXT NOT NULL,
    checkpoint_ns TEXT NOT NULL,
    floor TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (thread_id, checkpoint_ns)
)""",
    """
CREATE TABLE IF NOT EXISTS vat_deleted_runs (
    run_id TEXT PRIMARY KEY,
    deleted_at TIMESTAMPTZ NOT NULL DEFAULT now()
)""",
    # One row: what every process must agree on before it serves a head.
    """
CREATE TABLE IF NOT EXISTS vat_state (
    singleton BOOLEAN PRIMARY KEY DEFAULT true CHECK (singleton),
    epoch BIGINT NOT NULL DEFAULT 0,
    hot_tier UUID,
    hot_runs TEXT,
    degraded_until TIMESTAMPTZ
)""",
    "INSERT INTO vat_state DEFAULT VALUES ON CONFLICT DO NOTHING",
    """
CREATE TABLE IF NOT EXISTS vat_schema (
    version INTEGER PRIMARY KEY,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT now()
)""",
    "INSERT INTO vat_schema (version) VALUES (1) ON CONFLICT DO NOTHING",
)

# The longest time for which some process believes what it read of the row.
MIGRATION_2: tuple[LiteralString, ...] = (
    "ALTER TABLE vat_state ADD COLUMN IF NOT EXISTS lease_s FLOAT8 NOT NULL DEFAULT 0",
    "INSERT INTO vat_schema (version) VALUES (2) ON CONFLICT DO NOTHING",
)

HAS_INDEX: LiteralString = """
SELECT EXISTS (
    SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = current_schema() AND c.relname = %(name)s AND c.relkind = 'i'
)
"""

# What a value builds on that is kept as a patch: versions of its channel, the
# whole one first; and where it stands in its line.
MIGRATION_3: tuple[LiteralString, ...] = (
    """
ALTER TABLE checkpoint_blobs
    ADD COLUMN IF NOT EXISTS vat_step SMALLINT,
    ADD COLUMN IF NOT EXISTS vat_bases TEXT[]""",
    "ALTER TABLE checkpoint_writes ADD COLUMN IF NOT EXISTS vat_bases TEXT[]",
    "INSERT INTO vat_schema (version) VALUES (3) ON CONFLICT DO NOTHING",
)


def _guarded(table: LiteralString) -> tuple[LiteralString, ...]:
    return (
        "DROP TRIGGER IF EXISTS vat_refuse_strangers ON " + table,
        "CREATE TRIGGER vat_refuse_strangers BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON "
        + table
        + " FOR EACH STATEMENT"
        " WHEN (current_setting('langgraph_vat.writer', true) IS DISTINCT FROM 'hot')"
        " EXECUTE FUNCTION vat_refuse_strangers()",
    )


# The newest of all threads, and those whose metadata has something. On a large table
# somebody may rather have them made while others write.
INDEXES: tuple[LiteralString, ...] = (
    """
CREATE INDEX IF NOT EXISTS vat_checkpoints_newest
ON checkpoints (checkpoint_id, thread_id, checkpoint_ns)""",
    """
CREATE INDEX IF NOT EXISTS vat_checkpoints_metadata
ON checkpoints USING gin (metadata jsonb_path_ops)""",
)

# What is told of a thread, kept by the flush that writes it; a tenant is read out of
# the stored thread id.
_THREADS: tuple[LiteralString, ...] = (
    """
ALTER TABLE vat_threads
    ADD COLUMN IF NOT EXISTS steps BIGINT NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS bytes BIGINT NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS head_id TEXT COLLATE "C",
    ADD COLUMN IF NOT EXISTS metadata JSONB NOT NULL DEFAULT '{}',
    ADD COLUMN IF NOT EXISTS retention JSONB,
    ADD COLUMN IF NOT EXISTS kept BIGINT NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS kept_last BIGINT NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS flushed BYTEA[] NOT NULL DEFAULT '{}',
    ADD COLUMN IF NOT EXISTS tenant TEXT NOT NULL GENERATED ALWAYS AS (
        CASE WHEN thread_id ~ '^vat-tenant:[0-9]{1,3}:' THEN substr(
            thread_id, 13 + length(split_part(thread_id, ':', 2)),
            split_part(thread_id, ':', 2)::integer
        ) ELSE '' END
    ) STORED""",
    "CREATE INDEX IF NOT EXISTS vat_threads_active ON vat_threads (tenant, updated_at, thread_id)",
    """
CREATE INDEX IF NOT EXISTS vat_threads_metadata ON vat_threads
USING gin (metadata jsonb_path_ops) WHERE metadata <> '{}'""",
    "ALTER TABLE vat_state ADD COLUMN IF NOT EXISTS swept_at TIMESTAMPTZ",
    # Two processes with other prefixes would not see each other's steps.
    "ALTER TABLE vat_state ADD COLUMN IF NOT EXISTS hot_prefix TEXT",
    *INDEXES,
    checkpoints.RECOUNT_THREADS,
)

# Once Redis may hold what Postgres does not have yet, whoever does not know of it
# must not write here. By the definer's rights: a stranger's role may know nothing of ours.
MIGRATION_4: tuple[LiteralString, ...] = (
    """
CREATE OR REPLACE FUNCTION vat_refuse_strangers() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $vat$
DECLARE
    is_hot boolean;
BEGIN
    EXECUTE format('SELECT hot_tier IS NOT NULL FROM %I.vat_state', TG_TABLE_SCHEMA) INTO is_hot;
    IF is_hot THEN
        RAISE EXCEPTION USING ERRCODE = 'LGV01', MESSAGE =
            'langgraph-vat keeps newer checkpoints of this database in Redis, so nothing is'
            ' written past it: others would go on from an older state. Nothing was written.',
            HINT = 'Use HybridSaver with the redis= URL of the other processes.';
    END IF;
    RETURN NULL;
END $vat$""",
    *_THREADS,
    *_guarded("checkpoints"),
    *_guarded("checkpoint_blobs"),
    *_guarded("checkpoint_writes"),
    # Whoever empties all tables, as test suites do, would not know what else it means.
    """
CREATE OR REPLACE FUNCTION vat_keep_state() RETURNS trigger LANGUAGE plpgsql AS $vat$
BEGIN
    RAISE EXCEPTION 'the row of vat_state says which Redis holds steps of this database, so it'
        ' stays. Drop the schema, or delete threads by HybridSaver.delete_thread.';
END $vat$""",
    "DROP TRIGGER IF EXISTS vat_keep_state ON vat_state",
    """
CREATE TRIGGER vat_keep_state BEFORE DELETE OR TRUNCATE ON vat_state
FOR EACH STATEMENT EXECUTE FUNCTION vat_keep_state()""",
    "INSERT INTO vat_schema (version) VALUES (4) ON CONFLICT DO NOTHING",
)

# What the tokens of sealed metadata are made with.
MIGRATION_5: tuple[LiteralString, ...] = (
    "ALTER TABLE vat_state ADD COLUMN IF NOT EXISTS index_key BYTEA",
    "INSERT INTO vat_schema (version) VALUES (5) ON CONFLICT DO NOTHING",
)

MIGRATIONS: tuple[tuple[LiteralString, ...], ...] = (
    MIGRATION_1,
    MIGRATION_2,
    MIGRATION_3,
    MIGRATION_4,
    MIGRATION_5,
)
