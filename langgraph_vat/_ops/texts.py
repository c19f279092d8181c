"""
The words by which items are found, as Postgres reads them out of their texts.

A document is written in the transaction that puts its item, and goes with it. Items from
before are given theirs by `index_texts`, a page at a time: each page is kept, and none
takes the place of what a process wrote meanwhile.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.store.base import PutOp
from psycopg import sql as composing

from langgraph_vat._durable import items as items_sql
from langgraph_vat._durable import lexical as sql
from langgraph_vat._durable import namespaces, schema
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Backend, Row, Session
from langgraph_vat._ops.fields import Fields
from langgraph_vat._ops.schema import damages, migrate, unusable
from langgraph_vat.errors import ConfigurationError, VatError
from langgraph_vat.serde import codec_for

_PAGE = 256
# Of an item: some 16,000 words, which is as far as Postgres counts; a fifth of what it holds.
_MOST_BYTES = 100_000
_INCOMPLETE = (
    "items from before text_search lack words: run setup(), under row-level security as a role"
    " that sees all items"
)


class TextIndex:
    """What is found by words: the texts at some fields, read by a configuration's rules."""

    def __init__(self, config: str, fields: Fields) -> None:
        self.config = config
        self._fields = fields

    def text(self, value: Mapping[str, Any], paths: Sequence[str] | None) -> str:
        """Return all texts of a value as one."""
        return readable("\n".join(self._fields.texts(value, paths).values()), _MOST_BYTES)

    def schema(self) -> list[composing.Composable]:
        """Return the statements that make its tables."""
        record = composing.SQL(sql.RECORD).format(config=composing.Literal(self.config))
        return [*map(composing.SQL, sql.SCHEMA), record]


def readable(text: str, most_bytes: int) -> str:
    """Return what Postgres can hold of the beginning of a text."""
    cut = text.encode("utf-8", "replace")[:most_bytes]
    return cut.decode("utf-8", "ignore").replace("\0", " ")


async def put_texts(
    texts: TextIndex, session: Session, kept: Mapping[tuple[str, str], PutOp]
) -> None:
    """Give the items that were just put their documents, an empty one to those without texts."""
    rows = [
        (*place, "" if op.index is False else texts.text(op.value or {}, op.index))
        for place, op in kept.items()
    ]
    await session.execute(sql.PUT_TEXTS, columns(rows, "prefixes", "keys", "texts"))


async def forget_texts(session: Session, root: str) -> None:
    """Delete the documents of a root that is sealed: they are readable."""
    if (await session.fetch(sql.HAS_TEXTS))[0][0]:
        await session.execute(sql.FORGET_TEXTS, {"root": root})


async def setup_texts(texts: TextIndex, backend: Backend, serde: SerializerProtocol) -> None:
    """
    Make the tables, and give the items from before their documents.

    Raises:
        ConfigurationError: There is no such configuration, or documents are by another one.
        SchemaError: The role may not create them, or another session holds the table of items.
    """
    if problem := await _unknown(texts, backend):
        raise ConfigurationError(f"{problem}. Nothing was written.")
    if await damages(backend.durable, sql.TABLES) or not await backend.durable.fetch(sql.RECORDED):

        async def body(session: Session) -> None:
            await session.execute(schema.LOCK)
            for statement in texts.schema():
                await session.execute(composing.Composed([statement]))

        await migrate(backend, body, items_sql.BLOCKERS)
    ((config, is_complete),) = await backend.durable.fetch(sql.RECORDED)
    if problem := _other(texts, config):
        raise ConfigurationError(f"{problem}. Nothing was written.")
    if not is_complete:
        await index_texts(texts, backend, serde)


async def check_texts(texts: TextIndex, backend: Backend) -> list[str]:
    """Return what keeps items from being found by words."""
    if problem := await _unknown(texts, backend):
        return [problem]
    found = await damages(backend.durable, sql.TABLES)
    if found := found + await unusable(backend, [sql.TEXTS]):
        return found
    recorded = await backend.durable.fetch(sql.RECORDED)
    if not recorded:
        return ["table vat_store_text_search has lost its row: run setup(), or what ddl() prints"]
    if problem := _other(texts, recorded[0][0]):
        return [problem]
    return [] if recorded[0][1] else [_INCOMPLETE]


async def _unknown(texts: TextIndex, backend: Backend) -> str:
    known = [name for (name,) in await backend.durable.fetch(sql.CONFIGS)]
    if texts.config in known:
        return ""
    return (
        f"text_search names {texts.config!r}, and this database has the text search configurations"
        f" {', '.join(known)}"
    )


def _other(texts: TextIndex, config: str) -> str:
    if config == texts.config:
        return ""
    return (
        f"the words of this store's items were read as {config!r} and text_search says"
        f" {texts.config!r}: use the same in all processes, or another schema=, or DROP TABLE"
        " vat_store_texts, vat_store_text_search and run setup(), which reads all anew"
    )


async def index_texts(
    texts: TextIndex, backend: Backend, serde: SerializerProtocol, only: str = ""
) -> int:
    """
    Give their documents to the items that have none, or one of another version; count them.

    Of `only` one root, or "" for all.
    """
    first, end = namespaces.below(only)
    place, size, count = ("", ""), _PAGE, 0
    while size == _PAGE:
        params: dict[str, Any] = {"first": first, "end": end, "limit": _PAGE}
        params |= {"after_prefix": place[0], "after_key": place[1]}
        rows = await backend.durable.fetch(sql.WITHOUT_TEXTS, params, plan_anew=True)
        new = [(*row[:2], row[6], row[3], _old_text(texts, serde, row)) for row in rows]
        names = ("prefixes", "keys", "updated", "types", "texts")
        count += len(await backend.durable.fetch(sql.ADD_TEXTS, columns(new, *names)))
        size, place = len(rows), rows[-1][:2] if rows else place
    if not only:
        await backend.durable.fetch(sql.COMPLETE)
    return count


def _old_text(texts: TextIndex, serde: SerializerProtocol, row: Row) -> str:
    prefix, key, value, type_, exact = row[:5]
    try:
        if type_ is not None:
            value = codec_for(serde, None).load(type_, exact, prefix, key)
    except VatError:
        return ""  # sealed, or damaged: nobody finds it by what it says
    return texts.text(value, None)
