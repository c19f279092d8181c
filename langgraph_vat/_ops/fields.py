"""Which texts of a value it is found by: those at some paths, as LangGraph's stores read them."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from langgraph.store.base.embed import get_text_at_path, tokenize_path

from langgraph_vat.errors import ConfigurationError

# Of what is no JSON, what has digits without end, and what has no end at all.
_NO_JSON = TypeError, ValueError, RecursionError


class Fields:
    """
    The paths of a store's texts; without any the whole value is one text.

    Raises:
        ConfigurationError: They are no paths.
    """

    def __init__(self, paths: Any) -> None:
        if not is_paths(paths or []):
            raise ConfigurationError("fields must be a list of paths, such as ['text']")
        self._fields = [_field(path) for path in paths or ["$"]]

    def texts(self, value: Mapping[str, Any], paths: Sequence[str] | None) -> dict[str, str]:
        """Return the texts of a value by the name of their field; at other paths, if given."""
        fields = self._fields if paths is None else [_field(path) for path in paths]
        found: dict[str, str] = {}
        for path, tokens in fields:
            texts = _texts(value, tokens)
            names = [path] if len(texts) == 1 else [f"{path}.{i}" for i in range(len(texts))]
            found.update(zip(names, texts, strict=True))
        return found


def is_paths(paths: Any) -> bool:
    """Whether something is a list of paths. A string is not: its letters would be the paths."""
    return isinstance(paths, list | tuple) and all(isinstance(path, str) for path in paths)


def _field(path: str) -> tuple[str, Any]:
    return path, "$" if path == "$" else tokenize_path(path)


def _texts(value: Any, tokens: Any) -> list[str]:
    with suppress(*_NO_JSON):
        return get_text_at_path(value, cast("Any", tokens))
    # A part of it is nothing that JSON can hold, and no text either: without it.
    with suppress(*_NO_JSON):
        text = json.dumps(value, default=lambda _: None, skipkeys=True)
        return get_text_at_path(json.loads(text), cast("Any", tokens))
    return []
