"""
Every statement on the words of the store's items, and how items are scored by them.

Beside each item stands the document of its texts, as Postgres reads them in the language that
is recorded for all processes. A document says of which version of its item it is: one that a
stranger left behind by writing the item anew counts as none.
"""

from typing import LiteralString

from langgraph_vat._durable.items import ITEM
from langgraph_vat._durable.namespaces import IN_ORDER, LIVING, NEXT, OF_ROOT, ORDER, SEES_ALL

# The one table that says something of items, and is as secure as they are.
TEXTS = "vat_store_texts"
SCHEMA: tuple[LiteralString, ...] = (
    """
CREATE TABLE IF NOT EXISTS vat_store_texts (
    prefix TEXT COLLATE "C" NOT NULL,
    key TEXT NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL,
    document TSVECTOR NOT NULL,
    words INTEGER NOT NULL,
    PRIMARY KEY (prefix, key) INCLUDE (words),
    FOREIGN KEY (prefix, key) REFERENCES store (prefix, key) ON DELETE CASCADE
)""",
    # A search would read through what waits for the index, once for each word.
    """
CREATE INDEX IF NOT EXISTS vat_store_texts_document ON vat_store_texts
USING gin (document) WITH (fastupdate = off)""",
    """
CREATE TABLE IF NOT EXISTS vat_store_text_search (
    is_one BOOLEAN PRIMARY KEY DEFAULT true CHECK (is_one),
    config TEXT NOT NULL,
    is_complete BOOLEAN NOT NULL DEFAULT false
)""",
)

# What the statements name.
TABLES = {
    TEXTS: "prefix key updated_at document words",
    "vat_store_text_search": "is_one config is_complete",
}

CONFIGS: LiteralString = """
SELECT cfgname::text FROM pg_ts_config WHERE pg_ts_config_is_visible(oid) ORDER BY 1"""

# By which configuration all processes read texts, and whether items from before have documents.
RECORDED: LiteralString = "SELECT config, is_complete FROM vat_store_text_search"
# Nobody from whom policies hide items says that there are none, or that these have theirs.
RECORD: LiteralString = (
    "INSERT INTO vat_store_text_search (config, is_complete)"
    " SELECT {config}, NOT EXISTS (SELECT FROM store) AND " + SEES_ALL + " ON CONFLICT DO NOTHING"
)
COMPLETE: LiteralString = (
    "UPDATE vat_store_text_search SET is_complete = true WHERE " + SEES_ALL + " RETURNING is_one"
)

_CONFIG: LiteralString = "(SELECT quote_ident(config)::regconfig FROM vat_store_text_search)"
_READ: LiteralString = (
    "SELECT n.*, d.document, (SELECT coalesce(sum(cardinality(w.positions)), 0) FROM"
    " unnest(d.document) AS w) AS words FROM n CROSS JOIN LATERAL (SELECT to_tsvector("
    + _CONFIG
    + ", n.text) AS document OFFSET 0) AS d"
)

# In the transaction that put the items: their time is its time.
PUT_TEXTS: LiteralString = (
    """
WITH n AS (
    SELECT * FROM unnest(%(prefixes)s::text[], %(keys)s::text[], %(texts)s::text[])
        AS n (prefix, key, text)
)
INSERT INTO vat_store_texts (prefix, key, updated_at, document, words)
SELECT r.prefix, r.key, now(), r.document, r.words FROM ("""
    + _READ
    + """) AS r
ON CONFLICT (prefix, key) DO UPDATE
SET updated_at = excluded.updated_at, document = excluded.document, words = excluded.words
"""
)

# Items of a range without a document, or with one of another version.
WITHOUT_TEXTS: LiteralString = (
    "SELECT"
    + ITEM
    + """
FROM store s LEFT JOIN vat_store_texts t ON t.prefix = s.prefix AND t.key = s.key
WHERE """
    + NEXT
    + " AND t.updated_at IS DISTINCT FROM s.updated_at"
    + IN_ORDER
)

# Only of items that are as they were read, and nobody has changed or sealed: whoever would, waits.
# They are locked in the order of all who lock them.
ADD_TEXTS: LiteralString = (
    """
WITH n AS MATERIALIZED (
    SELECT n.*
    FROM unnest(%(prefixes)s::text[], %(keys)s::text[], %(updated)s::timestamptz[],
                %(types)s::text[], %(texts)s::text[])
        AS n (prefix, key, updated_at, type, text)
    JOIN store s ON s.prefix = n.prefix AND s.key = n.key
    WHERE s.updated_at = n.updated_at AND s.vat_type IS NOT DISTINCT FROM n.type"""
    + ORDER
    + """ FOR SHARE OF s
)
INSERT INTO vat_store_texts AS t (prefix, key, updated_at, document, words)
SELECT r.prefix, r.key, r.updated_at, r.document, r.words FROM ("""
    + _READ
    + """) AS r
ON CONFLICT (prefix, key) DO UPDATE
SET updated_at = excluded.updated_at, document = excluded.document, words = excluded.words
WHERE t.updated_at <> excluded.updated_at
RETURNING 1
"""
)

# Whether any process ever had a `text_search` here.
HAS_TEXTS: LiteralString = "SELECT to_regclass('vat_store_texts') IS NOT NULL"
FORGET_TEXTS: LiteralString = "DELETE FROM vat_store_texts s WHERE " + OF_ROOT

# Which documents a search is about, as `items` says it of items: what is counted of one tenant
# must tell nothing of another.
_WITHIN: LiteralString = """
(%(prefix)s = '' AND NOT starts_with(t.prefix, 'vat-tenant:')
 OR t.prefix = %(prefix)s OR starts_with(t.prefix, %(prefix)s || '.'))"""

# The words of a query, each as a query of its own that is true to it, with how many items have
# it; how many items there are, and how many words one has. None of it is counted further than
# the order of scores needs.
ASK: LiteralString = (
    r"""
WITH asked AS MATERIALIZED (
    SELECT q.lexeme,
        '''' || replace(replace(q.lexeme, '\', '\\'), '''', '''''') || '''' AS quoted
    FROM unnest(to_tsvector("""
    + _CONFIG
    + """, %(text)s)) AS q ORDER BY q.positions[1], q.lexeme LIMIT %(most_words)s
), known AS MATERIALIZED (
    SELECT count(*) AS items, avg(words)::float8 AS words FROM (
        SELECT t.words FROM vat_store_texts t WHERE """
    + _WITHIN
    + """ ORDER BY t.prefix, t.key LIMIT %(most_known)s
    ) AS t
)
SELECT a.lexeme, a.quoted, n.items, k.items, k.words FROM known k, asked a CROSS JOIN LATERAL (
    SELECT count(*) AS items FROM (
        SELECT FROM vat_store_texts t WHERE t.document @@ a.quoted::tsquery AND """
    + _WITHIN
    + """ LIMIT %(most_scored)s + 1
    ) AS t
) AS n
ORDER BY n.items, a.lexeme"""
)

# Items that have one of the words; if they are too many, those with a rare one, and the latest.
CANDIDATES: LiteralString = (
    """
SELECT s.prefix, s.key, s.updated_at, t.document, t.words
FROM vat_store_texts t
JOIN store s ON s.prefix = t.prefix AND s.key = t.key AND s.updated_at = t.updated_at
WHERE t.document @@ %(words)s::tsquery AND """
    + _WITHIN
    + " AND "
    + LIVING
    + """ AND {filter}
ORDER BY t.document @@ %(rare_words)s::tsquery DESC, s.updated_at DESC, s.prefix, s.key
LIMIT %(most_scored)s"""
)

# BM25 (Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009),
# with its usual parameters. Each row tells how many items have a score; if the page is beyond
# them, that alone. A sum of floats depends on its order, so that has to be always the same.
SCORED: LiteralString = (
    "WITH candidates AS MATERIALIZED ("
    + CANDIDATES
    + """), scored AS MATERIALIZED (
    SELECT c.prefix, c.key, c.updated_at, (
        SELECT sum(w.weight * d.times / (d.times + 1.2 * (0.25 + 0.75 * c.words / %(average)s))
                   ORDER BY w.lexeme)
        FROM (SELECT lexeme, cardinality(positions) AS times FROM unnest(c.document)) AS d
        JOIN unnest(%(lexemes)s::text[], %(weights)s::float8[]) AS w (lexeme, weight)
            ON w.lexeme = d.lexeme
    ) AS score
    FROM candidates c
), page AS (
    SELECT * FROM scored c ORDER BY c.score DESC, c.updated_at DESC, c.prefix, c.key
    LIMIT %(limit)s OFFSET %(offset)s
)
SELECT {columns}, p.score, n.scored
FROM (SELECT count(*) AS scored FROM scored) AS n
LEFT JOIN (page p JOIN store s ON s.prefix = p.prefix AND s.key = p.key) ON true
ORDER BY p.score DESC, p.updated_at DESC, p.prefix, p.key"""
)

# The others: those that have no score; those that are not at these places.
UNSCORED: LiteralString = (
    "{filter} AND (s.prefix, s.key) NOT IN (SELECT c.prefix, c.key FROM (" + CANDIDATES + ") AS c)"
)
PLACES = ("ranked_prefixes", "ranked_keys")
ELSEWHERE: LiteralString = """
{filter} AND (s.prefix, s.key) NOT IN (
    SELECT n.prefix, n.key FROM unnest(%(ranked_prefixes)s::text[], %(ranked_keys)s::text[])
        AS n (prefix, key)
)"""

# How far a scan of an HNSW index goes, for one search of a transaction; and then as before.
TUNE: LiteralString = "SELECT set_config(%(name)s, %(value)s, true)"
TUNED: dict[str, LiteralString] = {
    "ef_search": "SET LOCAL hnsw.ef_search TO DEFAULT",
    "max_scan_tuples": "SET LOCAL hnsw.max_scan_tuples TO DEFAULT",
}
