"""
Values as Postgres keeps them with ``storage="compact"``: compressed, or as patches.

The type tag says what was done, after what the serializer said:

=============  ==========================================================
``+vat.zstd``  one Zstandard frame (RFC 8878)
``+vat.patch`` 16 bytes BLAKE2b of the value; how many bytes at its begin are
               the value's, too, how many after them are not used, and how
               many at its end are the value's, too, 8 bytes each; then a frame
               of the rest, with the rest of the base as raw-content dictionary
=============  ==========================================================

Patches are not chained one after another: the value at position p of a line
of versions builds on the one at p with its lowest bit cleared, as in
Subversion's skip-deltas. So a value is never further than log2(p) patches
away from one that is whole, and whoever appends to a list stores each of its
items log2(p)/2 times on average instead of p/2 times.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import TypeVar

import zstandard

from langgraph_vat.errors import SealError

T = TypeVar("T")
ZSTD = "+vat.zstd"
PATCH = "+vat.patch"

# Less than this, and a frame's header outweighs what it saves.
LEAST = 200
_LEVEL = 3
# The longest line of patches; then a value is stored whole again.
_LONGEST = 256
_DIGEST_BYTES = 16
_HEADER = struct.Struct(f">{_DIGEST_BYTES}sQQQ")
# A dictionary must have some bytes, and in a very large one Zstandard finds little.
_MIN_KNOWN = 64
_MOST_KNOWN = 3 * 2**18
_LEAST_KNOWN = 2**16
_KNOWN_TIMES = 64
# Larger than any value that Postgres can hold in a row.
_MOST = 2**30


def line_position(step: int, line: Sequence[T]) -> tuple[int, list[T]]:
    """
    Return where the next value of a line stands, and what it builds on.

    Args:
        step: Position of the newest version.
        line: What that one builds on, the whole value first, and itself.

    Returns:
        The new position, and the versions that lead to it: none for position
        0, where the value is stored whole.
    """
    position = step + 1
    if position >= _LONGEST or not line:
        return 0, []
    return position, list(line[: position.bit_count()])


def pack(type_: str, data: bytes, base: bytes | None = None) -> tuple[str, bytes]:
    """Return the smallest form of a value; `base` is another value's bytes it may resemble."""
    if len(data) < LEAST:
        return type_, data
    patch = _patch(data, base) if base is not None else data
    if 8 * len(patch) <= len(data):
        return type_ + PATCH, patch
    frame = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(data)
    if 2 * len(patch) <= len(frame):
        return type_ + PATCH, patch
    if len(frame) < len(data):
        return type_ + ZSTD, frame
    return type_, data


def _patch(data: bytes, base: bytes) -> bytes:
    begin = _common_begin(data, base)
    end = _common_end(data[begin:], base[begin:])
    rest, known = data[begin : len(data) - end], base[begin : len(base) - end]
    # What grows does so at its end, and a dictionary costs as much as it is long.
    unused = max(
        0, len(known) - max(_KNOWN_TIMES * len(rest), _LEAST_KNOWN), len(known) - _MOST_KNOWN
    )
    header = _HEADER.pack(_digest(data), begin, unused, end)
    return header + _compressor(rest, known[unused:]).compress(rest)


def _common_begin(left: bytes, right: bytes) -> int:
    """Return how many first bytes of two values are equal: halving, as comparing is memcmp."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_end(left: bytes, right: bytes) -> int:
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[-middle : len(left) - low] == right[-middle : len(right) - low]:
            low = middle
        else:
            high = middle - 1
    return low


def _compressor(rest: bytes, known: bytes) -> zstandard.ZstdCompressor:
    if len(known) < _MIN_KNOWN or len(rest) > _MOST_KNOWN:
        return zstandard.ZstdCompressor(level=_LEVEL)
    window = (len(rest) + len(known)).bit_length()
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, source_size=len(rest), dict_size=len(known), window_log=max(window, 10)
    )
    return zstandard.ZstdCompressor(dict_data=_dictionary(known), compression_params=parameters)


def unpack(
    type_: str, data: bytes, base: bytes | None = None, *, is_base: bool = False
) -> tuple[str, bytes]:
    """
    Return what `pack` was given.

    Args:
        type_: Type tag.
        data: What `pack` returned.
        base: The bytes it was packed with.
        is_base: Whether it is only to build on: the digest of what does tells all.

    Raises:
        SealError: It is damaged, or the base is missing or another one.
    """
    try:
        if type_.endswith(ZSTD):
            return type_.removesuffix(ZSTD), _decompressed(data, b"")
        if type_.endswith(PATCH):
            return type_.removesuffix(PATCH), _apply(data, base, is_base=is_base)
    except zstandard.ZstdError:
        raise damaged() from None
    return type_, data


def _apply(patch: bytes, base: bytes | None, *, is_base: bool) -> bytes:
    if base is None or len(patch) < _HEADER.size:
        raise damaged()
    digest, begin, unused, end = _HEADER.unpack_from(patch)
    known = base[begin + unused : len(base) - end]
    rest = _decompressed(patch[_HEADER.size :], known)
    value = b"".join((base[:begin], rest, base[len(base) - end :]))
    if not is_base and digest != _digest(value):
        raise damaged()
    return value


def _decompressed(frame: bytes, known: bytes) -> bytes:
    if zstandard.frame_content_size(frame) > _MOST:
        raise damaged()
    # A frame that was made without a dictionary ignores this one.
    dictionary = None if len(known) < _MIN_KNOWN else _dictionary(known)
    return zstandard.ZstdDecompressor(dict_data=dictionary).decompress(frame, max_output_size=_MOST)


def is_patch(type_: str) -> bool:
    """Whether a value of this type builds on another."""
    return type_.endswith(PATCH)


def is_packed(type_: str) -> bool:
    """Whether a stored value is packed, whatever it is sealed with."""
    return ZSTD in type_ or PATCH in type_


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=_DIGEST_BYTES).digest()


def _dictionary(base: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def damaged() -> SealError:
    """Return the error of what cannot be unpacked."""
    return SealError(
        "a stored value is damaged, or what it builds on is missing or was changed. It was not"
        " used. Restore it from a backup."
    )
