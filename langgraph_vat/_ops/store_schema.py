"""Create or migrate the store's tables, in one locked transaction, and only if needed."""

import re
from typing import Any

import psycopg
from psycopg import sql as composing

from langgraph_vat._durable import items as sql
from langgraph_vat._durable import schema
from langgraph_vat._io.protocols import Backend, Session
from langgraph_vat._ops.schema import migrate
from langgraph_vat._ops.search import VectorIndex
from langgraph_vat.errors import ConfigurationError, SchemaError


async def setup_items(backend: Backend, index: VectorIndex | None) -> None:
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
                await _create_vectors(session, index)

        await migrate(backend, body, sql.BLOCKERS)
    if index is not None:
        _refuse_other_dims(index, (await backend.durable.fetch(sql.VECTOR_COLUMN))[0][0])


async def _create_vectors(session: Session, index: VectorIndex) -> None:
    if not await session.fetch(sql.HAS_EXTENSION):
        try:
            await session.execute(sql.CREATE_EXTENSION)
            await session.fetch(sql.HAS_EXTENSION)
        except psycopg.Error as error:
            raise _no_extension(error) from error
    for statement in sql.vector_schema(index.type, index.kind, index.opclass, index.options):
        await session.execute(composing.Composed([statement]))


def _no_extension(error: psycopg.Error) -> SchemaError:
    return SchemaError(
        "semantic search needs the extension pgvector in this database, and it could not be created"
        f" ({type(error).__name__}). Nothing was changed. Install pgvector on the server, and have"
        " a superuser run CREATE EXTENSION vector; or leave out index=."
    )


def _refuse_other_dims(index: VectorIndex, column: Any) -> None:
    found = re.search(r"\((\d+)\)", str(column))
    if found and int(found[1]) != index.dims:
        raise ConfigurationError(
            f"the table's vectors have {found[1]} dimensions and index= says {index.dims}. Nothing"
            " was written. Use the embedder it was made with, or another schema=."
        )
