"""Deterministic, local embedders: counts of letters, and what the text is long."""

import threading
from collections.abc import Callable


def embed(texts: list[str]) -> list[list[float]]:
    return [_vector(text) for text in texts]


def _vector(text: str) -> list[float]:
    counts = [float(text.lower().count(letter)) for letter in "abcdefghijklmno"]
    return [*counts, 0.5 + len(text) / 100]


DIMS = 16


class Embedder:
    """
    The same, as it is in life: it remembers what it was asked, fails, and hangs.

    `failing` is called with the texts before each answer, and may raise; while `gate` is
    not set no call returns. `begun` counts the calls that wait for it.
    """

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.failing: Callable[[list[str]], object] = lambda texts: None
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, texts: list[str]) -> list[list[float]]:
        self.calls.append(list(texts))
        self.gate.wait(60)
        self.failing(texts)
        return embed(texts)

    def fail(self, times: int = 1_000_000, error: type[Exception] = ConnectionError) -> None:
        """Fail so often, and quote the text."""
        left = [times]

        def failing(texts: list[str]) -> None:
            if left[0] > 0:
                left[0] -= 1
                raise error(f"cannot embed {texts}")

        self.failing = failing

    def work(self) -> None:
        self.failing = lambda texts: None
