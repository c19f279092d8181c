"""
Threads in a file: a saver that keeps what it is given as lines of JSON.

With `copy_checkpoints` it is the way out of any saver, and into any other::

    with Archive("threads.jsonl") as archive:
        copy_checkpoints(saver, archive)

The first line says ``archive`` (the version of this format, 1), the file's
``id`` and, if it is sealed, its data key as the keyring wrapped it. Each other
line is one of these; ``type`` and ``data`` (base64) are what the serializer
returned, compressed or as a patch (as ``langgraph_vat._durable.packing`` has
it), then sealed:

=========  ==================================================================
``value``  thread, namespace, channel, version; with ``step`` and ``bases``,
           its place in a line of patches: where in the file those lines
           begin that it builds on
``put``    thread, namespace, checkpoint id; with ``parent``, and ``values``,
           the channels that have one; the data are the checkpoint without
           values, and its metadata
``write``  thread, namespace, checkpoint id, task id, index; with ``path`` and
           ``channel``
=========  ==================================================================

Of lines that say the same the last one counts, as in any saver. A line that
a dying process left unfinished is cut off by the next that writes.
"""

import base64
import fcntl
import json
import os
import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    get_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_vat._durable.packing import is_patch, line_position, pack, unpack
from langgraph_vat._ops.values import address, next_version
from langgraph_vat._seal.associated_data import associated_data
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat._seal.strict import StrictSerializer
from langgraph_vat.errors import ConfigurationError, InvalidInputError, SealError, UnavailableError
from langgraph_vat.keyring import KeyWrapper
from langgraph_vat.serde import codec_for, sealing

_FORMAT = 1
_BEGIN = b'{"archive":'

_Value = tuple[str, str, str, str]
"""Thread, namespace, channel, version."""
_Put = tuple[str, str, str]
"""Thread, namespace, checkpoint id."""


class _Place(NamedTuple):
    """Where a line is, and what it says besides its data."""

    offset: int
    size: int
    line: dict[str, Any]


class Archive(BaseCheckpointSaver[str]):
    """
    A saver over one file, which grows at its end. One process at a time may write it.

    Args:
        path: The file; made if it is not there, readable by its owner alone.
        keyring: Seals every value and checkpoint under a key of the file's own,
            which the keyring wraps. Ids and channel names stay readable.
        serde: Serializer of values.
        read_only: Leave the file as it is; several may read at once.

    Raises:
        ConfigurationError: The file cannot be used, or is something else.
        SealError: It is sealed and there is no keyring, or the reverse.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        keyring: KeyWrapper | None = None,
        serde: SerializerProtocol | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(serde=serde or StrictSerializer())
        self._lock = threading.RLock()
        # Of values by name, and by where they are in the file.
        self._values: dict[_Value, _Place] = {}
        self._newest: dict[tuple[str, str, str], _Place] = {}
        self._lines: dict[int, _Place] = {}
        self._puts: dict[_Put, _Place] = {}
        self._writes: dict[_Put, dict[tuple[str, int], _Place]] = {}
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
        self._file = -1
        try:
            self._file = os.open(path, flags | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if self._file >= 0:
                os.close(self._file)
            msg = f"the archive {path} cannot be used ({error.strerror}), or another process does"
            raise ConfigurationError(msg) from error
        try:
            self._end = self._read(str(path), sealing(keyring, serde), read_only=read_only)
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Have the file on the disk, and close it. May be called again."""
        with self._lock:
            if self._file >= 0:
                os.fsync(self._file)
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- the file --------------------------------------------------------

    def _read(self, path: str, keyring: KeyWrapper | None, *, read_only: bool) -> int:
        """Index the lines that are there; return where the next begins."""
        end, torn = 0, b""
        with os.fdopen(os.dup(self._file), "rb") as lines:
            for raw in lines:
                if not raw.endswith(b"\n"):
                    torn = raw
                    break
                line = _parsed(raw, path)
                if not end:
                    self._open(line, path, keyring)
                else:
                    self._index(_Place(end, len(raw), line))
                end += len(raw)
        if not end and (read_only or not _BEGIN.startswith(torn[: len(_BEGIN)])):
            raise ConfigurationError(f"{path} is no archive, and was left as it is")
        if not read_only:
            os.ftruncate(self._file, end)
        if not end:
            header = self._header(keyring)
            self._open(header, path, keyring)
            self._end = 0
            end = self._write(_text(header))
        return end

    def _write(self, raw: bytes) -> int:
        """Write at the end, all or nothing; return how many bytes that was."""
        done = 0
        try:
            while done < len(raw):
                done += os.pwrite(self._file, raw[done:], self._end + done)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            msg = f"the archive cannot be written ({error.strerror}); this step is not in it"
            raise UnavailableError(msg) from error
        return done

    @staticmethod
    def _header(keyring: KeyWrapper | None) -> dict[str, Any]:
        id_, key = uuid.uuid4().hex, None
        if keyring is not None:
            wrapped = DataKey.generate(keyring.cipher).wrap(keyring, associated_data=_bound(id_))
            key = base64.b64encode(wrapped).decode()
        return {"archive": _FORMAT, "id": id_, "data_key": key}

    def _open(self, header: dict[str, Any], path: str, keyring: KeyWrapper | None) -> None:
        if header.get("archive") != _FORMAT or not {"id", "data_key"} <= header.keys():
            raise ConfigurationError(
                f"{path} is no archive of version {_FORMAT}, and was left as it is"
            )
        wrapped, key = header["data_key"], None
        if (wrapped is None) != (keyring is None):
            is_or_not = "not sealed and a" if wrapped is None else "sealed and no"
            raise SealError(f"the archive {path} is {is_or_not} keyring was given; it was not used")
        if keyring is not None:
            raw = base64.b64decode(wrapped)
            key = DataKey.unwrap(raw, keyring, associated_data=_bound(header["id"]))
        self._codec = codec_for(self.serde, key, "archive", header["id"])
        # What is serialized is packed before it is sealed.
        self._serializer = codec_for(self.serde, None)

    def _index(self, place: _Place) -> None:
        try:
            self._index_line(place, place.line)
        except (KeyError, TypeError, ValueError):
            msg = f"the archive has a line at byte {place.offset} that says nothing known"
            raise ConfigurationError(f"{msg}; it was left as it is") from None

    def _index_line(self, place: _Place, line: dict[str, Any]) -> None:
        if "value" in line:
            thread_id, ns, channel, version = line["value"]
            self._lines[place.offset] = place
            self._values[thread_id, ns, channel, version] = place
            self._newest[thread_id, ns, channel] = place
        elif "put" in line:
            thread_id, ns, checkpoint_id = line["put"]
            self._puts[thread_id, ns, checkpoint_id] = place
        else:
            thread_id, ns, checkpoint_id, task_id, idx = line["write"]
            self._writes.setdefault((thread_id, ns, checkpoint_id), {})[task_id, idx] = place

    def _append(self, line: dict[str, Any], type_: str, data: bytes, *place: str) -> None:
        sealed_type, sealed = self._codec.seal(type_, data, *place)
        line = {**line, "type": sealed_type, "data": base64.b64encode(sealed).decode()}
        self._refuse_closed()
        size = self._write(_text(line))
        del line["data"]
        self._index(_Place(self._end, size, line))
        self._end += size

    def _refuse_closed(self) -> None:
        if self._file < 0:
            raise ConfigurationError("this archive was closed; open it anew")

    def _data(self, place: _Place, *bound: str) -> tuple[str, bytes]:
        self._refuse_closed()
        line = json.loads(os.pread(self._file, place.size, place.offset))
        return self._codec.open(line["type"], base64.b64decode(line["data"]), *bound)

    def _value(self, place: _Place) -> tuple[str, bytes]:
        type_, data = self._data(place, "value", *place.line["value"])
        base = self._base(place.line["bases"]) if is_patch(type_) else None
        return unpack(type_, data, base)

    def _base(self, bases: Sequence[int]) -> bytes | None:
        place = self._lines.get(bases[-1]) if bases else None
        return self._value(place)[1] if place is not None else None

    # --- the saver -------------------------------------------------------

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint."""
        thread_id, ns, parent = _where(config)
        values = checkpoint["channel_values"]
        with self._lock:
            for channel, version in {**checkpoint["channel_versions"], **new_versions}.items():
                key = thread_id, ns, channel, str(version)
                if channel in values and (channel in new_versions or key not in self._values):
                    self._put_value(key, values[channel])
            rest = {key: value for key, value in checkpoint.items() if key != "channel_values"}
            data = self._serializer.dump([rest, get_checkpoint_metadata(config, metadata)])
            at = thread_id, ns, checkpoint["id"]
            line = {"put": at, "parent": parent or None, "values": [*values]}
            self._append(line, *pack(*data), "put", *at)
        return address(*at)

    def _put_value(self, key: _Value, value: Any) -> None:
        step, bases = 0, list[int]()
        if newest := self._newest.get(key[:3]):
            line = newest.line
            step, bases = line_position(line["step"], [*line["bases"], newest.offset])
        type_, data = pack(*self._serializer.dump(value), self._base(bases))
        if not is_patch(type_):
            step, bases = 0, []
        self._append({"value": key, "step": step, "bases": bases}, type_, data, "value", *key)

    def get_next_version(self, current: str | int | None, channel: None = None) -> str:  # noqa: ARG002 - LangGraph still passes it
        """Return a version greater than `current`, unlike that of any fork."""
        return next_version(current)

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Store a task's writes: of one index the first, of special channels the last."""
        at = _where(config)
        with self._lock:
            for position, (channel, value) in enumerate(writes):
                idx = WRITES_IDX_MAP.get(channel, position)
                if idx >= 0 and (task_id, idx) in self._writes.get(at, {}):
                    continue
                line = {"write": [*at, task_id, idx], "path": task_path, "channel": channel}
                data = pack(*self._serializer.dump(value))
                self._append(line, *data, "write", *at, task_id, str(idx), channel)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Return the checkpoint that `config` names, or the newest of its namespace."""
        thread_id, ns, checkpoint_id = _where(config)
        with self._lock:
            if not checkpoint_id:
                ids = (i for t, n, i in self._puts if (t, n) == (thread_id, ns))
                checkpoint_id = max(ids, default="")
            key = thread_id, ns, checkpoint_id
            return self._tuple(key) if key in self._puts else None

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Return checkpoints, newest first."""
        wanted = (config or {}).get("configurable", {})
        end = before["configurable"].get("checkpoint_id") if before else None
        with self._lock:
            keys = sorted(self._puts, key=lambda key: key[::-1], reverse=True)
        for key in keys:
            named = zip(("thread_id", "checkpoint_ns", "checkpoint_id"), key, strict=True)
            if any(wanted.get(name) not in (None, part) for name, part in named):
                continue
            if end is not None and key[2] >= end:
                continue
            if limit is not None and limit <= 0:
                return
            with self._lock:
                found = self._tuple(key)
            if all(found.metadata.get(name) == value for name, value in (filter or {}).items()):
                limit = None if limit is None else limit - 1
                yield found

    def _tuple(self, key: _Put) -> CheckpointTuple:
        place = self._puts[key]
        rest, metadata = self._load(self._data(place, "put", *key))
        versions = rest["channel_versions"]
        values = {
            channel: self._serializer.parse(
                *self._value(self._values[*key[:2], channel, str(versions[channel])])
            )
            for channel in place.line["values"]
            if channel in versions
        }
        writes = self._writes.get(key, {})
        paths = {at: one.line["path"] for at, one in writes.items()}
        parent = place.line["parent"]
        return CheckpointTuple(
            config=address(*key),
            checkpoint=cast("Checkpoint", {**rest, "channel_values": values}),
            metadata=metadata,
            parent_config=address(*key[:2], parent) if parent else None,
            pending_writes=[
                (at[0], writes[at].line["channel"], self._load_write(key, at))
                for at in sorted(writes, key=lambda at: writes_sort_key(paths[at], *at))
            ],
        )

    def _load_write(self, key: _Put, at: tuple[str, int]) -> Any:
        place = self._writes[key][at]
        bound = "write", *key, at[0], str(at[1]), place.line["channel"]
        return self._load(self._data(place, *bound))

    def _load(self, typed: tuple[str, bytes]) -> Any:
        return self._serializer.parse(*unpack(*typed))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Like `get_tuple`."""
        return self.get_tuple(config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """Like `list`."""
        for found in self.list(config, filter=filter, before=before, limit=limit):
            yield found

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Like `put`."""
        return self.put(config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Like `put_writes`."""
        self.put_writes(config, writes, task_id, task_path)


def _where(config: RunnableConfig) -> _Put:
    found: Mapping[str, Any] = config.get("configurable", {})
    if not isinstance(found.get("thread_id"), str):
        raise InvalidInputError("thread_id is missing from config['configurable'], or no string")
    return found["thread_id"], found.get("checkpoint_ns") or "", found.get("checkpoint_id") or ""


def _bound(id_: str) -> bytes:
    return associated_data("data key", "archive", id_)


def _text(line: dict[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _parsed(raw: bytes, path: str) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except ValueError:
        line = None
    if not isinstance(line, dict):
        raise ConfigurationError(f"{path} has a line that is no JSON object; it was left as it is")
    line.pop("data", None)
    return line
