"""
A chat model that needs no network: it really reads the code and always answers alike.

It stands where a hosted model would. Its findings are measured on the syntax
tree; how it words them follows the system message, as a language model would.
"""

import ast
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult

LONG_FUNCTION_LINES = 20
MANY_PARAMETERS = 5
NESTING = 4
STALL_S = 600.0

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Finding(NamedTuple):
    """One remark about one line."""

    weight: int
    line: int
    what: str
    why: str


class ScriptedReviewer(BaseChatModel):
    """
    Answers `path`, newline, source with a review of that source.

    Attributes:
        stall_on: Path at which it stops answering, as a hosted model might.
    """

    stall_on: str = ""

    @property
    def _llm_type(self) -> str:
        return "scripted-reviewer"

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        path, _newline, source = messages[-1].text.partition("\n")
        if path == self.stall_on:
            time.sleep(STALL_S)
        brief = "one line" in messages[0].text
        answer = AIMessage(_worded(path, findings(source), brief=brief))
        return ChatResult(generations=[ChatGeneration(message=answer)])


def findings(source: str) -> list[Finding]:
    """Return what a careful reader would remark on, worst first."""
    tree = ast.parse(source)
    found = [*_in_lines(source), *_in_tree(tree)]
    return sorted(found, key=lambda finding: (-finding.weight, finding.line))


def _in_lines(source: str) -> Iterator[Finding]:
    for number, line in enumerate(source.splitlines(), start=1):
        if line.lstrip().startswith(("# TODO", "# FIXME")):
            yield Finding(2, number, "unfinished work", "a note in the code is seen by nobody else")


def _in_tree(tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and _catches_all(node):
            yield Finding(3, node.lineno, "catches everything", "typos pass too")
        if isinstance(node, Function):
            yield from _in_function(node)
        if isinstance(node, Function | ast.ClassDef) and _is_public_and_bare(node):
            yield Finding(1, node.lineno, f"{node.name} has no docstring", "callers must guess")


def _in_function(node: Function) -> Iterator[Finding]:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if lines > LONG_FUNCTION_LINES:
        yield Finding(2, node.lineno, f"{node.name} is {lines} lines long", "it does too much")
    parameters = len(node.args.args) + len(node.args.kwonlyargs)
    if parameters > MANY_PARAMETERS:
        what = f"{node.name} takes {parameters} parameters"
        yield Finding(1, node.lineno, what, "some of them belong together")
    if _depth(node) >= NESTING:
        yield Finding(2, node.lineno, f"{node.name} nests {_depth(node)} deep", "few can follow")


def _catches_all(node: ast.ExceptHandler) -> bool:
    name = node.type.id if isinstance(node.type, ast.Name) else None
    return node.type is None or name in {"Exception", "BaseException"}


def _is_public_and_bare(node: Function | ast.ClassDef) -> bool:
    return not node.name.startswith("_") and ast.get_docstring(node) is None


def _depth(node: ast.AST) -> int:
    blocks = ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try
    below = max((_depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return below + isinstance(node, blocks)


def _worded(path: str, found: list[Finding], *, brief: bool) -> str:
    if not found:
        return f"{path}: nothing to remark."
    if brief:
        return "\n".join(f"{path}:{line} {what}" for _, line, what, _ in found)
    opening = f"I have read {path} with care and would like to raise {len(found)} point(s)."
    points = (
        f"On line {line}, {what}. This matters, because {why}. Please consider changing it."
        for _, line, what, why in found
    )
    return "\n".join([opening, *points])
