"""
Texts to vectors, whatever the embedder does.

1. No transaction is open meanwhile.
2. It is asked again, a few times and not for longer than was set; what would fail again
   is not repeated. Where others' texts were in the same call, each is asked for alone.
3. What it gives is checked. A wrong embedder is an error; one that fails is not, where
   only documents need it: whoever asked is told which have no vector.
4. While it is found failing, documents do not ask it again for a while: nobody waits for
   the same outage twice.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from langgraph_vat._io.protocols import Backend, Embedder, EmbedderError
from langgraph_vat._ops.embedding_cache import EmbeddingCache
from langgraph_vat._ops.search import VectorIndex, failed_to_embed
from langgraph_vat._ops.shared import now
from langgraph_vat.errors import ConfigurationError

logger = logging.getLogger("langgraph_vat")

# Seconds before it is asked again; so it is asked three times.
PAUSES_S = (0.2, 0.8)
# Seconds for which documents do not ask what was just found failing.
_LEFT_ALONE_S = 30.0
# Nor, for so many, is it said again.
_SAID_S = 60.0
_PROBE = "text"


@dataclass(slots=True)
class Outage:
    """Whether the embedder fails, as this process saw it last. Approximate under threads."""

    kind: str = ""
    """What it raised last; empty if it works."""
    left_alone_until: float = 0.0
    said_at: float = float("-inf")

    def begin(self, kind: str, *, may_pass: bool) -> None:
        """Note that it failed; say it once."""
        if may_pass:  # else it may be the text
            self.left_alone_until = now() + _LEFT_ALONE_S
        self.say(kind)

    def say(self, kind: str) -> None:
        """Warn that it fails, unless that was said."""
        is_said = bool(self.kind) or now() - self.said_at < _SAID_S
        self.kind = kind
        if is_said:
            return
        self.said_at = now()
        logger.warning(
            "the embedder fails (%s). Items are stored without vectors, and wait in Postgres until"
            " it works; a search by a query raises. pending() says how many wait.",
            kind,
        )

    def end(self) -> None:
        """Note that it works."""
        if self.kind:
            self.kind, self.left_alone_until = "", 0.0
            logger.info("the embedder works.")

    def may_ask(self) -> bool:
        """Whether a document asks it: in an outage, one after a while."""
        if now() < self.left_alone_until:
            return False
        if self.is_away:
            self.left_alone_until = now() + _LEFT_ALONE_S
        return True

    @property
    def is_away(self) -> bool:
        """Whether it failed in a way that may pass, and was not found working since."""
        return self.left_alone_until > 0


@dataclass(slots=True)
class Embedding:
    """What all operations of one store share about its embedder."""

    index: VectorIndex
    documents: Embedder
    queries: Embedder
    timeout_s: float
    cache: EmbeddingCache | None = None
    outage: Outage = field(default_factory=Outage)
    is_closed: bool = False

    def close(self) -> None:
        """Have nobody wait for it any longer: what waits is stored, and queued."""
        self.is_closed = True
        self.documents.close()
        self.queries.close()


@dataclass(slots=True)
class Embedded:
    """Texts that have a vector, as pgvector's literal; and what failed if others have none."""

    vectors: dict[str, str] = field(default_factory=dict)
    failure: str = ""


async def embed_documents(
    embedding: Embedding, backend: Backend, texts: Collection[str]
) -> Embedded:
    """
    Embed texts of items, as many as can be.

    Raises:
        ConfigurationError: The embedder gave something else than such vectors.
    """
    return await _patiently(embedding, backend, embedding.documents, texts)


async def embed_queries(
    embedding: Embedding, backend: Backend, texts: Collection[str]
) -> dict[str, str]:
    """
    Embed queries.

    Raises:
        UnavailableError: The embedder failed.
        ConfigurationError: It gave something else than such vectors.
    """
    found = await _patiently(embedding, backend, embedding.queries, texts)
    if found.failure:
        raise failed_to_embed(found.failure)
    return found.vectors


async def embed_queued(embedding: Embedding, backend: Backend, texts: Collection[str]) -> Embedded:
    """Embed texts of items that wait: nobody else is asked for, and nothing is repeated here."""
    try:
        return await _embed(
            embedding, backend, embedding.documents, texts, _once(embedding, backend)
        )
    except ConfigurationError as error:
        return Embedded(failure=type(error).__name__)


async def failure_for_all(embedding: Embedding, backend: Backend) -> str:
    """Return the type of what an embedder raises that is asked for what any can embed."""
    try:
        await _checked(embedding, [_PROBE], _once(embedding, backend))
    except EmbedderError as error:
        return error.kind
    except ConfigurationError as error:
        return type(error).__name__
    return ""


def _once(embedding: Embedding, backend: Backend) -> Callable[[Sequence[str]], Awaitable[Any]]:
    return partial(backend.embed, embedding.documents, timeout_s=embedding.timeout_s, alone=True)


async def _embed(
    embedding: Embedding,
    backend: Backend,
    embedder: Embedder,
    texts: Collection[str],
    ask: Callable[[Sequence[str]], Awaitable[Any]],
) -> Embedded:
    cache, found = embedding.cache, Embedded()
    every = list(dict.fromkeys(texts))
    for start in range(0, len(every), embedder.most):
        part = every[start : start + embedder.most]
        if cache is not None:
            found.vectors.update(await cache.get(backend, embedder.kind, part))
            part = [text for text in part if text not in found.vectors]
        try:
            new = await _checked(embedding, part, ask) if part else {}
        except EmbedderError as error:
            found.failure = error.kind
            break
        found.vectors.update(new)
        if cache is not None:
            await cache.set(backend, embedder.kind, new)
    return found


async def _checked(
    embedding: Embedding, texts: Sequence[str], ask: Callable[[Sequence[str]], Awaitable[Any]]
) -> dict[str, str]:
    literals = embedding.index.literals(await ask(texts), len(texts))
    embedding.outage.end()
    return dict(zip(texts, literals, strict=True))


async def _patiently(
    embedding: Embedding, backend: Backend, embedder: Embedder, texts: Collection[str]
) -> Embedded:
    async def ask(texts: Sequence[str]) -> Any:
        outage = embedding.outage
        if embedder is embedding.documents and not outage.may_ask():
            raise EmbedderError(outage.kind, is_lasting=False, was_shared=False)
        try:
            return await _repeated(embedding, backend, embedder, texts)
        except EmbedderError as error:
            if not embedding.is_closed:
                outage.begin(error.kind, may_pass=not error.is_lasting)
            raise

    return await _embed(embedding, backend, embedder, texts, ask)


async def _repeated(
    embedding: Embedding, backend: Backend, embedder: Embedder, texts: Sequence[str]
) -> Any:
    """Ask again while it may help, and there is time; after the first time, for nobody else."""
    until = now() + embedding.timeout_s
    pauses = [] if embedding.outage.is_away else [*PAUSES_S]
    alone = False
    while True:
        try:
            left_s = until - now()
            return await backend.embed(embedder, texts, timeout_s=left_s, alone=alone)
        except EmbedderError as error:
            if error.was_shared:
                pause_s = 0.0
            elif error.is_lasting or not pauses:
                raise
            else:
                pause_s = pauses.pop(0)
            if now() + pause_s >= until:
                raise
        alone = True
        if pause_s:
            await backend.sleep(pause_s)
