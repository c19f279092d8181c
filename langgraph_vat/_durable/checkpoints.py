"""
Every statement on the checkpoint tables.

The tables are LangGraph's own (`checkpoints`, `checkpoint_blobs`,
`checkpoint_writes`) with two columns added, and four of ours. Unless a
comment says otherwise a statement is served by the primary key of the table
it names: each begins with ``thread_id``. The schema is chosen by the
connection's search path, so the statements are constants.
"""

from typing import LiteralString

# --- threads -------------------------------------------------------------

# One row, always: the fence and data key, or whether there are rows without
# one, which PostgresSaver wrote. Their first reader adds the fence.
FIND_THREAD: LiteralString = """
SELECT t.generation::text, t.history, t.data_key, t.thread_id IS NULL AND (
    EXISTS (SELECT FROM checkpoints WHERE thread_id = %(thread)s)
    OR EXISTS (SELECT FROM checkpoint_writes WHERE thread_id = %(thread)s)
    OR EXISTS (SELECT FROM checkpoint_blobs WHERE thread_id = %(thread)s)
)
FROM (VALUES (1)) AS one
LEFT JOIN vat_threads t ON t.thread_id = %(thread)s
"""

FIND_THREADS: LiteralString = """
SELECT thread_id, generation::text, history, data_key FROM vat_threads
WHERE thread_id = ANY(%(threads)s)
"""

# Of two processes that add a thread at once, both get the first one's fence and key.
ADD_THREAD: LiteralString = """
INSERT INTO vat_threads (thread_id, generation, data_key)
VALUES (%(thread)s, %(generation)s, %(data_key)s)
ON CONFLICT (thread_id) DO UPDATE SET thread_id = excluded.thread_id
RETURNING generation::text, history, data_key
"""

HAS_CHECKPOINT: LiteralString = """
SELECT EXISTS (
    SELECT FROM checkpoints WHERE thread_id = %(thread)s
    AND checkpoint_ns = %(namespace)s AND checkpoint_id = %(checkpoint)s
) OR EXISTS (
    SELECT FROM vat_floors WHERE thread_id = %(thread)s
    AND checkpoint_ns = %(namespace)s AND floor > %(checkpoint)s
)
"""

SELECT_NEWEST_ID: LiteralString = """
SELECT checkpoint_id FROM checkpoints
WHERE thread_id = %(thread)s AND checkpoint_ns = %(namespace)s
ORDER BY checkpoint_id DESC LIMIT 1
"""

HAS_ROWS: LiteralString = """
SELECT EXISTS (SELECT FROM checkpoints WHERE thread_id = %(thread)s)
    OR EXISTS (SELECT FROM checkpoint_writes WHERE thread_id = %(thread)s)
"""

# The lock that orders a thread's flushes and changes of history. Sorted, so
# that two transactions never wait for each other.
LOCK_THREADS: LiteralString = """
SELECT thread_id, generation::text, history, flushed, data_key IS NOT NULL FROM vat_threads
WHERE thread_id = ANY(%(threads)s) ORDER BY thread_id FOR UPDATE
"""

TRY_LOCK_THREADS: LiteralString = """
SELECT thread_id, generation::text, history, flushed, data_key IS NOT NULL FROM vat_threads
WHERE thread_id = ANY(%(threads)s) ORDER BY thread_id FOR UPDATE SKIP LOCKED
"""

EXISTING_THREADS: LiteralString = """
SELECT thread_id FROM vat_threads WHERE thread_id = ANY(%(threads)s)
"""

# Reading keeps a thread, where the policy says so.
TOUCH_THREADS: LiteralString = """
UPDATE vat_threads SET updated_at = now() WHERE thread_id = ANY(%(threads)s) RETURNING thread_id
"""

# As flushes counted them, which is about right, or a recount.
SELECT_SIZE: LiteralString = "SELECT steps, bytes FROM vat_threads WHERE thread_id = %(thread)s"

_COUNTED: LiteralString = """
(SELECT count(*) FROM checkpoints c WHERE c.thread_id = t.thread_id),
coalesce((
    SELECT sum(octet_length(c.checkpoint::text) + octet_length(c.metadata::text)
               + coalesce(octet_length(c.vat_exact), 0))
    FROM checkpoints c WHERE c.thread_id = t.thread_id
), 0)
+ coalesce((
    SELECT sum(octet_length(b.blob)) FROM checkpoint_blobs b WHERE b.thread_id = t.thread_id
), 0)
+ coalesce((
    SELECT sum(octet_length(w.blob)) FROM checkpoint_writes w WHERE w.thread_id = t.thread_id
), 0)
"""

# After rows came or went otherwise than by a flush.
RECOUNT_THREADS: LiteralString = (
    "UPDATE vat_threads t SET kept = 0, (steps, bytes, head_id) = (SELECT"
    + _COUNTED
    + """, (
    SELECT max(c.checkpoint_id) FROM checkpoints c
    WHERE c.thread_id = t.thread_id AND c.checkpoint_ns = ''
))
"""
)
RECOUNT_THREAD: tuple[LiteralString, ...] = (
    RECOUNT_THREADS + "WHERE t.thread_id = %(thread)s",
    """
UPDATE vat_threads t SET metadata = coalesce((
    SELECT jsonb_object_agg(m.key, m.value ORDER BY c.checkpoint_id)
    FROM checkpoints c CROSS JOIN LATERAL jsonb_each(c.metadata) AS m
    WHERE c.thread_id = t.thread_id AND c.checkpoint_ns = '' AND m.key = ANY(%(shown)s::text[])
), '{}')
WHERE t.thread_id = %(thread)s
""",
)

RAISE_HISTORY: LiteralString = """
UPDATE vat_threads SET history = history + 1
WHERE thread_id = %(thread)s AND generation = %(generation)s AND history = %(history)s
RETURNING history
"""

SELECT_DATA_KEYS: LiteralString = """
SELECT thread_id, generation::text, data_key FROM vat_threads
WHERE data_key <> '' AND thread_id > %(after)s AND starts_with(thread_id, %(prefix)s)
ORDER BY thread_id LIMIT %(limit)s FOR UPDATE
"""

REPLACE_DATA_KEYS: LiteralString = """
UPDATE vat_threads t SET data_key = n.data_key
FROM unnest(%(owners)s::text[], %(data_keys)s::bytea[]) AS n (thread_id, data_key)
WHERE t.thread_id = n.thread_id
"""

SELECT_INDEX_KEY: LiteralString = """
SELECT index_key FROM vat_state WHERE index_key IS NOT NULL
"""

# Of two processes that add it at once, both get the first one's.
ADD_INDEX_KEY: LiteralString = """
UPDATE vat_state SET index_key = coalesce(index_key, %(index_key)s) RETURNING index_key
"""

# For a rotation, which goes by owners: there is one, without a name.
LOCK_INDEX_KEY: LiteralString = """
SELECT '', index_key FROM vat_state
WHERE index_key IS NOT NULL AND %(after)s = '' LIMIT %(limit)s FOR UPDATE
"""

REPLACE_INDEX_KEY: LiteralString = """
UPDATE vat_state SET index_key = n.index_key
FROM unnest(%(owners)s::text[], %(data_keys)s::bytea[]) AS n (owner, index_key)
"""

# Whoever took these steps still holds copies of them, and learns here that they are stored.
# He may never come: the newest are enough.
NOTE_FLUSHED: LiteralString = """
UPDATE vat_threads t SET flushed = (n.uids || t.flushed)[1:128]
FROM (
    SELECT thread_id, array_agg(uid) AS uids
    FROM unnest(%(threads)s::text[], %(uids)s::bytea[]) AS e (thread_id, uid) GROUP BY thread_id
) AS n
WHERE t.thread_id = n.thread_id
"""

# --- flush ---------------------------------------------------------------

# What a flush must know before it writes, in one answer: values that entries
# rely on and parents that they name and nobody stored, floors of pruned
# namespaces, runs that were deleted.
CHECK_ENTRIES: LiteralString = """
SELECT 'missing', n.thread_id, n.checkpoint_ns, n.channel, n.version
FROM unnest(%(need_threads)s::text[], %(need_namespaces)s::text[],
            %(need_channels)s::text[], %(need_versions)s::text[])
    AS n (thread_id, checkpoint_ns, channel, version)
WHERE NOT EXISTS (
    SELECT FROM checkpoint_blobs b
    WHERE b.thread_id = n.thread_id AND b.checkpoint_ns = n.checkpoint_ns
    AND b.channel = n.channel AND b.version = n.version
)
UNION ALL
SELECT 'orphan', n.thread_id, n.checkpoint_ns, n.parent, ''
FROM unnest(%(child_threads)s::text[], %(child_namespaces)s::text[], %(parents)s::text[])
    AS n (thread_id, checkpoint_ns, parent)
WHERE NOT EXISTS (
    SELECT FROM checkpoints c WHERE c.thread_id = n.thread_id
    AND c.checkpoint_ns = n.checkpoint_ns AND c.checkpoint_id = n.parent
) AND NOT EXISTS (
    SELECT FROM vat_floors f WHERE f.thread_id = n.thread_id
    AND f.checkpoint_ns = n.checkpoint_ns AND f.floor > n.parent
)
UNION ALL
SELECT 'floor', f.thread_id, f.checkpoint_ns, f.floor, ''
FROM vat_floors f WHERE f.thread_id = ANY(%(threads)s)
UNION ALL
SELECT 'run', r.run_id, '', '', ''
FROM vat_deleted_runs r WHERE r.run_id = ANY(%(runs)s)
"""

# A version's value never changes, so a conflict is the same entry come again;
# a caller that did reuse a version gets what it put last, as InMemorySaver does.
INSERT_BLOBS: LiteralString = """
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob,
                              vat_step, vat_bases)
SELECT thread_id, checkpoint_ns, channel, version, type, blob, step,
       (SELECT array_agg(v ORDER BY n)
        FROM jsonb_array_elements_text(bases::jsonb) WITH ORDINALITY AS b (v, n))
FROM unnest(%(threads)s::text[], %(namespaces)s::text[], %(channels)s::text[],
            %(versions)s::text[], %(types)s::text[], %(blobs)s::bytea[], %(steps)s::int[],
            %(bases)s::text[])
    AS e (thread_id, checkpoint_ns, channel, version, type, blob, step, bases)
ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO UPDATE
SET type = excluded.type, blob = excluded.blob,
    vat_step = excluded.vat_step, vat_bases = excluded.vat_bases
WHERE (checkpoint_blobs.blob, checkpoint_blobs.vat_step)
    IS DISTINCT FROM (excluded.blob, excluded.vat_step)
"""

INSERT_MISSING_BLOBS: LiteralString = """
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
SELECT * FROM unnest(%(threads)s::text[], %(namespaces)s::text[], %(channels)s::text[],
                     %(versions)s::text[], %(types)s::text[], %(blobs)s::bytea[])
ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING
"""

# With them what is told of the threads: an entry that comes again is not counted again.
INSERT_CHECKPOINTS: LiteralString = """
WITH stored AS (
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id,
                         checkpoint, metadata, vat_type, vat_exact)
SELECT thread_id, checkpoint_ns, checkpoint_id, nullif(parent, ''),
       checkpoint::jsonb, metadata::jsonb, nullif(type, ''), exact
FROM unnest(%(threads)s::text[], %(namespaces)s::text[], %(ids)s::text[], %(parents)s::text[],
            %(checkpoints)s::text[], %(metadata)s::text[], %(types)s::text[], %(exacts)s::bytea[])
    AS e (thread_id, checkpoint_ns, checkpoint_id, parent, checkpoint, metadata, type, exact)
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id) DO UPDATE
SET parent_checkpoint_id = excluded.parent_checkpoint_id, checkpoint = excluded.checkpoint,
    metadata = excluded.metadata, vat_type = excluded.vat_type, vat_exact = excluded.vat_exact
RETURNING thread_id, checkpoint_ns, checkpoint_id, metadata, xmax = 0 AS is_new
), counted AS (
    SELECT s.thread_id, count(*) FILTER (WHERE s.is_new) AS steps,
        max(s.checkpoint_id) FILTER (WHERE s.checkpoint_ns = '') AS head_id
    FROM stored s GROUP BY s.thread_id
), told AS (
    SELECT s.thread_id, jsonb_object_agg(m.key, m.value ORDER BY s.checkpoint_id) AS metadata
    FROM stored s CROSS JOIN LATERAL jsonb_each(s.metadata) AS m
    WHERE s.checkpoint_ns = '' AND m.key = ANY(%(shown)s::text[]) GROUP BY s.thread_id
)
UPDATE vat_threads t SET updated_at = now(), bytes = t.bytes + e.bytes,
    steps = t.steps + coalesce(c.steps, 0),
    head_id = greatest(t.head_id, c.head_id),
    metadata = CASE WHEN told.metadata IS NULL THEN t.metadata
        WHEN t.head_id > c.head_id THEN told.metadata || t.metadata
        ELSE t.metadata || told.metadata END
FROM unnest(%(touched)s::text[], %(sizes)s::bigint[]) AS e (thread_id, bytes)
LEFT JOIN counted c ON c.thread_id = e.thread_id
LEFT JOIN told ON told.thread_id = e.thread_id
WHERE t.thread_id = e.thread_id
"""

INSERT_FIRST_WRITES: LiteralString = """
INSERT INTO checkpoint_writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx,
                               task_path, channel, type, blob, vat_bases)
SELECT thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, blob,
       (SELECT array_agg(v ORDER BY n)
        FROM jsonb_array_elements_text(bases::jsonb) WITH ORDINALITY AS b (v, n))
FROM unnest(%(threads)s::text[], %(namespaces)s::text[], %(ids)s::text[], %(tasks)s::text[],
            %(idxs)s::int[], %(paths)s::text[], %(channels)s::text[], %(types)s::text[],
            %(blobs)s::bytea[], %(bases)s::text[])
    AS e (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, blob,
          bases)
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx) DO NOTHING
"""

# The last one taken, not the last one to arrive: a journal from before Redis
# failed may be flushed after later writes went past Redis.
INSERT_LAST_WRITES: LiteralString = """
INSERT INTO checkpoint_writes AS w (thread_id, checkpoint_ns, checkpoint_id, task_id, idx,
                                    task_path, channel, type, blob, vat_bases, vat_epoch)
SELECT thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, blob,
       (SELECT array_agg(v ORDER BY n)
        FROM jsonb_array_elements_text(bases::jsonb) WITH ORDINALITY AS b (v, n)), epoch
FROM unnest(%(threads)s::text[], %(namespaces)s::text[], %(ids)s::text[], %(tasks)s::text[],
            %(idxs)s::int[], %(paths)s::text[], %(channels)s::text[], %(types)s::text[],
            %(blobs)s::bytea[], %(bases)s::text[], %(epochs)s::bigint[])
    AS e (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, blob,
          bases, epoch)
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx) DO UPDATE
SET task_path = excluded.task_path, channel = excluded.channel,
    type = excluded.type, blob = excluded.blob, vat_bases = excluded.vat_bases,
    vat_epoch = excluded.vat_epoch
WHERE w.vat_epoch IS NULL OR w.vat_epoch <= excluded.vat_epoch
"""

# Of each channel the newest version that has a value, and those versions of the
# batch that are stored already; or, of a batch that is stored already, the newest
# one before it.
SELECT_LINES: LiteralString = """
SELECT 'newest', n.thread_id, n.checkpoint_ns, n.channel, b.version, coalesce(b.vat_step, 0),
    coalesce(b.vat_bases, '{}')
FROM (
    SELECT thread_id, checkpoint_ns, channel, min(version)
    FROM unnest(%(threads)s::text[], %(namespaces)s::text[], %(channels)s::text[],
                %(versions)s::text[]) AS e (thread_id, checkpoint_ns, channel, version)
    GROUP BY thread_id, checkpoint_ns, channel
) AS n (thread_id, checkpoint_ns, channel, first)
CROSS JOIN LATERAL (
    SELECT version, vat_step, vat_bases FROM checkpoint_blobs b
    WHERE b.thread_id = n.thread_id AND b.checkpoint_ns = n.checkpoint_ns
    AND b.channel = n.channel AND b.blob IS NOT NULL
    AND (b.version < n.first OR NOT %(is_stored)s) ORDER BY b.version DESC LIMIT 1
) AS b
UNION ALL
SELECT 'present', b.thread_id, b.checkpoint_ns, b.channel, b.version, 0,
    coalesce(b.vat_bases, '{}')
FROM unnest(%(threads)s::text[], %(namespaces)s::text[], %(channels)s::text[],
            %(versions)s::text[]) AS n (thread_id, checkpoint_ns, channel, version)
JOIN checkpoint_blobs b USING (thread_id, checkpoint_ns, channel, version)
WHERE NOT %(is_stored)s
"""

SELECT_BLOBS: LiteralString = """
SELECT b.thread_id, b.checkpoint_ns, b.channel, b.version, b.type, b.blob,
    coalesce(b.vat_bases[cardinality(b.vat_bases)], '')
FROM unnest(%(threads)s::text[], %(namespaces)s::text[], %(channels)s::text[],
            %(versions)s::text[]) AS n (thread_id, checkpoint_ns, channel, version)
JOIN checkpoint_blobs b USING (thread_id, checkpoint_ns, channel, version)
"""

# Values of a thread, and all that they build on.
SELECT_WITH_BASES: LiteralString = """
SELECT DISTINCT ON (b.checkpoint_ns, b.channel, b.version)
    b.checkpoint_ns, b.channel, b.version, b.type, b.blob,
    coalesce(b.vat_bases[cardinality(b.vat_bases)], '')
FROM unnest(%(namespaces)s::text[], %(channels)s::text[], %(versions)s::text[])
    AS n (checkpoint_ns, channel, version)
JOIN checkpoint_blobs k ON k.thread_id = %(thread)s AND k.checkpoint_ns = n.checkpoint_ns
    AND k.channel = n.channel AND k.version = n.version
JOIN checkpoint_blobs b ON b.thread_id = %(thread)s AND b.checkpoint_ns = k.checkpoint_ns
    AND b.channel = k.channel AND (b.version = k.version OR b.version = ANY(k.vat_bases))
WHERE b.blob IS NOT NULL
"""

# What builds on a version, and all that it builds on.
SELECT_BUILT_ON: LiteralString = """
WITH blobs AS (
    SELECT * FROM checkpoint_blobs WHERE thread_id = %(thread)s AND checkpoint_ns = %(namespace)s
    AND channel = %(channel)s
), writes AS (
    SELECT * FROM checkpoint_writes WHERE thread_id = %(thread)s AND checkpoint_ns = %(namespace)s
    AND channel = %(channel)s AND %(version)s = ANY(vat_bases)
), built AS (
    SELECT * FROM blobs WHERE %(version)s = ANY(vat_bases)
)
SELECT 'blob', '', '', 0, version, type, blob, vat_bases[cardinality(vat_bases)] FROM built
UNION ALL
SELECT 'write', checkpoint_id, task_id, idx, '', type, blob, vat_bases[cardinality(vat_bases)]
FROM writes
UNION ALL
SELECT 'base', '', '', 0, version, type, blob, coalesce(vat_bases[cardinality(vat_bases)], '')
FROM blobs WHERE version IN (
    SELECT unnest(vat_bases) FROM built UNION SELECT unnest(vat_bases) FROM writes
)
"""

MAKE_BLOBS_WHOLE: LiteralString = """
UPDATE checkpoint_blobs b SET type = n.type, blob = n.blob, vat_step = 0, vat_bases = NULL
FROM unnest(%(versions)s::text[], %(types)s::text[], %(blobs)s::bytea[]) AS n (version, type, blob)
WHERE b.thread_id = %(thread)s AND b.checkpoint_ns = %(namespace)s
AND b.channel = %(channel)s AND b.version = n.version
"""

MAKE_WRITES_WHOLE: LiteralString = """
UPDATE checkpoint_writes w SET type = n.type, blob = n.blob, vat_bases = NULL
FROM unnest(%(ids)s::text[], %(tasks)s::text[], %(idxs)s::int[], %(types)s::text[],
            %(blobs)s::bytea[]) AS n (checkpoint_id, task_id, idx, type, blob)
WHERE w.thread_id = %(thread)s AND w.checkpoint_ns = %(namespace)s
AND w.checkpoint_id = n.checkpoint_id AND w.task_id = n.task_id AND w.idx = n.idx
"""

# --- read ----------------------------------------------------------------

# A limit of one row keeps the planner at the primary key: it takes the versions of a
# checkpoint for a hundred, and would rather walk over all values that a thread ever had.
SNAPSHOT: LiteralString = """
SELECT c.thread_id, c.checkpoint_ns, c.checkpoint_id, coalesce(c.parent_checkpoint_id, ''),
    c.checkpoint, c.metadata, coalesce(c.vat_type, ''), coalesce(c.vat_exact, ''),
    ARRAY(
        SELECT ARRAY[convert_to(b.channel, 'UTF8'), convert_to(b.version, 'UTF8'),
                     convert_to(b.type, 'UTF8'), b.blob,
                     convert_to(coalesce(b.vat_bases[cardinality(b.vat_bases)], ''), 'UTF8')]
        FROM jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
        CROSS JOIN LATERAL (
            SELECT * FROM checkpoint_blobs b
            WHERE b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns
            AND b.channel = v.key AND b.version = v.value LIMIT 1
        ) AS b
    ),
    ARRAY(
        SELECT ARRAY[convert_to(w.task_id, 'UTF8'), convert_to(w.idx::text, 'UTF8'),
                     convert_to(w.task_path, 'UTF8'), convert_to(w.channel, 'UTF8'),
                     convert_to(w.type, 'UTF8'), w.blob,
                     convert_to(coalesce(w.vat_bases[cardinality(w.vat_bases)], ''), 'UTF8')]
        FROM checkpoint_writes w
        WHERE w.thread_id = c.thread_id AND w.checkpoint_ns = c.checkpoint_ns
        AND w.checkpoint_id = c.checkpoint_id
    ),
    ARRAY(
        SELECT ARRAY[convert_to(w.task_id, 'UTF8'), convert_to(w.idx::text, 'UTF8'),
                     convert_to(w.task_path, 'UTF8'), convert_to(w.channel, 'UTF8'),
                     convert_to(w.type, 'UTF8'), w.blob]
        FROM checkpoint_writes w
        WHERE coalesce((c.checkpoint ->> 'v')::int, 1) < 4
        AND w.thread_id = c.thread_id AND w.checkpoint_ns = c.checkpoint_ns
        AND w.checkpoint_id = c.parent_checkpoint_id AND w.channel = '__pregel_tasks'
        ORDER BY w.task_path, w.task_id, w.idx
    ),
    ARRAY(
        SELECT ARRAY[convert_to(b.channel, 'UTF8'), convert_to(b.version, 'UTF8'),
                     convert_to(b.type, 'UTF8'), b.blob,
                     convert_to(coalesce(b.vat_bases[cardinality(b.vat_bases)], ''), 'UTF8')]
        FROM (
            SELECT v.key AS channel, unnest(b.vat_bases) AS version
            FROM jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
            CROSS JOIN LATERAL (
                SELECT b.vat_bases FROM checkpoint_blobs b
                WHERE b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns
                AND b.channel = v.key AND b.version = v.value LIMIT 1
            ) AS b
            UNION
            SELECT w.channel, unnest(w.vat_bases) FROM checkpoint_writes w
            WHERE w.thread_id = c.thread_id AND w.checkpoint_ns = c.checkpoint_ns
            AND w.checkpoint_id = c.checkpoint_id
        ) AS n
        CROSS JOIN LATERAL (
            SELECT * FROM checkpoint_blobs b
            WHERE b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns
            AND b.channel = n.channel AND b.version = n.version LIMIT 1
        ) AS b
    )
"""
_FROM: LiteralString = "FROM checkpoints c"

SELECT_LATEST: LiteralString = (
    SNAPSHOT
    + _FROM
    + """
WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = %(namespace)s
ORDER BY c.checkpoint_id DESC LIMIT 1
"""
)

# Writes that came before their checkpoint: of ids beyond the newest one.
SELECT_EARLY_WRITES: LiteralString = """
SELECT w.checkpoint_id, w.task_id, w.idx, w.task_path, w.channel, w.type, w.blob,
    coalesce(w.vat_bases[cardinality(w.vat_bases)], ''),
    ARRAY(
        SELECT ARRAY[convert_to(b.channel, 'UTF8'), convert_to(b.version, 'UTF8'),
                     convert_to(b.type, 'UTF8'), b.blob,
                     convert_to(coalesce(b.vat_bases[cardinality(b.vat_bases)], ''), 'UTF8')]
        FROM checkpoint_blobs b
        WHERE b.thread_id = w.thread_id AND b.checkpoint_ns = w.checkpoint_ns
        AND b.channel = w.channel AND b.version = ANY(w.vat_bases)
    )
FROM checkpoint_writes w
WHERE w.thread_id = %(thread)s AND w.checkpoint_ns = %(namespace)s
AND w.checkpoint_id > %(checkpoint)s
"""

SELECT_ONE: LiteralString = (
    SNAPSHOT
    + _FROM
    + """
WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = %(namespace)s
AND c.checkpoint_id = %(checkpoint)s
"""
)

# One page of a list, newest first. Each absent condition is a null. Equal ids
# in several threads or namespaces (copies) are ordered by those. A scoped view
# sees the thread ids with its prefix; the unscoped one, those without any tenant's.
# Containing is what an index finds; of a list, an object or null, being equal is asked of
# what it found. What is absent falls away before the planner would take it for rare.
PAGE_CONDITION: LiteralString = """
WHERE (%(thread)s::text IS NULL OR c.thread_id = %(thread)s)
AND starts_with(c.thread_id, %(prefix)s) = %(scoped)s
AND (%(namespace)s::text IS NULL OR c.checkpoint_ns = %(namespace)s)
AND (%(checkpoint)s::text IS NULL OR c.checkpoint_id = %(checkpoint)s)
AND (%(before)s::text IS NULL OR c.checkpoint_id < %(before)s)
AND (%(after_id)s::text IS NULL
     OR (c.checkpoint_id, c.thread_id, c.checkpoint_ns)
        < (%(after_id)s, %(after_thread)s, %(after_namespace)s))
AND (%(exact)s::jsonb = '{}' OR NOT EXISTS (
    SELECT FROM jsonb_each(%(exact)s::jsonb) AS f
    WHERE coalesce(c.metadata -> f.key, 'null') <> f.value
))
"""
PAGE_ORDER: LiteralString = """
ORDER BY c.checkpoint_id DESC, c.thread_id DESC, c.checkpoint_ns DESC
LIMIT %(limit)s
"""

_PAGE: LiteralString = (
    _FROM
    + PAGE_CONDITION
    + "AND (%(filter)s::jsonb = '{}' OR c.metadata @> %(filter)s::jsonb)"
    + PAGE_ORDER
)

SELECT_PAGE: LiteralString = SNAPSHOT + _PAGE

# Without values and writes, which may be large.
LIGHT_SNAPSHOT: LiteralString = """
SELECT c.thread_id, c.checkpoint_ns, c.checkpoint_id, coalesce(c.parent_checkpoint_id, ''),
    c.checkpoint - 'channel_values', c.metadata, coalesce(c.vat_type, ''),
    coalesce(c.vat_exact, ''), '{}'::text[], '{}'::text[], '{}'::text[], '{}'::text[]
"""

SELECT_LIGHT_PAGE: LiteralString = LIGHT_SNAPSHOT + _PAGE

# The ancestors of a checkpoint that some channel's value still depends on:
# each channel's walk ends at the nearest one that stores a value.
_CHAIN: LiteralString = """
WITH RECURSIVE chain AS (
    SELECT p.checkpoint_ns, p.checkpoint_id, p.parent_checkpoint_id, p.checkpoint,
           1 AS depth, %(channels)s::text[] AS channels
    FROM checkpoints t
    JOIN checkpoints p ON p.thread_id = t.thread_id AND p.checkpoint_ns = t.checkpoint_ns
        AND p.checkpoint_id = t.parent_checkpoint_id
    WHERE t.thread_id = %(thread)s AND t.checkpoint_ns = %(namespace)s
    AND t.checkpoint_id = %(checkpoint)s
    UNION ALL
    SELECT p.checkpoint_ns, p.checkpoint_id, p.parent_checkpoint_id, p.checkpoint,
           c.depth + 1, rest.channels
    FROM chain c
    CROSS JOIN LATERAL (
        SELECT coalesce(array_agg(name), '{}') AS channels
        FROM unnest(c.channels) AS name
        WHERE NOT coalesce(c.checkpoint -> 'channel_values', '{}') ? name
        AND NOT EXISTS (
            SELECT FROM checkpoint_blobs b
            WHERE b.thread_id = %(thread)s AND b.checkpoint_ns = c.checkpoint_ns
            AND b.channel = name AND b.version = c.checkpoint -> 'channel_versions' ->> name
            AND b.type <> 'empty'
        )
    ) AS rest
    JOIN checkpoints p ON p.thread_id = %(thread)s AND p.checkpoint_ns = c.checkpoint_ns
        AND p.checkpoint_id = c.parent_checkpoint_id
    WHERE rest.channels <> '{}'
)
"""

# Writes and stored values along the chain, nearest ancestor first.
SELECT_DELTA_HISTORY: LiteralString = (
    _CHAIN
    + """
SELECT 'write', c.depth, c.checkpoint_id, w.channel, w.task_path, w.task_id, w.idx,
       w.type, w.blob, NULL::jsonb, coalesce(w.vat_bases[cardinality(w.vat_bases)], '')
FROM chain c
JOIN checkpoint_writes w ON w.thread_id = %(thread)s AND w.checkpoint_ns = c.checkpoint_ns
    AND w.checkpoint_id = c.checkpoint_id AND w.channel = ANY(c.channels)
UNION ALL
SELECT 'blob', c.depth, b.version, b.channel, '', '', 0, b.type, b.blob, NULL,
       coalesce(b.vat_bases[cardinality(b.vat_bases)], '')
FROM chain c
JOIN checkpoint_blobs b ON b.thread_id = %(thread)s AND b.checkpoint_ns = c.checkpoint_ns
    AND b.channel = ANY(c.channels) AND b.type <> 'empty'
    AND b.version = c.checkpoint -> 'channel_versions' ->> b.channel
UNION ALL
SELECT 'inline', c.depth, '', v.key, '', '', 0, '', NULL, v.value, ''
FROM chain c
CROSS JOIN LATERAL jsonb_each(coalesce(c.checkpoint -> 'channel_values', '{}')) AS v
WHERE v.key = ANY(c.channels)
UNION ALL
SELECT 'base', 0, b.version, b.channel, '', '', 0, b.type, b.blob, NULL,
       coalesce(b.vat_bases[cardinality(b.vat_bases)], '')
FROM (
    SELECT c.checkpoint_ns, w.channel, unnest(w.vat_bases) AS version
    FROM chain c
    JOIN checkpoint_writes w ON w.thread_id = %(thread)s AND w.checkpoint_ns = c.checkpoint_ns
        AND w.checkpoint_id = c.checkpoint_id AND w.channel = ANY(c.channels)
    UNION
    SELECT c.checkpoint_ns, b.channel, unnest(b.vat_bases)
    FROM chain c
    JOIN checkpoint_blobs b ON b.thread_id = %(thread)s AND b.checkpoint_ns = c.checkpoint_ns
        AND b.channel = ANY(c.channels) AND b.type <> 'empty'
        AND b.version = c.checkpoint -> 'channel_versions' ->> b.channel
) AS n
JOIN checkpoint_blobs b ON b.thread_id = %(thread)s AND b.checkpoint_ns = n.checkpoint_ns
    AND b.channel = n.channel AND b.version = n.version
ORDER BY 2
"""
)

# --- retention -----------------------------------------------------------

DELETE_ROWS: LiteralString = """
WITH c AS (DELETE FROM checkpoints WHERE thread_id = ANY(%(threads)s)),
    b AS (DELETE FROM checkpoint_blobs WHERE thread_id = ANY(%(threads)s)),
    w AS (DELETE FROM checkpoint_writes WHERE thread_id = ANY(%(threads)s))
DELETE FROM vat_floors WHERE thread_id = ANY(%(threads)s)
"""

FORGET_THREADS: LiteralString = "DELETE FROM vat_threads WHERE thread_id = ANY(%(threads)s)"

# The newest checkpoints of each namespace, and the channels whose value must
# be rebuilt from its ancestors' writes (DeltaChannel leaves them counters).
SELECT_HEADS: LiteralString = """
SELECT checkpoint_ns, checkpoint_id, channels FROM (
    SELECT checkpoint_ns, checkpoint_id,
        ARRAY(SELECT jsonb_object_keys(
            coalesce(metadata -> 'counters_since_delta_snapshot', '{}'))) AS channels,
        row_number() OVER (PARTITION BY checkpoint_ns ORDER BY checkpoint_id DESC) AS place
    FROM checkpoints WHERE thread_id = %(thread)s
) AS c
WHERE place <= %(most)s
ORDER BY checkpoint_ns, checkpoint_id DESC
"""

SELECT_CHAIN: LiteralString = (
    _CHAIN
    + """
SELECT checkpoint_id FROM chain
"""
)

# Writes go by the checkpoints deleted: those of a checkpoint still to come stay.
PRUNE_WRITES: LiteralString = """
DELETE FROM checkpoint_writes w
WHERE w.thread_id = %(thread)s AND w.checkpoint_ns = %(namespace)s
AND w.checkpoint_id <> ALL(%(kept)s)
AND EXISTS (
    SELECT FROM checkpoints c WHERE c.thread_id = w.thread_id
    AND c.checkpoint_ns = w.checkpoint_ns AND c.checkpoint_id = w.checkpoint_id
)
"""

PRUNE_CHECKPOINTS: LiteralString = """
DELETE FROM checkpoints
WHERE thread_id = %(thread)s AND checkpoint_ns = %(namespace)s AND checkpoint_id <> ALL(%(kept)s)
"""

# After checkpoints went: a parent that is gone is no parent, as in PostgresSaver,
# and a value that no checkpoint names, and nothing kept builds on, is garbage.
COLLECT: tuple[LiteralString, ...] = (
    """
UPDATE checkpoints c SET parent_checkpoint_id = NULL
WHERE c.thread_id = %(thread)s AND c.parent_checkpoint_id IS NOT NULL
AND NOT EXISTS (
    SELECT FROM checkpoints p WHERE p.thread_id = c.thread_id
    AND p.checkpoint_ns = c.checkpoint_ns AND p.checkpoint_id = c.parent_checkpoint_id
)
""",
    """
WITH named AS MATERIALIZED (
    SELECT DISTINCT c.checkpoint_ns, v.key AS channel, v.value AS version FROM checkpoints c
    CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
    WHERE c.thread_id = %(thread)s
), kept AS MATERIALIZED (
    SELECT * FROM named
    UNION
    SELECT k.checkpoint_ns, k.channel, unnest(k.vat_bases) FROM checkpoint_blobs k
    JOIN named USING (checkpoint_ns, channel, version) WHERE k.thread_id = %(thread)s
    UNION
    SELECT w.checkpoint_ns, w.channel, unnest(w.vat_bases) FROM checkpoint_writes w
    WHERE w.thread_id = %(thread)s
)
DELETE FROM checkpoint_blobs b
WHERE b.thread_id = %(thread)s AND NOT EXISTS (
    SELECT FROM kept n WHERE n.checkpoint_ns = b.checkpoint_ns
    AND n.channel = b.channel AND n.version = b.version
)
""",
)

# What a policy says of a thread: whether it has expired, and how many steps it may keep.
# A thread's own policy stands for the saver's. What a sweep had to leave is no reason for
# another one, unless that keeps fewer.
_DUE: LiteralString = """
SELECT t.thread_id, x.is_expired, p.policy ->> 'strategy', (p.policy ->> 'keep_last')::bigint,
    t.steps, t.bytes, t.generation::text, t.history
FROM vat_threads t
CROSS JOIN LATERAL (SELECT coalesce(t.retention, %(policy)s::jsonb)) AS p (policy)
CROSS JOIN LATERAL (SELECT coalesce(greatest(
    now() - t.updated_at > (p.policy ->> 'default_ttl')::float8 * interval '1 minute',
    now() - t.created_at > (p.policy ->> 'max_age')::float8 * interval '1 minute'
), false)) AS x (is_expired)
WHERE t.metadata @> coalesce(p.policy -> 'metadata', '{}')
AND (
    x.is_expired AND (p.policy ->> 'strategy' = 'delete' OR t.steps > t.kept OR t.kept_last > 1)
    OR t.steps > (p.policy ->> 'keep_last')::bigint
    AND (t.steps > t.kept OR t.kept_last > (p.policy ->> 'keep_last')::bigint)
)
"""

# The primary key is walked once, whatever the policies are.
SELECT_DUE: LiteralString = (
    _DUE
    + """
AND t.thread_id > %(after)s AND starts_with(t.thread_id, %(prefix)s)
ORDER BY t.thread_id LIMIT %(limit)s
"""
)

# What a thread got from others, who do not tell; they may write while there is no hot tier.
_STRANGER: LiteralString = """
EXISTS (
    SELECT FROM checkpoints c WHERE c.thread_id = t.thread_id AND c.checkpoint_ns = ''
    AND c.checkpoint_id > coalesce(t.head_id, '')
)
"""

ARE_DUE: LiteralString = _DUE + "AND t.thread_id = ANY(%(threads)s) AND NOT" + _STRANGER

TOUCH_STRANGER: LiteralString = (
    "UPDATE vat_threads t SET updated_at = now() WHERE t.thread_id = %(thread)s AND"
    + _STRANGER
    + "RETURNING t.thread_id"
)

NOTE_KEPT: LiteralString = """
UPDATE vat_threads SET kept = steps, kept_last = %(most)s WHERE thread_id = %(thread)s
"""

# Of many processes one sweeps, each time.
CLAIM_SWEEP: LiteralString = """
UPDATE vat_state SET swept_at = now()
WHERE swept_at IS NULL OR swept_at <= now() - %(seconds)s * interval '1 second'
RETURNING swept_at
"""

SET_RETENTION: LiteralString = """
UPDATE vat_threads SET retention = %(retention)s::jsonb WHERE thread_id = %(thread)s
RETURNING thread_id
"""

SEARCH_THREADS: LiteralString = """
SELECT thread_id, created_at, updated_at, steps, bytes, coalesce(head_id, ''), metadata, retention
FROM vat_threads
WHERE tenant = %(tenant)s AND steps > 0
AND (updated_at, thread_id) < (%(before)s::timestamptz, %(before_id)s)
AND (%(metadata)s::jsonb = '{}' OR metadata <> '{}' AND metadata @> %(metadata)s::jsonb)
ORDER BY updated_at DESC, thread_id DESC LIMIT %(limit)s
"""

SELECT_TENANT: LiteralString = """
SELECT thread_id FROM vat_threads WHERE tenant = %(tenant)s LIMIT 256
"""

RAISE_FLOOR: LiteralString = """
INSERT INTO vat_floors (thread_id, checkpoint_ns, floor)
VALUES (%(thread)s, %(namespace)s, %(floor)s)
ON CONFLICT (thread_id, checkpoint_ns) DO UPDATE SET floor = excluded.floor
"""

BUMP_HISTORIES: LiteralString = (
    "UPDATE vat_threads SET history = history + 1 WHERE thread_id = ANY(%(threads)s)"
)

THREADS_OF_RUNS: LiteralString = """
SELECT DISTINCT c.thread_id FROM unnest(%(runs)s::text[]) AS r (run_id)
JOIN checkpoints c ON c.metadata @> jsonb_build_object('run_id', r.run_id)
WHERE starts_with(c.thread_id, %(prefix)s) = %(scoped)s
ORDER BY c.thread_id
"""

NOTE_DELETED_RUNS: LiteralString = """
INSERT INTO vat_deleted_runs (run_id) SELECT unnest(%(runs)s::text[]) ON CONFLICT DO NOTHING
"""

DELETE_RUNS: tuple[LiteralString, ...] = (
    """
DELETE FROM checkpoint_writes w USING checkpoints c
WHERE w.thread_id = %(thread)s AND c.thread_id = w.thread_id
AND c.checkpoint_ns = w.checkpoint_ns AND c.checkpoint_id = w.checkpoint_id
AND c.metadata ->> 'run_id' = ANY(%(runs)s)
""",
    """
DELETE FROM checkpoints
WHERE thread_id = %(thread)s AND metadata ->> 'run_id' = ANY(%(runs)s)
""",
)

COPY_ROWS: tuple[LiteralString, ...] = (
    """
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type,
                         checkpoint, metadata, vat_type, vat_exact)
SELECT %(target)s, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type,
       checkpoint, metadata, vat_type, vat_exact
FROM checkpoints WHERE thread_id = %(thread)s
""",
    """
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob,
                              vat_step, vat_bases)
SELECT %(target)s, checkpoint_ns, channel, version, type, blob, vat_step, vat_bases
FROM checkpoint_blobs WHERE thread_id = %(thread)s
""",
    """
INSERT INTO checkpoint_writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx,
                               task_path, channel, type, blob, vat_bases)
SELECT %(target)s, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, blob,
       vat_bases
FROM checkpoint_writes WHERE thread_id = %(thread)s
""",
    """
INSERT INTO vat_floors (thread_id, checkpoint_ns, floor)
SELECT %(target)s, checkpoint_ns, floor FROM vat_floors WHERE thread_id = %(thread)s
""",
)

# The checkpoint, its ancestors, and what subgraphs stored on the way from one to the next.
KEEP_ANCESTORS: tuple[LiteralString, ...] = (
    """
WITH RECURSIVE kept AS (
    SELECT checkpoint_id, parent_checkpoint_id FROM checkpoints
    WHERE thread_id = %(thread)s AND checkpoint_ns = '' AND checkpoint_id = %(checkpoint)s
    UNION
    SELECT p.checkpoint_id, p.parent_checkpoint_id FROM kept k
    JOIN checkpoints p ON p.thread_id = %(thread)s AND p.checkpoint_ns = ''
        AND p.checkpoint_id = k.parent_checkpoint_id
)
DELETE FROM checkpoints c
WHERE c.thread_id = %(thread)s AND NOT EXISTS (
    SELECT FROM kept k WHERE k.checkpoint_id = CASE c.checkpoint_ns
        WHEN '' THEN c.checkpoint_id ELSE c.metadata -> 'parents' ->> '' END
)
""",
    """
DELETE FROM checkpoint_writes w
WHERE w.thread_id = %(thread)s AND NOT EXISTS (
    SELECT FROM checkpoints c WHERE c.thread_id = w.thread_id
    AND c.checkpoint_ns = w.checkpoint_ns AND c.checkpoint_id = w.checkpoint_id
)
""",
)

# Sealed values are bound to their thread, so a copy opens and seals each anew.
# Rows that were sealed by another data key than the one whose messages begin so.
SEALED_BLOBS: LiteralString = """
SELECT checkpoint_ns, channel, version, type, blob FROM checkpoint_blobs
WHERE thread_id = %(thread)s AND substr(blob, 1, length(%(header)s)) <> %(header)s
ORDER BY checkpoint_ns, channel, version LIMIT %(limit)s OFFSET %(left)s
"""
RESEAL_BLOBS: LiteralString = """
UPDATE checkpoint_blobs b SET type = n.type, blob = n.blob
FROM unnest(%(namespaces)s::text[], %(channels)s::text[], %(versions)s::text[],
            %(types)s::text[], %(blobs)s::bytea[])
    AS n (checkpoint_ns, channel, version, type, blob)
WHERE b.thread_id = %(thread)s AND b.checkpoint_ns = n.checkpoint_ns
AND b.channel = n.channel AND b.version = n.version
"""
SEALED_WRITES: LiteralString = """
SELECT checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob FROM checkpoint_writes
WHERE thread_id = %(thread)s AND substr(blob, 1, length(%(header)s)) <> %(header)s
ORDER BY checkpoint_ns, checkpoint_id, task_id, idx LIMIT %(limit)s OFFSET %(left)s
"""
RESEAL_WRITES: LiteralString = """
UPDATE checkpoint_writes w SET type = n.type, blob = n.blob
FROM unnest(%(namespaces)s::text[], %(ids)s::text[], %(tasks)s::text[], %(idxs)s::int[],
            %(types)s::text[], %(blobs)s::bytea[])
    AS n (checkpoint_ns, checkpoint_id, task_id, idx, type, blob)
WHERE w.thread_id = %(thread)s AND w.checkpoint_ns = n.checkpoint_ns
AND w.checkpoint_id = n.checkpoint_id AND w.task_id = n.task_id AND w.idx = n.idx
"""
SEALED_EXACTS: LiteralString = """
SELECT checkpoint_ns, checkpoint_id, vat_type, vat_exact FROM checkpoints
WHERE thread_id = %(thread)s AND substr(vat_exact, 1, length(%(header)s)) <> %(header)s
ORDER BY checkpoint_ns, checkpoint_id LIMIT %(limit)s OFFSET %(left)s
"""
RESEAL_EXACTS: LiteralString = """
UPDATE checkpoints c SET vat_type = n.type, vat_exact = n.exact
FROM unnest(%(namespaces)s::text[], %(ids)s::text[], %(types)s::text[], %(blobs)s::bytea[])
    AS n (checkpoint_ns, checkpoint_id, type, exact)
WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = n.checkpoint_ns
AND c.checkpoint_id = n.checkpoint_id
"""

# Nothing is found by them any more, and nothing of a guess can be tried on them.
FORGET_TOKENS: LiteralString = """
UPDATE checkpoints c SET metadata = c.metadata || jsonb_build_object('vat_blind', (
    SELECT jsonb_object_agg(t.key, NULL) FROM jsonb_each(c.metadata -> 'vat_blind') AS t
))
WHERE c.thread_id = %(thread)s AND jsonb_typeof(c.metadata -> 'vat_blind') = 'object'
AND c.metadata -> 'vat_blind' <> '{}'
"""

# What was written before a field was declared.
ADD_TOKENS: LiteralString = """
UPDATE checkpoints c SET metadata = c.metadata || jsonb_build_object(
    'vat_blind', coalesce(c.metadata -> 'vat_blind', '{}') || n.tokens::jsonb
)
FROM unnest(%(namespaces)s::text[], %(ids)s::text[], %(tokens)s::text[])
    AS n (checkpoint_ns, checkpoint_id, tokens)
WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = n.checkpoint_ns
AND c.checkpoint_id = n.checkpoint_id
"""

SET_DATA_KEY: LiteralString = """
UPDATE vat_threads SET data_key = %(data_key)s WHERE thread_id = %(thread)s AND data_key <> ''
RETURNING thread_id
"""

SEALED_THREADS: LiteralString = """
SELECT thread_id FROM vat_threads
WHERE data_key <> '' AND thread_id > %(after)s AND starts_with(thread_id, %(prefix)s)
ORDER BY thread_id LIMIT %(limit)s
"""

# --- sealing what is in the clear ------------------------------------------

# In the order of thread ids, those that have no data key; and those that only another
# saver knows.
PLAIN_THREADS: LiteralString = """
SELECT thread_id FROM vat_threads
WHERE data_key IS NULL AND thread_id > %(after)s AND starts_with(thread_id, %(prefix)s)
ORDER BY thread_id LIMIT %(limit)s
"""

NEXT_STRANGER: LiteralString = """
SELECT thread_id FROM (
    (SELECT thread_id FROM checkpoints c
     WHERE thread_id > %(after)s AND starts_with(thread_id, %(prefix)s)
     AND NOT EXISTS (SELECT FROM vat_threads t WHERE t.thread_id = c.thread_id)
     ORDER BY thread_id LIMIT 1)
    UNION ALL
    (SELECT thread_id FROM checkpoint_writes w
     WHERE thread_id > %(after)s AND starts_with(thread_id, %(prefix)s)
     AND NOT EXISTS (SELECT FROM vat_threads t WHERE t.thread_id = w.thread_id)
     ORDER BY thread_id LIMIT 1)
    UNION ALL
    (SELECT thread_id FROM checkpoint_blobs b
     WHERE thread_id > %(after)s AND starts_with(thread_id, %(prefix)s)
     AND NOT EXISTS (SELECT FROM vat_threads t WHERE t.thread_id = b.thread_id)
     ORDER BY thread_id LIMIT 1)
) AS s
ORDER BY thread_id LIMIT 1
"""

SELECT_DATA_KEY: LiteralString = "SELECT data_key FROM vat_threads WHERE thread_id = %(thread)s"

GIVE_DATA_KEY: LiteralString = """
UPDATE vat_threads SET data_key = %(data_key)s WHERE thread_id = %(thread)s AND data_key IS NULL
"""

SELECT_NAMESPACES: LiteralString = """
SELECT checkpoint_ns FROM checkpoints WHERE thread_id = %(thread)s
UNION SELECT checkpoint_ns FROM checkpoint_writes WHERE thread_id = %(thread)s
"""

PLAIN_BLOBS: LiteralString = """
SELECT checkpoint_ns, channel, version, type, blob FROM checkpoint_blobs
WHERE thread_id = %(thread)s AND blob IS NOT NULL AND type <> 'empty'
AND (checkpoint_ns, channel, version) > (%(after_0)s, %(after_1)s, %(after_2)s)
ORDER BY checkpoint_ns, channel, version LIMIT %(limit)s
"""

# What LangGraph's own serializer encrypted, and something builds on.
ENCRYPTED_BASES: LiteralString = """
SELECT checkpoint_ns, channel, version FROM checkpoint_blobs b
WHERE thread_id = %(thread)s AND split_part(type, '+', 2) = 'aes' AND (EXISTS (
    SELECT FROM checkpoint_blobs o WHERE o.thread_id = b.thread_id
    AND o.checkpoint_ns = b.checkpoint_ns AND o.channel = b.channel
    AND b.version = ANY(o.vat_bases)
) OR EXISTS (
    SELECT FROM checkpoint_writes o WHERE o.thread_id = b.thread_id
    AND o.checkpoint_ns = b.checkpoint_ns AND o.channel = b.channel
    AND b.version = ANY(o.vat_bases)
))
"""

PLAIN_WRITES: LiteralString = """
SELECT checkpoint_ns, checkpoint_id, task_id, idx, channel, coalesce(type, ''), blob
FROM checkpoint_writes
WHERE thread_id = %(thread)s
AND (checkpoint_ns, checkpoint_id, task_id, idx)
    > (%(after_0)s, %(after_1)s, %(after_2)s, %(after_3)s)
ORDER BY checkpoint_ns, checkpoint_id, task_id, idx LIMIT %(limit)s
"""

PLAIN_CHECKPOINTS: LiteralString = """
SELECT checkpoint_ns, checkpoint_id, checkpoint, metadata, coalesce(vat_type, ''), vat_exact
FROM checkpoints
WHERE thread_id = %(thread)s AND (checkpoint_ns, checkpoint_id) > (%(after_0)s, %(after_1)s)
ORDER BY checkpoint_ns, checkpoint_id LIMIT %(limit)s
"""

SEAL_CHECKPOINTS: LiteralString = """
UPDATE checkpoints c SET checkpoint = n.checkpoint::jsonb, metadata = n.metadata::jsonb,
    vat_type = n.type, vat_exact = n.exact
FROM unnest(%(namespaces)s::text[], %(ids)s::text[], %(checkpoints)s::text[],
            %(metadata)s::text[], %(types)s::text[], %(exacts)s::bytea[])
    AS n (checkpoint_ns, checkpoint_id, checkpoint, metadata, type, exact)
WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = n.checkpoint_ns
AND c.checkpoint_id = n.checkpoint_id
"""

# --- rewriting -----------------------------------------------------------

NEXT_THREAD: LiteralString = """
SELECT thread_id FROM checkpoints
WHERE thread_id > %(after)s AND starts_with(thread_id, %(prefix)s) ORDER BY thread_id LIMIT 1
"""

# And whether anything builds on a value: it has all the bases named that it needs, so
# that one must not get any.
_BLOBS_AFTER: LiteralString = """
SELECT checkpoint_ns, channel, version, type, blob, vat_bases, EXISTS (
    SELECT FROM checkpoint_blobs o WHERE o.thread_id = b.thread_id
    AND o.checkpoint_ns = b.checkpoint_ns AND o.channel = b.channel
    AND o.version > b.version AND b.version = ANY(o.vat_bases)
) OR EXISTS (
    SELECT FROM checkpoint_writes o WHERE o.thread_id = b.thread_id
    AND o.checkpoint_ns = b.checkpoint_ns AND o.channel = b.channel
    AND b.version = ANY(o.vat_bases)
)
FROM checkpoint_blobs b
WHERE thread_id = %(thread)s AND blob IS NOT NULL
AND (checkpoint_ns, channel, version) > (%(namespace)s, %(channel)s, %(version)s)
"""
_BY_VERSION: LiteralString = "ORDER BY checkpoint_ns, channel, version LIMIT %(limit)s"
SELECT_LOOSE_BLOBS: LiteralString = (
    _BLOBS_AFTER + "AND vat_step IS NULL AND octet_length(blob) >= %(least)s " + _BY_VERSION
)
SELECT_PACKED_BLOBS: LiteralString = _BLOBS_AFTER + "AND vat_step IS NOT NULL " + _BY_VERSION

_WRITES_AFTER: LiteralString = """
SELECT checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob, vat_bases
FROM checkpoint_writes
WHERE thread_id = %(thread)s AND channel <> '__pregel_tasks'
AND (checkpoint_ns, checkpoint_id, task_id, idx)
    > (%(namespace)s, %(checkpoint)s, %(task)s, %(idx)s)
"""
_BY_TASK: LiteralString = "ORDER BY checkpoint_ns, checkpoint_id, task_id, idx LIMIT %(limit)s"
SELECT_LOOSE_WRITES: LiteralString = (
    _WRITES_AFTER
    + "AND strpos(type, '+vat.zstd') + strpos(type, '+vat.patch') = 0"
    + " AND octet_length(blob) >= %(least)s "
    + _BY_TASK
)
SELECT_PACKED_WRITES: LiteralString = (
    _WRITES_AFTER + "AND strpos(type, '+vat.zstd') + strpos(type, '+vat.patch') > 0 " + _BY_TASK
)

REWRITE_WRITES: LiteralString = """
UPDATE checkpoint_writes w SET type = n.type, blob = n.blob, vat_bases = NULL
FROM unnest(%(namespaces)s::text[], %(ids)s::text[], %(tasks)s::text[], %(idxs)s::int[],
            %(types)s::text[], %(blobs)s::bytea[])
    AS n (checkpoint_ns, checkpoint_id, task_id, idx, type, blob)
WHERE w.thread_id = %(thread)s AND w.checkpoint_ns = n.checkpoint_ns
AND w.checkpoint_id = n.checkpoint_id AND w.task_id = n.task_id AND w.idx = n.idx
"""

# --- the tiers as a whole ------------------------------------------------

# Null seconds: Redis is trusted.
SELECT_STATE: LiteralString = """
SELECT epoch, hot_tier::text, hot_runs, extract(epoch FROM degraded_until - now())::float8, lease_s,
    hot_prefix
FROM vat_state
"""

LENGTHEN_LEASE: LiteralString = """
UPDATE vat_state SET lease_s = greatest(lease_s, %(seconds)s) RETURNING lease_s
"""

# Before any change of the row. Who shares a row's lock lets others share it before
# one that waits for it alone, so a change might wait for ever while many write past
# Redis; they share this lock of the table too, which is given in the order of asking.
# Nobody who stands behind waits for longer than a moment, should a holder be frozen.
LOCK_STATE: LiteralString = "LOCK TABLE vat_state IN EXCLUSIVE MODE"
STATE_LOCK_TIMEOUT: LiteralString = "SET LOCAL lock_timeout = '1s'"

# Whoever writes past Redis holds this until its commit: the epoch cannot end before.
SHARE_STATE: LiteralString = """
SELECT epoch FROM vat_state WHERE degraded_until IS NOT NULL FOR SHARE
"""

# Whoever writes without knowing of Redis has ended, and the next finds that there is one.
LOCK_TABLES: LiteralString = """
LOCK TABLE checkpoints, checkpoint_blobs, checkpoint_writes IN SHARE ROW EXCLUSIVE MODE
"""

# What is there already may be written by others, too, who know nothing of Redis.
CLAIM_HOT_TIER: LiteralString = """
UPDATE vat_state
SET hot_tier = %(hot_tier)s, hot_runs = %(hot_runs)s, hot_prefix = %(hot_prefix)s
WHERE hot_tier IS NULL AND (%(is_asked)s OR NOT (
    EXISTS (SELECT FROM checkpoints) OR EXISTS (SELECT FROM checkpoint_writes)
))
"""

# One that is degraded already goes on for longer.
RAISE_EPOCH: LiteralString = """
UPDATE vat_state SET epoch = epoch + (degraded_until IS NULL)::int,
    degraded_until = greatest(degraded_until, now() + %(seconds)s * interval '1 second'),
    hot_runs = coalesce(%(hot_runs)s, hot_runs)
RETURNING epoch, lease_s
"""

EXTEND_EPOCH: LiteralString = """
UPDATE vat_state SET degraded_until = now() + %(seconds)s * interval '1 second'
WHERE epoch = %(epoch)s RETURNING epoch
"""

# Redis is trusted again, under an epoch in which nothing was written past it.
TRUST_HOT_TIER: LiteralString = """
UPDATE vat_state SET epoch = epoch + 1, degraded_until = NULL, hot_runs = %(hot_runs)s
WHERE epoch = %(epoch)s AND (degraded_until IS NULL OR degraded_until <= now()) RETURNING epoch
"""
