"""Create or migrate the store's tables, in one locked transaction, and only if needed."""

import re
from typing import Any

import psycopg
from psycopg import sql as composing

from langgraph_vat._durable import items as sql
from langgraph_vat._durable import schema
from langgraph_vat._io.protocols import Backend, Session
from langgraph_vat._ops.schema import lacking, migrate, script
from langgraph_vat._ops.search import VectorIndex
from langgraph_vat.errors import ConfigurationError, SchemaError


async def setup_items(
    backend: Backend, index: VectorIndex | None, *, create_extension: bool
) -> None:
    """
    Bring the store's tables up to date, and check that they fit the index.

    Raises:
        SchemaError: pgvector is not there and may not be created, the role
            may not change the schema, or another session holds its tables.
        ConfigurationError: The table's vectors have other dimensions.
    """
    has_items, has_vectors = (await backend.durable.fetch(sql.IS_CURRENT))[0]
    if not has_items or (index is not None and not has_vectors):

        async def body(session: Session) -> None:
            await session.execute(schema.LOCK_TIMEOUT)
            await session.execute(schema.LOCK)
            for statement in sql.SCHEMA:
                await session.execute(statement)
            if index is not None:
                await _create_vectors(session, index, create_extension=create_extension)

        await migrate(backend, body, sql.BLOCKERS)
    if index is not None:
        _refuse_other_dims(index, (await backend.durable.fetch(sql.VECTOR_COLUMN))[0][0])


def ddl(schema: str | None, index: VectorIndex | None) -> str:
    """Return what `setup_items` would run on a new or an older database, as a script."""
    statements: list[composing.Composable] = [composing.SQL(statement) for statement in sql.SCHEMA]
    if index is not None:
        statements.append(composing.SQL(sql.CREATE_EXTENSION))
        statements += sql.vector_schema(index.type, index.kind, index.opclass, index.options)
    return script(schema, statements)


async def check_items(backend: Backend, index: VectorIndex | None) -> list[str]:
    """Return what the tables or the role lack; nothing if the store can work."""
    found = []
    if index is not None and not await backend.durable.fetch(sql.HAS_EXTENSION):
        found.append(
            "the extension vector is missing: have a superuser run CREATE EXTENSION vector"
        )
    vectors = () if index is None else ("store_vectors",)
    return found + await lacking(backend, (*sql.TABLES, *vectors))


async def _create_vectors(session: Session, index: VectorIndex, *, create_extension: bool) -> None:
    if not await session.fetch(sql.HAS_EXTENSION):
        if not create_extension:
            raise _no_extension("create_extension=False")
        try:
            await session.execute(sql.CREATE_EXTENSION)
            await session.fetch(sql.HAS_EXTENSION)
        except psycopg.Error as error:
            raise _no_extension(type(error).__name__) from error
    for statement in sql.vector_schema(index.type, index.kind, index.opclass, index.options):
        await session.execute(composing.Composed([statement]))


def _no_extension(why: str) -> SchemaError:
    return SchemaError(
        "semantic search needs the extension pgvector in this database, and it was not created"
        f" ({why}). Nothing was changed. Install pgvector on the server, and have"
        " a superuser run CREATE EXTENSION vector; or leave out index=."
    )


def _refuse_other_dims(index: VectorIndex, column: Any) -> None:
    found = re.search(r"\((\d+)\)", str(column))
    if found and int(found[1]) != index.dims:
        raise ConfigurationError(
            f"the table's vectors have {found[1]} dimensions and index= says {index.dims}. Nothing"
            " was written. Use the embedder it was made with, or another schema=."
        )
