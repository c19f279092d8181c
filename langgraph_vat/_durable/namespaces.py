"""
Every statement on namespaces as a whole: which there are, how many items one has, and its end.

In the order of bytes, which is that of collation C, what is below a namespace is one range of
prefixes: from ``a.`` to ``a/``, the character after the dot. The namespace itself is another one:
between the two are its neighbours, such as ``a-b``. The primary key has that order; where
PostgresStore made the table it has the database's, and `INDEX` is beside it.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any, LiteralString

from langgraph.store.base import MatchCondition
from psycopg import sql

LIVING: LiteralString = "(s.expires_at IS NULL OR s.expires_at > now())"

# All that is under a first label.
OF_ROOT: LiteralString = """
(s.prefix COLLATE "C" = %(root)s::text
 OR s.prefix COLLATE "C" >= %(root)s::text || '.' AND s.prefix COLLATE "C" < %(root)s::text || '/')
"""

# Whoever locks several items does it in this order.
ORDER: LiteralString = ' ORDER BY s.prefix COLLATE "C", s.key'

# Which items a search is about. Of all there are, those of no tenant.
SCOPE: LiteralString = (
    """
(%(prefix)s = '' AND NOT starts_with(s.prefix, 'vat-tenant:')
 OR s.prefix = %(prefix)s OR starts_with(s.prefix, %(prefix)s || '.'))
AND """
    + LIVING
)

# Whether the primary key has another order.
_OTHER_ORDER: LiteralString = """
SELECT FROM pg_attribute a JOIN pg_collation c ON c.oid = a.attcollation
WHERE a.attrelid = to_regclass('store') AND a.attname = 'prefix' AND c.collname <> 'C'
"""
INDEX: LiteralString = (
    "DO $$ BEGIN IF EXISTS ("
    + _OTHER_ORDER
    + """) THEN
        CREATE INDEX IF NOT EXISTS vat_store_prefix ON store (prefix COLLATE "C", key);
    END IF;
END $$"""
)
LACKS_INDEX: LiteralString = _OTHER_ORDER + "AND to_regclass('vat_store_prefix') IS NULL"

# From one namespace to the next, by two look-ups each, however many items it has. Where a
# namespace that is shown in part has been found, all others of that part are jumped over, and
# so are the tenants. The next bound is always greater than what was found: it ends. OFFSET 0 has
# what is used three times looked up once.
LIST: LiteralString = (
    """
WITH RECURSIVE steps (namespace, bound) AS (
    SELECT NULL::text[] COLLATE "C", %(first)s::text COLLATE "C"
    UNION ALL
    SELECT kept.namespace, CASE
        WHEN starts_with(found.prefix, %(hidden)s) THEN 'vat-tenant;'
        WHEN kept.namespace IS NOT NULL AND %(depth)s::int = 0 THEN NULL
        WHEN kept.namespace IS NOT NULL AND cardinality(split.labels) > %(depth)s
        THEN left(found.prefix, %(cut)s) || array_to_string(kept.namespace, '.') || '/'
        ELSE greatest(found.prefix || chr(1), %(below)s)
    END COLLATE "C"
    FROM steps
    CROSS JOIN LATERAL (
        SELECT s.prefix COLLATE "C" AS prefix FROM store s WHERE s.prefix COLLATE "C" >= steps.bound
        ORDER BY s.prefix COLLATE "C" LIMIT 1
    ) AS found
    CROSS JOIN LATERAL (SELECT substr(found.prefix, %(cut)s::int + 1) AS shown) AS own
    CROSS JOIN LATERAL (SELECT string_to_array(own.shown, '.') AS labels) AS split
    CROSS JOIN LATERAL (
        SELECT CASE
            WHEN starts_with(found.prefix, %(hidden)s) THEN NULL
            WHEN own.shown ~ ALL (%(patterns)s::text[]) THEN (
                SELECT split.labels[1:%(depth)s] FROM store s
                WHERE s.prefix COLLATE "C" = found.prefix AND """
    + LIVING
    + """ LIMIT 1
            )
        END AS namespace OFFSET 0
    ) AS kept
    WHERE %(end)s::text IS NULL OR found.prefix < %(end)s
)
SELECT n.namespace FROM (SELECT DISTINCT namespace FROM steps WHERE namespace IS NOT NULL) AS n
ORDER BY n.namespace COLLATE "C" LIMIT %(limit)s OFFSET %(offset)s"""
)

# First labels in the same way, which come twice if a namespace is one alone and others are below
# it; and whether they have no data key.
ROOTS: LiteralString = """
WITH RECURSIVE steps (root, bound) AS (
    SELECT NULL::text COLLATE "C", %(bound)s::text COLLATE "C"
    UNION ALL
    SELECT split_part(found.prefix, '.', 1), CASE
        WHEN strpos(found.prefix, '.') > 0 THEN split_part(found.prefix, '.', 1) || '/'
        ELSE found.prefix || chr(1)
    END COLLATE "C"
    FROM steps CROSS JOIN LATERAL (
        SELECT s.prefix COLLATE "C" AS prefix FROM store s WHERE s.prefix COLLATE "C" >= steps.bound
        AND (%(end)s::text IS NULL OR s.prefix COLLATE "C" < %(end)s)
        ORDER BY s.prefix COLLATE "C" LIMIT 1
    ) AS found
)
SELECT t.bound, t.root, NOT EXISTS (SELECT FROM vat_store_keys k WHERE k.root = t.root)
FROM (SELECT * FROM steps WHERE root IS NOT NULL LIMIT %(limit)s) AS t ORDER BY t.bound
"""

# More labels than a namespace can have.
_MOST_LABELS = 2_000


def listing(
    root: str, conditions: Sequence[MatchCondition], max_depth: int | None
) -> dict[str, Any]:
    """
    Return the parameters of `LIST`, but for limit and offset.

    Args:
        root: The label that all namespaces begin with and none is shown with; "" for none.
        conditions: What they must be like without it.
        max_depth: How many labels of each are shown; None for all.
    """
    beginnings = (c.path for c in conditions if c.match_type == "prefix")
    literal = max((_literal(path) for path in beginnings), key=len, default=())
    stored = ".".join([root, *literal] if root else literal)
    return {
        "first": f"{root}." if root == stored != "" else stored,  # no namespace is the root alone
        "below": f"{stored}." if stored else "",
        "end": f"{stored}/" if stored else None,
        "cut": len(root) + 1 if root else 0,
        "hidden": None if root else "vat-tenant:",
        "patterns": [_pattern(c) for c in conditions if c.path],
        "depth": min(_MOST_LABELS if max_depth is None else max_depth, _MOST_LABELS),
    }


def _literal(path: Sequence[str]) -> tuple[str, ...]:
    return tuple(itertools.takewhile(lambda label: label != "*", path))


def _pattern(condition: MatchCondition) -> str:
    """Return it as a regular expression; what `re` escapes means itself to Postgres, too."""
    labels = ("[^.]+" if label == "*" else re.escape(label) for label in condition.path)
    joined = r"\.".join(labels)
    return rf"^{joined}(\.|$)" if condition.match_type == "prefix" else rf"(^|\.){joined}$"


def ranges(prefix: str) -> list[tuple[str, str | None]]:
    """Return where a namespace is, and where all below it are: from the first, before the other."""
    if not prefix:  # and no tenant's
        return [("", "vat-tenant:"), ("vat-tenant;", None)]
    return [(prefix, f"{prefix}\x01"), (f"{prefix}.", f"{prefix}/")]


def below(prefix: str) -> tuple[str, str | None]:
    """Return where all below a namespace is, in the same way; of "" all there is, and tenants'."""
    return ranges(prefix)[1] if prefix else ("", None)


# Of a label that was shredded nothing can be found.
COUNT: LiteralString = (
    "SELECT count(*) FROM store s WHERE "
    + SCOPE
    + """ AND {filter} AND (
    NOT %(is_sealed)s OR split_part(s.prefix, '.', 1) <> ALL (
        SELECT k.root FROM vat_store_keys k WHERE k.data_key = ''
    )
)"""
)

# The next items of a range; behind those at the end of it nothing is looked at.
NEXT: LiteralString = """
s.prefix COLLATE "C" >= %(first)s AND (%(end)s::text IS NULL OR s.prefix COLLATE "C" < %(end)s)
AND (s.prefix COLLATE "C", s.key) > (%(after_prefix)s, %(after_key)s)"""
IN_ORDER: LiteralString = ORDER + " LIMIT %(limit)s"

PAGE: LiteralString = (
    "SELECT {columns} FROM store s WHERE " + NEXT + " AND {filter} AND " + LIVING + IN_ORDER
)

# Tells how many of them lived, and which was the last. Their vectors go with them.
DELETE_NEXT: LiteralString = (
    """
WITH gone AS (
    DELETE FROM store s USING (
        SELECT s.prefix, s.key FROM store s WHERE """
    + NEXT
    + IN_ORDER
    + """ FOR UPDATE
    ) AS n
    WHERE s.prefix = n.prefix AND s.key = n.key RETURNING s.prefix, s.key, """
    + LIVING
    + """ AS lived
)
SELECT (SELECT count(*) FROM gone WHERE lived), g.prefix, g.key
FROM gone g ORDER BY g.prefix COLLATE "C" DESC, g.key DESC LIMIT 1"""
)

# --- row-level security -----------------------------------------------------------

# The first label of the tenant that a transaction says it is of; null, which is none, otherwise.
_TENANT: LiteralString = (
    "'vat-tenant:' || replace(replace(nullif(current_setting('langgraph_vat.tenant', true), ''),"
    " '%', '%25'), '.', '%2E')"
)
# In this form Postgres asks once a statement, and finds the tenant's rows by the primary key.
_BY_PREFIX: LiteralString = (
    'prefix COLLATE "C" >= (SELECT '
    + _TENANT
    + " || '.') AND prefix COLLATE \"C\" < (SELECT "
    + _TENANT
    + " || '/')"
)
_BY_ROOT: LiteralString = "root = (SELECT " + _TENANT + ")"
_KEYS = "vat_store_keys"


def row_security(table: str) -> list[sql.Composable]:
    """Return the statements after which a tenant's transaction has only its own rows of a table."""
    name = sql.Identifier(table)
    own = sql.SQL(_BY_ROOT if table == _KEYS else _BY_PREFIX)
    statements: list[sql.Composable] = [
        sql.SQL("DROP POLICY IF EXISTS vat_tenant ON {}").format(name),
        sql.SQL("CREATE POLICY vat_tenant ON {} USING ({})").format(name, own),
        sql.SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY").format(name),
    ]
    if table == _KEYS:  # that of the tokens is read by all tenants, and changed by none
        statements += map(sql.SQL, _INDEX_KEY)
    return statements


_INDEX_KEY: tuple[LiteralString, ...] = (
    "DROP POLICY IF EXISTS vat_index_key ON vat_store_keys",
    "CREATE POLICY vat_index_key ON vat_store_keys FOR SELECT USING (root = '')",
)
# Whether the role has all items: policies are none for it, or one of them hides nothing.
SEES_ALL: LiteralString = """
(NOT row_security_active('store') OR EXISTS (
    SELECT FROM pg_policy p, unnest(p.polroles) AS r (role)
    WHERE p.polrelid = 'store'::regclass AND p.polpermissive AND p.polcmd IN ('*', 'r')
    AND pg_get_expr(p.polqual, p.polrelid) = 'true' AND (r.role = 0 OR pg_has_role(r.role, 'USAGE'))
))"""
# Of the tables that are there: whether they have it, and whether nothing of it is missing.
SECURED: LiteralString = """
SELECT t.name, c.relrowsecurity, c.relrowsecurity AND c.relforcerowsecurity AND EXISTS (
    SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'vat_tenant'
)
FROM unnest(%(tables)s::text[]) AS t (name) JOIN pg_class c ON c.oid = to_regclass(t.name)
"""
