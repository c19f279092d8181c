"""
Values as Postgres keeps them with ``storage="compact"``: compressed, or as patches.

The type tag says what was done, after what the serializer said:

=============  ==========================================================
``+vat.zstd``  one Zstandard frame (RFC 8878)
``+vat.patch`` 16 bytes XXH3-128 of the value; from where on the base is the frame's
               dictionary, and how many bytes at the base's end are the value's, 8
               bytes each; 1 byte, how many runs there are, and of each how many
               bytes the base has at the same place, 8 bytes, and how many after
               them it has not, 1 byte; then a frame of what is not the base's:
               the bytes after each run, and all between the last and the end
=============  ==========================================================

Patches are not chained one after another: the value at position p of a line
of versions builds on the one at p with its lowest bit cleared, as in
Subversion's skip-deltas. So a value is never further than log2(p) patches
away from one that is whole, and whoever appends to a list stores each of its
items log2(p)/2 times on average instead of p/2 times.
"""

import struct
from collections.abc import Callable, Sequence
from typing import TypeVar

import xxhash
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
_HEADER = struct.Struct(f">{_DIGEST_BYTES}sQQB")
_RUN = struct.Struct(">QB")
# A count or a date changes so few bytes, and then so many are as before.
_MOST_RUNS = 16
_MOST_BETWEEN = 16
_AGAIN = 32
# A dictionary must have some bytes; it costs as much as it is long, and in a very large
# one Zstandard finds little.
_MIN_KNOWN = 64
_MOST_KNOWN = 3 * 2**18
_BEFORE = 2**16
_KNOWN_TIMES = 64
_FEW = 16
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


def patch(type_: str, data: bytes, base: bytes) -> tuple[str, bytes] | None:
    """Return a value as a patch, if that is small enough to be sent again and again as it grows."""
    made = _patch(data, base)
    return (type_ + PATCH, made) if _FEW * len(made) <= len(data) else None


def _patch(data: bytes, base: bytes) -> bytes:
    runs, new, at = _runs(data, base)
    end = _common_end(data, base, at)
    rest = b"".join((*new, data[at : len(data) - end]))
    # What is new resembles what it replaces, and what stands before it.
    stop = len(base) - end
    most = min(max(_KNOWN_TIMES * len(rest), _BEFORE), _MOST_KNOWN)
    known = max(0, at - _BEFORE, stop - most)
    header = _HEADER.pack(_digest(data), known, end, len(runs))
    frame = _compressor(rest, base[known:stop]).compress(rest)
    return b"".join((header, *(_RUN.pack(*run) for run in runs), frame))


def _runs(data: bytes, base: bytes) -> tuple[list[tuple[int, int]], list[bytes], int]:
    """Return the runs that a value begins with, what is new after each, and where they end."""
    runs, new, at = [], [], 0
    for _ in range(_MOST_RUNS):
        same = _common_begin(data, base, at)
        at += same
        between = _between(data, base, at)
        runs.append((same, between))
        new.append(data[at : at + between])
        at += between
        if not between:
            break
    return runs, new, at


def _between(data: bytes, base: bytes, at: int) -> int:
    """Return after how few bytes two values are equal again; 0 if they are not."""
    for count in range(1, _MOST_BETWEEN + 1):
        again = data[at + count : at + count + _AGAIN]
        if len(again) == _AGAIN and again == base[at + count : at + count + _AGAIN]:
            return count
    return 0


def _common_begin(left: bytes, right: bytes, at: int) -> int:
    """Return how many bytes from `at` on are equal."""
    most = min(len(left), len(right)) - at
    return _equal(most, lambda low, high: left[at + low : at + high] == right[at + low : at + high])


def _common_end(left: bytes, right: bytes, at: int) -> int:
    """Return how many last bytes are equal, of those from `at` on."""
    most, one, other = min(len(left), len(right)) - at, len(left), len(right)
    return _equal(
        most, lambda low, high: left[one - high : one - low] == right[other - high : other - low]
    )


def _equal(most: int, is_equal: Callable[[int, int], bool]) -> int:
    """Return how many bytes are equal, at most: in steps that double and halve, each a memcmp."""
    low, step = 0, 64
    while low < most:
        high = min(low + step, most)
        if is_equal(low, high):
            low, step = high, 2 * step
        else:
            most, step = high - 1, max((high - low) // 2, 1)
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
    if base is None:
        raise damaged()
    try:
        digest, known, end, count = _HEADER.unpack_from(patch)
        at = _HEADER.size + count * _RUN.size
        runs = list(_RUN.iter_unpack(patch[_HEADER.size : at]))
    except struct.error:
        raise damaged() from None
    rest = _decompressed(patch[at:], base[known : len(base) - end])
    parts, old, new = list[bytes](), 0, 0
    for same, between in runs:
        parts += base[old : old + same], rest[new : new + between]
        old, new = old + same + between, new + between
    value = b"".join((*parts, rest[new:], base[len(base) - end :]))
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
    # It finds accidents, a hundred times as fast as a cryptographic one. Intent is
    # sealing's matter: patch and base are authenticated there.
    return xxhash.xxh3_128_digest(value)


def _dictionary(base: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def damaged() -> SealError:
    """Return the error of what cannot be unpacked."""
    return SealError(
        "a stored value is damaged, or what it builds on is missing or was changed. It was not"
        " used. Restore it from a backup."
    )
