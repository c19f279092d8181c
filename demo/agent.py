"""
The agent: an ordinary LangGraph graph that knows nothing of where its state lives.

    plan -> review -> review -> ... -> ask (a human) -> publish

One file is reviewed per super-step, so that a crash costs one review at most.
What the human asks for in passing is remembered for every later conversation.
"""

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import interrupt

WISH_QUESTION = "Should feedback for this person be brief or detailed?"
NEAR_ENOUGH = 0.2
SYSTEM_PROMPT = "You review Python code."


@dataclass(frozen=True)
class Desk:
    """Whom the agent works for, and on which checkout."""

    user: str
    root: Path


class Review(MessagesState):
    """The state of one conversation about a piece of code."""

    path: str
    limit: int
    wish: str
    todo: list[str]
    remarks: Annotated[list[str], operator.add]


Graph = StateGraph[Review, Desk, Review, Review]


def build(model: BaseChatModel) -> Graph:
    """Return the graph, to be compiled with a checkpointer and a store."""

    def review(state: Review, runtime: Runtime[Desk]) -> dict[str, Any]:
        path, *rest = state["todo"]
        source = (runtime.context.root / path).read_text()
        prompt = [
            SystemMessage(f"{SYSTEM_PROMPT} {state['wish']}"),
            HumanMessage(f"{path}\n{source}"),
        ]
        return {"todo": rest, "remarks": [model.invoke(prompt).text]}

    graph = StateGraph(Review, context_schema=Desk)
    for node in (plan, review, ask, publish):
        graph.add_node(node)
    graph.add_edge(START, "plan")
    graph.add_edge("plan", "review")
    graph.add_conditional_edges("review", next_step, ["review", "ask"])
    graph.add_edge("ask", "publish")
    graph.add_edge("publish", END)
    return graph


def plan(state: Review, runtime: Runtime[Desk]) -> dict[str, Any]:
    """Choose the files to read and recall how this person likes to read about them."""
    todo = choose(runtime.context.root, state["path"], state["limit"])
    return {"todo": todo, "wish": recall(runtime)}


def choose(root: Path, path: str, limit: int) -> list[str]:
    """Return the largest Python files below a path, largest first."""
    target = root / path
    files = [target] if target.is_file() else target.rglob("*.py")
    largest = sorted(files, key=lambda file: (-file.stat().st_size, file))
    return [str(file.relative_to(root)) for file in largest[:limit]]


def recall(runtime: Runtime[Desk]) -> str:
    """Return what this person once said that is nearest in meaning to our question."""
    assert runtime.store is not None
    found = runtime.store.search(memories(runtime.context.user), query=WISH_QUESTION, limit=1)
    near = [item.value["text"] for item in found if (item.score or 0.0) > NEAR_ENOUGH]
    return "".join(near)


def next_step(state: Review) -> str:
    """Go on until every planned file is reviewed."""
    return "review" if state["todo"] else "ask"


def ask(state: Review) -> dict[str, Any]:
    """Wait for a human, for minutes or for months."""
    answer = interrupt(f"{len(state['remarks'])} file(s) reviewed. Publish?")
    return {"messages": [HumanMessage(answer)]}


def publish(state: Review, runtime: Runtime[Desk]) -> dict[str, Any]:
    """Answer with the review and remember what the human asked for."""
    said = state["messages"][-1].text
    if "from now on" in said.lower():
        assert runtime.store is not None
        wish = said.split(":", maxsplit=1)[-1].strip()
        runtime.store.put(memories(runtime.context.user), "form-of-feedback", {"text": wish})
    return {"messages": [AIMessage("\n".join(state["remarks"]))]}


def memories(user: str) -> tuple[str, ...]:
    """Return the namespace of what is known about a person."""
    return ("people", user)


def on_thread(name: str) -> RunnableConfig:
    """Return the configuration that selects a conversation."""
    return {"configurable": {"thread_id": name}}
