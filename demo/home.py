"""
Where the agent's state lives: the only file of the demo that makes a `Vat`.

Every process opens the same state with the same key file. The processes know
each other by nothing else.
"""

from pathlib import Path
from typing import Any

from demo.embedder import local_embedder
from langgraph_vat import Keyring, Vat

# The worker dies after ten steps. Opening a thread may flush its first ones, so the count
# comes to six at the earliest with the sixth and as a rule before the tenth; the clock never.
FLUSH_EVERY_STEPS = 6
FLUSH_AFTER_S = 60.0


def start(home: Path) -> Vat:
    """Start a Postgres and a Redis of our own below a directory."""
    Keyring.generate().save(home / "keyring")
    return Vat.embedded(home / "servers", **_options(home))


def join(home: Path, postgres: str, redis: str) -> Vat:
    """Use the servers that another process has started."""
    return Vat.connect(postgres=postgres, redis=redis, **_options(home))


def _options(home: Path) -> dict[str, Any]:
    embedder = local_embedder()
    return {
        "keyring": Keyring.from_file(home / "keyring"),
        "index": {"dims": embedder.dims, "embed": embedder, "fields": ["text"]},
        "flush_every": FLUSH_EVERY_STEPS,
        "flush_after": FLUSH_AFTER_S,
    }
