"""
Every order of steps and faults, as far as the budget goes; and every rule is needed.

MODEL_STATES: How many states each of the open-ended walks may look at.
"""

import os

import pytest

from tests.model.protocol import RULES, Model, explore

STATES = int(os.environ.get("MODEL_STATES", "60000"))


def test_without_faults_every_order_keeps_the_contract():
    states, trace = explore(Model(puts=1, faults=0))
    assert not trace
    assert states > 10_000  # all there are


@pytest.mark.parametrize(("puts", "faults"), [(1, 1), (1, 2), (2, 2)])
def test_with_faults_as_many_orders_as_the_budget_allows(puts, faults):
    states, trace = explore(Model(puts=puts, faults=faults), STATES)
    assert not trace
    assert states >= STATES


@pytest.mark.parametrize("rule", RULES)
def test_without_a_rule_there_is_a_violation(rule):
    _, trace = explore(Model(rule, puts=1, faults=1), 10**6)
    assert trace, f"nothing happens without: {RULES[rule]}"
