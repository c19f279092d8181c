"""
Which objects are made again from what is stored, and which are not written at all.

The bytes are those of LangGraph's serializer. It imports and calls whatever stored
data name, or hands their raw parts on where it does not; here either is an error. So
this reads the extensions of its msgpack itself, at every depth. Their meaning is in
``langgraph.checkpoint.serde.jsonplus``.
"""

import datetime as dt
import importlib
import json
import sys
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import PosixPath
from typing import Any
from uuid import UUID

import ormsgpack
from langgraph.checkpoint.serde import jsonplus
from langgraph.checkpoint.serde import types as langgraph_types
from langgraph.checkpoint.serde._msgpack import SAFE_MSGPACK_METHODS, SAFE_MSGPACK_TYPES
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from pydantic import BaseModel

from langgraph_vat.errors import (
    ConfigurationError,
    InvalidInputError,
    TypeNotAllowedError,
    UnreadableError,
    VatError,
)

_TAGS = frozenset(("null", "bytes", "bytearray", "json", "msgpack"))
# Types that are known to come back. Some programs make a class for each value.
_MOST_PROVEN = 1024
_OPTIONS_READ = ormsgpack.OPT_NON_STR_KEYS
_OPTIONS = (
    ormsgpack.OPT_NON_STR_KEYS
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_UUID
    | ormsgpack.OPT_REPLACE_SURROGATES
)
# In these stands nothing else that has a type.
_LEAVES = frozenset((dt.datetime, dt.date, dt.time, dt.timedelta, UUID, Decimal, PosixPath))
# Later versions of LangGraph have it: a value around another one, with no name.
_SNAPSHOT_CODE = getattr(jsonplus, "EXT_DELTA_SNAPSHOT", None)
_Snapshot: Any = getattr(langgraph_types, "_DeltaSnapshot", None)
# Messages and documents as LangChain's own JSON names them, which is not by their modules.
_SAFE_IN_JSON = frozenset(
    name for module, name in SAFE_MSGPACK_TYPES if module.startswith("langchain_core.")
)

_Name = tuple[str, ...]


class StrictSerializer(JsonPlusSerializer):
    """
    LangGraph's serializer, which makes no object again but of types that are allowed.

    Those are the ones that LangGraph takes for safe (messages, dates, sets, `Send`, …),
    those of `allow`, and, with ``LANGGRAPH_STRICT_MSGPACK=true``, those that a compiled
    graph's schemas name. A value that holds another one, however deep, is neither written
    nor read. Nor is one of a class that does not come back: one inside of another class,
    or a dataclass that its own fields do not make. Nothing is ever pickled.

    Args:
        allow: Classes; or pairs of module and name.

    Raises:
        ConfigurationError: One is neither.
    """

    def __init__(self, allow: Iterable[type | tuple[str, str]] = ()) -> None:
        allowed = list(allow)
        for one in allowed:
            is_pair = isinstance(one, tuple) and [type(part) for part in one] == [str, str]
            if not (isinstance(one, type) or is_pair):
                msg = f"allow must hold classes, or pairs of module and name; not {one!r:.100}"
                raise ConfigurationError(msg)
        super().__init__(allowed_msgpack_modules=allowed or None)
        self._proven: frozenset[type | _Name] = frozenset()

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        """
        Serialize.

        Raises:
            TypeNotAllowedError: It holds a type that is not allowed.
            InvalidInputError: It holds a type that cannot be made again.
        """
        if obj is None or isinstance(obj, bytes | bytearray):
            return super().dumps_typed(obj)
        writing = _Writing(self._proven)
        data = ormsgpack.packb(obj, default=writing.encode, option=_OPTIONS)
        if writing.new:
            self._prove(writing.new)
        return "msgpack", data

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """
        Deserialize what `dumps_typed` returned.

        Raises:
            TypeNotAllowedError: It holds a type that is not allowed.
            UnreadableError: It is damaged, or of a class that is not there any more.
        """
        type_, stored = data
        if type_ not in _TAGS:
            raise TypeNotAllowedError(
                f"a stored value has the type tag {type_!r:.40}: it was pickled, encrypted or"
                " written by another serializer, and was not loaded. Pass serde= the one that wrote"
                " it, if you trust whoever writes to the database."
            )
        if type_ == "msgpack":
            return _Reading(self._allows, self._unpack_ext_hook, _Unread).value(stored)
        if type_ != "json":
            return super().loads_typed(data)
        try:
            return json.loads(stored, object_hook=self._revive_json)
        except VatError:
            raise
        except (ValueError, RecursionError) as error:
            raise _Unread.damaged(error) from None

    def _allows(self, name: _Name) -> bool:
        allowed = self._allowed_msgpack_modules
        return name in SAFE_MSGPACK_TYPES or (isinstance(allowed, set) and name in allowed)

    def _prove(self, new: "dict[type | _Name, tuple[int, bytes]]") -> None:
        """Make objects of types that were not written before again, as a reader would."""
        for kind, extension in new.items():
            reading = _Reading(self._allows, self._unpack_ext_hook, _Unwritten)
            made = reading.object(*extension)
            if isinstance(kind, type) and type(made) is not kind:
                raise _Unwritten.unmade(kind.__module__, kind.__qualname__, "it is another type")
        kept = self._proven if len(self._proven) < _MOST_PROVEN else frozenset()
        self._proven = kept | new.keys()

    def _revive_json(self, value: dict[str, Any]) -> Any:
        """Make a message of an older LangGraph's JSON again; refuse all else that has a name."""
        if value.get("lc") not in (1, 2) or "type" not in value or "id" not in value:
            return value
        name = [str(part) for part in value["id"]] if isinstance(value["id"], list) else []
        module, last = ".".join(name[:-1]), name[-1] if name else ""
        is_message = module.split(".")[0] in ("langchain", "langchain_core")
        is_allowed = (module, last) in SAFE_MSGPACK_TYPES or (is_message and last in _SAFE_IN_JSON)
        if value["type"] != "constructor" or not is_allowed:
            raise _Unread.not_allowed(module, last)
        try:
            made = self._reviver(value)
        except Exception as error:  # noqa: BLE001  # whatever its constructor raises
            raise _Unread.unmade(module, last, type(error).__name__) from None
        if made is None or made is value:
            raise _Unread.unmade(module, last, "it is not found")
        return made


class _Writing:
    """
    One value being written: what it holds beside plain data is encoded here.

    `new` are the types in it, at every depth, of which none was proven to come back; each
    with the extension in which one stands.
    """

    def __init__(self, proven: frozenset[type | _Name]) -> None:
        self.new: dict[type | _Name, tuple[int, bytes]] = {}
        self._proven = proven

    def encode(self, obj: Any) -> Any:
        """Return what LangGraph makes of an object that is not plain data."""
        kind = type(obj)
        if isinstance(obj, BaseModel):
            # Most are messages. Its parts come here again: nothing need be read to know them.
            parts = (kind.__module__, kind.__name__, obj.model_dump(), "model_validate_json")
            data = ormsgpack.packb(parts, default=self.encode, option=_OPTIONS)
            self._note(kind, jsonplus.EXT_PYDANTIC_V2, data)
            return ormsgpack.Ext(jsonplus.EXT_PYDANTIC_V2, data)
        made = jsonplus._msgpack_default(obj)  # noqa: SLF001
        if isinstance(made, ormsgpack.Ext) and not (kind in _LEAVES and kind in self._proven):
            found: list[tuple[int, bytes]] = []
            ormsgpack.unpackb(ormsgpack.packb(made), ext_hook=lambda *ext: found.append(ext))
            self._note(kind, *found[0])
            self._walk(*found[0])
        return made

    def _note(self, kind: type | _Name, code: int, data: bytes) -> None:
        if kind not in self._proven:
            self.new.setdefault(kind, (code, data))

    def _walk(self, code: int, data: bytes) -> None:
        if code in _CALLS:
            module, name, *_ = ormsgpack.unpackb(data, ext_hook=self._walk, option=_OPTIONS_READ)
            self._note((module, name), code, data)
        elif code == _SNAPSHOT_CODE:
            ormsgpack.unpackb(data, ext_hook=self._walk, option=_OPTIONS_READ)


class _Reading:
    """
    One value being made again from msgpack.

    ormsgpack forgets what a hook raises: it is kept here.
    """

    def __init__(
        self,
        allows: Callable[[_Name], bool],
        otherwise: Callable[[int, bytes], Any],
        errors: "type[_Unread]",
    ) -> None:
        self._allows = allows
        self._otherwise = otherwise
        self._errors = errors
        self._error: VatError | None = None

    def value(self, data: bytes) -> Any:
        """Return a whole value."""
        return self._kept(ormsgpack.unpackb, data, ext_hook=self._hook, option=_OPTIONS_READ)

    def object(self, code: int, data: bytes) -> Any:
        """Return one object."""
        return self._kept(self._hook, code, data)

    def _kept(self, read: Callable[..., Any], *what: Any, **how: Any) -> Any:
        try:
            return read(*what, **how)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._error or self._errors.damaged(error) from None

    def _hook(self, code: int, data: bytes) -> Any:
        try:
            return self._made(code, data)
        except VatError as error:
            self._error = self._error or error
            raise

    def _made(self, code: int, data: bytes) -> Any:
        if code == _SNAPSHOT_CODE:
            return _Snapshot(self._parts(data))
        if code not in _CALLS:
            made = self._otherwise(code, data)
            if made is None:
                raise self._errors.damaged(ValueError())
            return made
        module, name, content, *method = self._parts(data)
        if code == jsonplus.EXT_METHOD_SINGLE_ARG:
            is_allowed = (module, name, *method) in SAFE_MSGPACK_METHODS
        else:
            is_allowed = self._allows((module, name))
        if not is_allowed:
            raise self._errors.not_allowed(module, name)
        try:
            made = getattr(sys.modules.get(module) or importlib.import_module(module), name)
            if code == jsonplus.EXT_METHOD_SINGLE_ARG:
                made = getattr(made, *method)
            return _CALLS[code](made, content)
        except Exception as error:  # noqa: BLE001  # whatever a class raises
            raise self._errors.unmade(module, name, type(error).__name__) from None

    def _parts(self, data: bytes) -> Any:
        return ormsgpack.unpackb(data, ext_hook=self._hook, option=_OPTIONS_READ)


def _from_one(kind: Any, content: Any) -> Any:
    return kind(content)


def _from_parts(kind: Any, content: Any) -> Any:
    if kind.__name__ == "Send":  # its third argument has to be named
        return kind(*content[:2], **dict(zip(("timeout",), content[2:], strict=False)))
    return kind(*content)


def _from_fields(kind: Any, content: Any) -> Any:
    return kind(**content)


def _validated(kind: Any, content: Any) -> Any:
    try:
        return kind(**content) if isinstance(content, dict) else kind(content)
    except Exception:  # noqa: BLE001
        # Its validation refuses now what was a value all the same when it was stored.
        construct = getattr(kind, "model_construct", None) or kind.construct
        return construct(**content)


# What is made in which way; the codes are those of LangGraph's serializer.
_CALLS: dict[int, Callable[[Any, Any], Any]] = {
    jsonplus.EXT_CONSTRUCTOR_SINGLE_ARG: _from_one,
    jsonplus.EXT_CONSTRUCTOR_POS_ARGS: _from_parts,
    jsonplus.EXT_CONSTRUCTOR_KW_ARGS: _from_fields,
    jsonplus.EXT_METHOD_SINGLE_ARG: _from_one,
    jsonplus.EXT_PYDANTIC_V1: _validated,
    jsonplus.EXT_PYDANTIC_V2: _validated,
}


class _Unread:
    """The errors of a value that is read."""

    @staticmethod
    def not_allowed(module: object, name: object) -> VatError:
        return _not_allowed(module, name, "the stored value was not read; it is as it was")

    @staticmethod
    def unmade(module: object, name: object, why: str) -> VatError:
        return UnreadableError(
            f"{_told(module, name)} cannot be made again of its parts ({why}): it was renamed,"
            " moved or changed since, or takes other arguments than its fields. The stored value"
            " is as it was. Let it be found there again and take what was stored, or pass"
            " serde=JsonPlusSerializer(), which hands on the parts."
        )

    @staticmethod
    def damaged(error: Exception) -> VatError:
        return UnreadableError(
            f"a stored value cannot be parsed ({type(error).__name__}): it is damaged, or is not"
            " what its type tag says. It was not changed. Restore it from a backup."
        )


class _Unwritten(_Unread):
    """The errors of one that is written, and could not be read."""

    @staticmethod
    def not_allowed(module: object, name: object) -> VatError:
        return _not_allowed(module, name, "the value that holds it was not written")

    @staticmethod
    def unmade(module: object, name: object, why: str) -> VatError:
        return InvalidInputError(
            f"{_told(module, name)} could not be made again of its parts ({why}), so it was not"
            " written. It must stand in its module, outside of other classes, and take its own"
            " fields. Keep it out of the state otherwise, or pass a serde= that can."
        )

    @staticmethod
    def damaged(error: Exception) -> VatError:
        return InvalidInputError(
            f"a value could not be read again ({type(error).__name__}), so it was not written."
            " Keep it out of the state, or pass a serde= that can."
        )


def _told(module: object, name: object) -> str:
    return f"type {name!r:.100} of module {module!r:.100}"


def _not_allowed(module: object, name: object, outcome: str) -> TypeNotAllowedError:
    return TypeNotAllowedError(
        f"{_told(module, name)} is not among those that may be made from stored values, so"
        f" {outcome}. If it is yours, pass"
        f" serde=StrictSerializer(allow=[({module!r:.100}, {name!r:.100})]), or the class itself."
    )
