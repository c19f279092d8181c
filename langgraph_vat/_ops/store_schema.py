"""Create or migrate the store's tables, in one locked transaction, and only if needed."""

import itertools
import re
from collections.abc import Collection

import psycopg
from psycopg import sql as composing

from langgraph_vat._durable import embedding as queue
from langgraph_vat._durable import items as sql
from langgraph_vat._durable import lexical, namespaces, schema
from langgraph_vat._durable.blind import item_indexes
from langgraph_vat._io.protocols import Backend, Session
from langgraph_vat._ops.schema import (
    add_indexes,
    check_schema,
    damages,
    migrate,
    script,
    slow,
    unusable,
)
from langgraph_vat._ops.search import VectorIndex
from langgraph_vat._ops.texts import TextIndex
from langgraph_vat.errors import ConfigurationError, SchemaError


async def setup_items(
    backend: Backend,
    index: VectorIndex | None,
    filterable: Collection[str],
    *,
    create_extension: bool,
) -> None:
    """
    Bring the store's tables up to date, and check that they fit the index.

    Raises:
        SchemaError: pgvector is not there and may not be created, the role
            may not change the schema, or another session holds its tables.
        ConfigurationError: The table's vectors have other dimensions.
    """
    tables = sql.TABLES if index is None else sql.VECTOR_TABLES
    lacks_index = await backend.durable.fetch(namespaces.LACKS_INDEX)
    if lacks_index or await damages(backend.durable, tables):

        async def body(session: Session) -> None:
            await session.execute(schema.LOCK)
            for statement in sql.SCHEMA:
                await session.execute(statement)
            if index is not None:
                await _create_vectors(session, index, create_extension=create_extension)
                for statement in queue.SCHEMA:
                    await session.execute(statement)

        await migrate(backend, body, sql.BLOCKERS)
    await add_indexes(backend, item_indexes(filterable), sql.BLOCKERS)
    if index is not None and (problem := await _other_dims(backend, index)):
        raise ConfigurationError(f"{problem}. Nothing was written.")


async def has_row_security(backend: Backend) -> bool:
    """Whether the store has row-level security."""
    return (await _secured(backend))[0]


async def secure(backend: Backend) -> None:
    """Give the store's tables row-level security, as far as they lack it."""
    lacking = (await _secured(backend))[1]

    async def body(session: Session) -> None:
        await session.execute(schema.LOCK)
        for statement in itertools.chain(*map(namespaces.row_security, lacking)):
            await session.execute(composing.Composed([statement]))

    if lacking:
        await migrate(backend, body, sql.BLOCKERS)


async def _secured(backend: Backend) -> tuple[bool, list[str]]:
    """Return whether the store has row-level security, and which tables lack a part of it."""
    params = {"tables": [*sql.VECTOR_TABLES, lexical.TEXTS]}
    found = await backend.durable.fetch(namespaces.SECURED, params)
    is_on = any(has for name, has, _ in found if name == "store")
    return is_on, [name for name, _, is_whole in found if not is_whole]


def ddl(
    schema: str | None,
    index: VectorIndex | None,
    filterable: Collection[str],
    texts: TextIndex | None,
    *,
    create_extension: bool,
    row_security: bool,
) -> str:
    """Return what `setup` would run on a new or an older database as a script."""
    statements: list[composing.Composable] = [composing.SQL(statement) for statement in sql.SCHEMA]
    if index is not None:
        if create_extension:
            statements.append(composing.SQL(sql.CREATE_EXTENSION))
        statements += sql.vector_schema(index.type, index.kind, index.opclass, index.options)
        statements += map(composing.SQL, queue.SCHEMA)
    statements += [statement for _, statement in item_indexes(filterable)]
    tables = [*(sql.TABLES if index is None else sql.VECTOR_TABLES)]
    if texts is not None:
        statements += texts.schema()
        tables.append(lexical.TEXTS)
    for name in tables if row_security else ():
        statements += namespaces.row_security(name)
    return script(schema, statements)


async def check_items(
    backend: Backend, schema: str | None, index: VectorIndex | None, filterable: Collection[str]
) -> list[str]:
    """Return what the tables or the role lack; nothing if the store can work."""
    if problems := await check_schema(backend, schema):
        return problems
    if index is None:
        found = await damages(backend.durable, sql.TABLES) + await unusable(backend, [*sql.TABLES])
    else:
        found = await _check_vectors(backend, index)
    if found:
        return found
    if await backend.durable.fetch(namespaces.LACKS_INDEX):
        found.append("index vat_store_prefix is missing: run setup()")
    is_secured, lacking = await _secured(backend)
    if is_secured:
        found += [f"table {name} lacks the row security of store: run setup()" for name in lacking]
    return found + await slow(backend, "filterable_fields", item_indexes(filterable))


async def _check_vectors(backend: Backend, index: VectorIndex) -> list[str]:
    found = []
    place = await backend.durable.fetch(sql.FIND_EXTENSION)
    if not place:
        found.append(
            "the extension vector is missing: have a superuser run CREATE EXTENSION vector"
        )
    elif not place[0][1]:
        found.append(_hidden(place[0][0]))
    found += await damages(backend.durable, sql.VECTOR_TABLES)
    found += await unusable(backend, [*sql.VECTOR_TABLES])
    if not found and (problem := await _other_dims(backend, index)):
        found.append(problem)
    return found


async def _create_vectors(session: Session, index: VectorIndex, *, create_extension: bool) -> None:
    place = await session.fetch(sql.FIND_EXTENSION)
    if not place:
        if not create_extension:
            raise _no_extension("create_extension=False")
        try:
            await session.execute(sql.CREATE_EXTENSION)
            place = await session.fetch(sql.FIND_EXTENSION)
        except psycopg.Error as error:
            raise _no_extension(type(error).__name__) from error
    if not place[0][1]:
        raise SchemaError(f"{_hidden(place[0][0])}. Nothing was changed.")
    for statement in sql.vector_schema(index.type, index.kind, index.opclass, index.options):
        await session.execute(composing.Composed([statement]))


def _hidden(place: str) -> str:
    return (
        f"pgvector is in schema {place}, which is not on the search path: have a superuser run"
        " ALTER EXTENSION vector SET SCHEMA public"
    )


def _no_extension(why: str) -> SchemaError:
    return SchemaError(
        "semantic search needs the extension pgvector in this database, and it was not created"
        f" ({why}). Nothing was changed. Install pgvector on the server, and have"
        " a superuser run CREATE EXTENSION vector; or leave out index=."
    )


async def _other_dims(backend: Backend, index: VectorIndex) -> str | None:
    column = (await backend.durable.fetch(sql.VECTOR_COLUMN))[0][0]
    found = re.search(r"\((\d+)\)", str(column))
    if found is None or int(found[1]) == index.dims:
        return None
    return (
        f"the table's vectors have {found[1]} dimensions and index= says {index.dims}: use the"
        " embedder it was made with, or another schema="
    )
