"""
What a sealed value is bound to, as bytes.

The encoding is canonical and injective: the number of parts, then each part
after its length, all as 4-byte big-endian integers. Two different lists of
parts never give the same bytes. It is total: a lone surrogate, which UTF-8
does not have, counts as its three bytes in generalized UTF-8.
"""


def associated_data(*parts: str | bytes) -> bytes:
    """Return `parts` in the canonical encoding; a string counts as its UTF-8 bytes."""
    encoded = [
        part.encode(errors="surrogatepass") if isinstance(part, str) else part for part in parts
    ]
    lengths = [len(part).to_bytes(4) for part in encoded]
    body = b"".join(piece for pair in zip(lengths, encoded, strict=True) for piece in pair)
    return len(encoded).to_bytes(4) + body
