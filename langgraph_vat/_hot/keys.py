"""
The names of our Redis keys.

All keys of a thread carry the same hash tag, ``{prefix:bucket}``, and so does
the set of dirty threads of its bucket: one script may touch them all, on a
Redis Cluster too. Names are injective: a thread id or namespace of any
content leads to a key of its own, because each is preceded by its length.
"""

from zlib import crc32

BUCKETS = 128


class Keys:
    """Key names under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.buckets = [self._name(bucket, "d") for bucket in range(BUCKETS)]
        self.identity = self._name(0, "identity")

    def meta(self, thread_id: str) -> bytes:
        """Hash: the thread's fence, epoch, step count and fill ticket."""
        return self._of(thread_id, "m")

    def journal(self, thread_id: str) -> bytes:
        """Stream: what is acknowledged and not yet trimmed."""
        return self._of(thread_id, "j")

    def dirty(self, thread_id: str) -> bytes:
        """Sorted set: the bucket's threads with a journal, by the time it began."""
        return self.buckets[self._bucket(thread_id)]

    def head(self, thread_id: str, checkpoint_ns: str) -> bytes:
        """Hash: the newest checkpoint of a namespace with its values and pending writes."""
        return self._of(thread_id, "h") + b":" + checkpoint_ns.encode()

    def vector(self, place: int) -> bytes:
        """String: one of the vectors that are kept, by its place among all."""
        return self._name(place % BUCKETS, f"e:{place}")

    def _of(self, thread_id: str, kind: str) -> bytes:
        raw = thread_id.encode()
        return self._name(self._bucket(thread_id), f"{kind}:{len(raw)}:") + raw

    def _name(self, bucket: int, rest: str) -> bytes:
        return f"{{{self._prefix}:{bucket}}}:{rest}".encode()

    @staticmethod
    def _bucket(thread_id: str) -> int:
        return crc32(thread_id.encode()) % BUCKETS
