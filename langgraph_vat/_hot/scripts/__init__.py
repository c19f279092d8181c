"""The Lua scripts, each a file beside this one; `_common.lua` precedes each of them."""

from hashlib import sha1
from importlib.resources import files

from langgraph_vat._io.protocols import Script

_HERE = files(__name__)
_COMMON = (_HERE / "_common.lua").read_text()


def _load(name: str) -> Script:
    source = f"{_COMMON}\n{(_HERE / f'{name}.lua').read_text()}"
    # Not a secret and not a signature: Redis names scripts by this digest.
    return Script(name, source, sha1(source.encode(), usedforsecurity=False).hexdigest())


CLOCK = _load("clock")
CLOSE = _load("close")
FILL = _load("fill")
GET = _load("get")
IDENTIFY = _load("identify")
JOURNAL = _load("journal")
LENGTH = _load("length")
POLICY = _load("policy")
PUT = _load("put")
PUT_WRITES = _load("put_writes")
REOPEN = _load("reopen")
TICKET = _load("ticket")
TRIM = _load("trim")
VOID = _load("void")
