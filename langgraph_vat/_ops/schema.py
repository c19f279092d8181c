"""
Create or migrate the schema: one transaction under one lock, and only if needed.

Where the schema is current this reads and nothing else, so a role with DML
rights is enough from then on. Ten processes may call it at once. It never
waits longer than ten seconds for somebody's open transaction, and then says
whose.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import LiteralString, TypeVar

from psycopg import sql as composing

from langgraph_vat._durable import schema as sql
from langgraph_vat._durable.blind import checkpoint_indexes
from langgraph_vat._io.protocols import Backend, Durable, LockTimeoutError, Session
from langgraph_vat.errors import SchemaError

logger = logging.getLogger("langgraph_vat")
T = TypeVar("T")


async def prepare(backend: Backend, schema: str | None) -> None:
    """
    Create the schema, if there is none, and see that its tables can be used.

    Raises:
        SchemaError: The role may not create, or not use it.
    """
    if schema is None:
        return
    exists, may_use = (await backend.durable.fetch(sql.SELECT_SCHEMA, {"schema": schema}))[0]
    if not exists:

        async def body(session: Session) -> None:
            await session.execute(_create_schema(schema))

        await backend.durable.transact(body)
    elif not may_use:
        raise SchemaError(f"{_no_usage(schema)}. Nothing was changed.")


def _no_usage(schema: str) -> str:
    return f"the role may not use schema {schema}: GRANT USAGE ON SCHEMA {schema} to it"


def _create_schema(schema: str) -> composing.Composed:
    """Return a statement after which the schema is there, whoever creates it at the same time."""
    name = composing.Identifier(schema)
    return composing.SQL(sql.CREATE_SCHEMA).format(text=composing.Literal(schema), name=name)


async def setup_checkpoints(backend: Backend, filterable: Collection[str]) -> None:
    """
    Bring the checkpoint tables up to date, and back to what they should be.

    Args:
        backend: The tiers.
        filterable: Fields of metadata that have tokens where it is sealed.

    Raises:
        SchemaError: The schema is newer than this package, the role may not
            change it, or another session holds its tables.
    """
    if not await _is_current(backend.durable):
        await _setup_checkpoints(backend)
    await add_indexes(backend, checkpoint_indexes(filterable), sql.BLOCKERS)


async def _setup_checkpoints(backend: Backend) -> None:
    async def body(session: Session) -> None:
        await session.execute(sql.LOCK)
        if await _is_current(session):
            return  # another process did it
        done = await _version(session)
        for migration in sql.MIGRATIONS[done if done < sql.VERSION else 0 :]:
            for statement in migration:
                await session.execute(statement)

    await migrate(backend, body, sql.BLOCKERS)


async def add_indexes(
    backend: Backend,
    indexes: Sequence[tuple[str, composing.Composed]],
    blockers: LiteralString,
) -> None:
    """Make those indexes that are not there, each given after its name."""

    async def body(session: Session) -> None:
        await session.execute(sql.LOCK)
        for statement in missing:
            await session.execute(statement)

    if missing := await missing_indexes(backend, indexes):
        await migrate(backend, body, blockers)


async def missing_indexes(
    backend: Backend, indexes: Sequence[tuple[str, composing.Composed]]
) -> list[composing.Composed]:
    """Return what makes those indexes that are not there, each given after its name."""
    return [
        statement
        for name, statement in indexes
        if not (await backend.durable.fetch(sql.HAS_INDEX, {"name": name}))[0][0]
    ]


async def _is_current(postgres: Durable | Session) -> bool:
    """Whether the schema has this version, and nobody took anything away from it."""
    return (
        await _version(postgres) == sql.VERSION
        and not await damages(postgres, sql.TABLES)
        and not any(line.startswith("trigger") for line in await _unguarded(postgres))
        and bool(await postgres.fetch(sql.HAS_STATE))
    )


async def _unguarded(postgres: Durable | Session) -> list[str]:
    """Return which tables lost their primary key, or the trigger that refuses strangers."""
    found = []
    for name, has_no_key, has_no_trigger in await postgres.fetch(
        sql.UNGUARDED, {"tables": list(sql.TABLES)}
    ):
        if has_no_key:
            found.append(f"table {name} has lost its primary key: put it back, or restore a backup")
        if has_no_trigger:
            found.append(
                f"trigger vat_refuse_strangers on {name} is missing, or disabled: run setup()"
            )
    return found


async def damages(postgres: Durable | Session, tables: Mapping[str, str]) -> list[str]:
    """Return which of these tables and their columns are not there."""
    found = []
    columns = {name: set(names.split()) for name, names in tables.items()}
    for name, present in await postgres.fetch(sql.SELECT_COLUMNS, {"tables": list(columns)}):
        if present is None:
            found.append(f"table {name} is missing: run setup(), or what ddl() prints")
        elif missing := sorted(columns[name] - set(present)):
            found.append(f"table {name} has no {', '.join(missing)}: run setup(), or ddl()'s SQL")
    return found


def ddl(schema: str | None, filterable: Collection[str], *, concurrently: bool) -> str:
    """Return what `setup_checkpoints` would run on a new or an older database, as a script."""
    statements = [statement for migration in sql.MIGRATIONS for statement in migration]
    later = [statement for _, statement in checkpoint_indexes(filterable)]
    if not concurrently:
        return script(schema, [*map(composing.SQL, statements), *later])
    first = [composing.SQL(one) for one in statements if one not in sql.INDEXES]
    path = "" if schema is None else f'SET search_path TO "{schema}", public, extensions;\n'
    texts = [one.as_string(None) for one in (*map(composing.SQL, sql.INDEXES), *later)]
    indexes = (one.strip().replace("INDEX", "INDEX CONCURRENTLY", 1) for one in texts)
    return script(schema, first) + path + "".join(f"{one};\n" for one in indexes)


def script(schema: str | None, statements: Sequence[composing.Composable]) -> str:
    """Return statements as the text of a script of one transaction."""
    first: list[composing.Composable] = [composing.SQL("BEGIN"), composing.SQL(sql.LOCK_TIMEOUT)]
    if schema is not None:
        path = composing.SQL("SET LOCAL search_path TO {}, public, extensions")
        first += [_create_schema(schema), path.format(composing.Identifier(schema))]
    every = (*first, composing.SQL(sql.LOCK), *statements, composing.SQL("COMMIT"))
    texts = (statement.as_string(None).strip() for statement in every)
    return "".join(f"{text};\n" for text in texts)


async def check_checkpoints(
    backend: Backend, schema: str | None, filterable: Collection[str]
) -> list[str]:
    """Return what the tables or the role lack; nothing if the saver can work."""
    if problems := await check_schema(backend, schema):
        return problems
    found = await damages(backend.durable, sql.TABLES) + await unusable(backend, list(sql.TABLES))
    if found:
        return found
    found = await _unguarded(backend.durable)
    version = await _version(backend.durable)
    if version != sql.VERSION:
        found.append(f"the schema is version {version}, and must be {sql.VERSION}: run setup()")
    if not await backend.durable.fetch(sql.HAS_STATE):
        found.append("table vat_state has lost its row: run setup(), or what ddl() prints")
    return found + await slow(backend, "filterable_metadata", checkpoint_indexes(filterable))


async def slow(
    backend: Backend, setting: str, indexes: Sequence[tuple[str, composing.Composed]]
) -> list[str]:
    """Say that indexes are missing without which a setting has little use."""
    missing = len(await missing_indexes(backend, indexes))
    return [f"{missing} indexes of {setting} are missing: run setup()"] if missing else []


async def check_schema(backend: Backend, schema: str | None) -> list[str]:
    """Return what keeps the role from seeing any table."""
    if schema is None:
        return []
    exists, may_use = (await backend.durable.fetch(sql.SELECT_SCHEMA, {"schema": schema}))[0]
    if not exists:
        return [f"schema {schema} is missing: run setup(), or what ddl() prints"]
    return [] if may_use else [_no_usage(schema)]


async def unusable(backend: Backend, tables: Sequence[str]) -> list[str]:
    """Return what the role may not do with the tables that are there."""
    return [
        f"the role may not {', '.join(rights)} on table {name}: GRANT it"
        for name, rights in await backend.durable.fetch(sql.LACKING, {"tables": list(tables)})
        if rights
    ]


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

    async def limited(session: Session) -> T:
        await session.execute(sql.LOCK_TIMEOUT)
        return await body(session)

    try:
        return await backend.durable.transact(limited)
    except LockTimeoutError as error:
        holders = [
            f"{name} (pid {pid}, {state})"
            for pid, name, state in await backend.durable.fetch(blockers)
        ]
        msg = (
            "the tables could not be locked within 10 s, because other sessions use them:"
            f" {', '.join(holders) or 'unknown'}. Nothing was changed. End them, or try again."
        )
        raise SchemaError(msg) from error


async def _version(postgres: Durable | Session) -> int:
    if not (await postgres.fetch(sql.HAS_SCHEMA))[0][0]:
        return 0
    version: int = (await postgres.fetch(sql.SELECT_VERSION))[0][0]
    if version > sql.VERSION:
        msg = (
            f"the schema is version {version}, made by a newer langgraph-vat than this one, which"
            f" knows {sql.VERSION}. Nothing was changed. Upgrade this process."
        )
        raise SchemaError(msg)
    return version
