"""
Create or migrate the schema: one transaction under one lock, and only if needed.

Where the schema is current this reads and nothing else, so a role with DML
rights is enough from then on. Ten processes may call it at once. It never
waits longer than ten seconds for somebody's open transaction, and then says
whose.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import LiteralString, TypeVar

import psycopg
from psycopg import sql as composing

from langgraph_vat._durable import schema as sql
from langgraph_vat._io.protocols import Backend, Session
from langgraph_vat.errors import SchemaError

logger = logging.getLogger("langgraph_vat")
T = TypeVar("T")


async def setup_checkpoints(backend: Backend) -> None:
    """
    Bring the checkpoint tables up to date.

    Raises:
        SchemaError: The schema is newer than this package, the role may not
            change it, or another session holds its tables.
    """
    if await _version(backend) == sql.VERSION:
        return

    async def body(session: Session) -> None:
        await session.execute(sql.LOCK_TIMEOUT)
        await session.execute(sql.LOCK)
        exists = (await session.fetch(sql.HAS_SCHEMA))[0][0]
        done = (await session.fetch(sql.SELECT_VERSION))[0][0] if exists else 0
        for migration in sql.MIGRATIONS[done:]:
            for statement in migration:
                await session.execute(statement)

    await migrate(backend, body, sql.BLOCKERS)


def ddl(schema: str | None) -> str:
    """Return what `setup_checkpoints` would run on a new or an older database, as a script."""
    statements = [statement for migration in sql.MIGRATIONS for statement in migration]
    return script(schema, [composing.SQL(statement) for statement in statements])


def script(schema: str | None, statements: Sequence[composing.Composable]) -> str:
    """Return statements as the text of a script that is run in one transaction."""
    first: list[composing.Composable] = []
    if schema is not None:
        name = composing.Identifier(schema)
        first = [
            composing.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(name),
            composing.SQL("SET LOCAL search_path TO {}, public").format(name),
        ]
    texts = (statement.as_string(None).strip() for statement in (*first, *statements))
    return "".join(f"{text};\n" for text in texts)


async def check_checkpoints(backend: Backend) -> list[str]:
    """Return what the tables or the role lack; nothing if the saver can work."""
    found = await lacking(backend, sql.TABLES)
    version = await _version(backend)
    if version != sql.VERSION:
        found.append(f"the schema is version {version}, and must be {sql.VERSION}: run setup()")
    return found


async def lacking(backend: Backend, tables: Sequence[str]) -> list[str]:
    """Return which tables are not there, and what the role may not do with the others."""
    found = []
    for name, is_missing, rights in await backend.durable.fetch(
        sql.LACKING, {"tables": list(tables)}
    ):
        if is_missing:
            found.append(f"table {name} is missing: run setup(), or what ddl() prints")
        elif rights:
            found.append(f"the role may not {', '.join(rights)} on table {name}: GRANT it")
    return found


async def warn_of_sealed(backend: Backend) -> None:
    """Say that others seal here, when this process does not: it may lack a setting."""
    if (await backend.durable.fetch(sql.HAS_SEALED))[0][0]:
        logger.warning(
            "this database has sealed threads and this saver has no keyring: it cannot open them,"
            " and what it writes is readable. Pass keyring= if that is not what you want."
        )


async def migrate(
    backend: Backend, body: Callable[[Session], Awaitable[T]], blockers: LiteralString
) -> T:
    """Run what locks tables in a transaction; if a lock is not to be had, name its holders."""
    try:
        return await backend.durable.transact(body)
    except psycopg.errors.LockNotAvailable as error:
        holders = [
            f"{name} (pid {pid}, {state})"
            for pid, name, state in await backend.durable.fetch(blockers)
        ]
        msg = (
            "the tables could not be locked within 10 s, because other sessions use them:"
            f" {', '.join(holders) or 'unknown'}. Nothing was changed. End them, or try again."
        )
        raise SchemaError(msg) from error


async def _version(backend: Backend) -> int:
    if not (await backend.durable.fetch(sql.HAS_SCHEMA))[0][0]:
        return 0
    version: int = (await backend.durable.fetch(sql.SELECT_VERSION))[0][0]
    if version > sql.VERSION:
        msg = (
            f"the schema is version {version}, made by a newer langgraph-vat than this one, which"
            f" knows {sql.VERSION}. Nothing was changed. Upgrade this process."
        )
        raise SchemaError(msg)
    return version
