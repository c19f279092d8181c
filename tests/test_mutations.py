"""The mutation table takes minutes to run; that each of its lines still applies, none."""

from tests.mutations import MUTATIONS, ROOT


def test_there_is_what_each_mutation_changes():
    gone = [
        one.guarantee
        for one in MUTATIONS
        if (ROOT / "langgraph_vat" / one.file).read_text().count(one.old) != 1
    ]
    assert gone == []
