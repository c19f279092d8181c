"""An application's module: saver and graph are made when it is imported, outside any loop."""

import os
from typing import Any

from langchain_core.messages import AIMessage
from langgraph.graph import START, MessagesState, StateGraph

from langgraph_vat import HybridSaver

saver = HybridSaver.from_conn_string(
    os.environ["LANGGRAPH_VAT_POSTGRES"], redis=os.environ["LANGGRAPH_VAT_REDIS"], flush_every=4
)


def _reply(state: MessagesState) -> Any:
    return {"messages": [AIMessage(f"{len(state['messages'])}")]}


graph = (
    StateGraph(MessagesState)
    .add_node("reply", _reply)
    .add_edge(START, "reply")
    .compile(checkpointer=saver)
)
