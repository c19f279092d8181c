"""
``python -m benchmarks.sealing``: what sealing adds to dumping and loading a value.

Conversations of 1, 25 and 250 kB through the serializer alone, through
`EncryptedSerializer`, through the codec of our savers, which binds a value to its
place, with both ciphers, and through LangGraph's own encrypted serializer if
pycryptodome is installed.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from langchain_core.messages import HumanMessage

from benchmarks.storage import text
from langgraph_vat import EncryptedSerializer, Keyring, StrictSerializer
from langgraph_vat._seal.codec import SealedCodec
from langgraph_vat._seal.data_key import DataKey

SIZES = (1_000, 25_000, 250_000)
ROUNDS = 7
PLACE = ("blob", "", "messages", "00000000000000000000000000000042.0.5")


def _calls() -> dict[str, Callable[[Any], Any]]:
    serde = StrictSerializer()
    sealed = EncryptedSerializer(Keyring.generate(), serde)
    base = ("checkpoint", "thread", "generation")
    codec = SealedCodec(serde, DataKey.generate(), *base)
    other = SealedCodec(serde, DataKey.generate("chacha20poly1305"), *base)
    calls: dict[str, Callable[[Any], Any]] = {
        "plain": lambda value: serde.loads_typed(serde.dumps_typed(value)),
        "EncryptedSerializer": lambda value: sealed.loads_typed(sealed.dumps_typed(value)),
        "in our savers": lambda value: codec.load(*codec.dump(value, *PLACE), *PLACE),
        "the same, ChaCha20": lambda value: other.load(*other.dump(value, *PLACE), *PLACE),
    }
    try:
        from langgraph.checkpoint.serde.encrypted import EncryptedSerializer as OfLangGraph

        eax = OfLangGraph.from_pycryptodome_aes(key=bytes(range(32)))
        calls["LangGraph's, AES-EAX"] = lambda value: eax.loads_typed(eax.dumps_typed(value))
    except ImportError:
        pass
    return calls


def _microseconds(calls: dict[str, Callable[[Any], Any]], value: Any) -> dict[str, float]:
    """Return the medians of rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            count, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < 0.2:
                call(value)
                count += 1
            times[name].append((time.perf_counter() - begun) / count)
    return {name: 1e6 * statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Measure and print."""
    calls = _calls()
    for size in SIZES:
        value = [HumanMessage(text(min(size, 1_000))) for _ in range(max(1, size // 1_000))]
        found = _microseconds(calls, value)
        plain = found["plain"]
        for name, taken in found.items():
            more = f"{taken - plain:+9.1f} us {100 * (taken / plain - 1):+6.1f} %"
            sys.stdout.write(f"{size:8,} bytes {name:22} {taken:9.1f} us {more}\n")


if __name__ == "__main__":
    main()
