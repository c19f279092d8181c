"""
What is asked for is found: on a written set of memories and questions, by a real sentence model.

    python -m pytest tests/store/test_recall.py -s

prints how many of the questions have what answers them among the first five items, by how
it is ordered. `make test` installs the model.
"""

import json
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from langgraph.store.base import PutOp

from demo.minilm import MiniLM
from langgraph_vat import SemanticStore

RANKINGS = ("vector", "lexical", "hybrid")
SET = json.loads((Path(__file__).parent / "memories.json").read_text())


@pytest.fixture
def store(postgres_url):
    vector = cache(MiniLM().embed_query)
    index = {"dims": MiniLM.dims, "embed": lambda texts: [*map(vector, texts)], "fields": ["text"]}
    memories = [(tuple(m["namespace"]), m["key"], {"text": m["text"]}) for m in SET["memories"]]
    for _, _, value in memories:
        vector(value["text"])  # a put would not wait for so many
    with SemanticStore.from_conn_string(postgres_url, index=index, text_search="english") as store:
        store.batch([PutOp(*memory) for memory in memories])
        assert store.pending().items == 0
        yield store


def _is_hit(store, question, ranking):
    found = store.search(
        tuple(question["namespace"]), query=question["text"], ranking=ranking, limit=5
    )
    return any(item.key in question["relevant"] for item in found if item.score is not None)


@pytest.mark.timeout(600)
def test_both_together_find_as_much_as_either(store):
    hits, asked = defaultdict(int), defaultdict(int)
    for question in SET["questions"]:
        for kind in (question["kind"], "all"):
            asked[kind] += 1
            for ranking in RANKINGS:
                hits[kind, ranking] += _is_hit(store, question, ranking)
    lines = [f"\n{len(SET['memories'])} memories; hit@5 of the questions by kind:"]
    for kind, count in asked.items():
        found = ", ".join(f"{ranking} {hits[kind, ranking] / count:.3f}" for ranking in RANKINGS)
        lines.append(f"{kind} ({count}): {found}")
    sys.stdout.write("\n".join([*lines, ""]))
    assert hits["all", "hybrid"] >= max(hits["all", "vector"], hits["all", "lexical"])
