"""
What a sealed value is bound to, as bytes.

The encoding is canonical and injective: the number of parts, then each part
after its length, all as 4-byte big-endian integers. Two different lists of
parts never give the same bytes. It is total: a lone surrogate, which UTF-8
does not have, counts as its three bytes in generalized UTF-8.
"""

from functools import lru_cache


def associated_data(*parts: str | bytes) -> bytes:
    """Return `parts` in the canonical encoding; a string counts as its UTF-8 bytes."""
    return len(parts).to_bytes(4) + encoded(*parts)


def encoded(*parts: str | bytes) -> bytes:
    """Return `parts` without their number: what is always the same can be encoded once."""
    return b"".join(map(_part, parts))


# Most are names that come again and again.
@lru_cache(maxsize=4096)
def _part(part: str | bytes) -> bytes:
    raw = part.encode(errors="surrogatepass") if isinstance(part, str) else part
    return len(raw).to_bytes(4) + raw
