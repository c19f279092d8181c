"""
Every statement on the table of items that wait for their vectors.

A row goes with its item, and is replaced with it: by `since` it is known for which put
it stands. Whoever takes it holds no lock on it while the embedder is asked; for so long
nobody else takes it.
"""

from typing import LiteralString

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
