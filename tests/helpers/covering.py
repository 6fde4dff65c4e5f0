"""Few of many cases: those that CI runs."""

import pytest


def first(number, cases):
    """The cases, of which all but the first few run with --full only."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if i < number else pytest.mark.full for i in range(len(cases))]
    return [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)]


def cover(cases, values):
    """Those of the cases that it takes for all their values to occur, greedily: first come, first.

    `values` returns the set of a case's values: each occurs in a case that is chosen.
    """
    pairs = [(case, values(case)) for case in cases]
    left, chosen = set().union(*(of_case for _, of_case in pairs)), []
    while left:
        case, of_case = max(pairs, key=lambda pair: len(pair[1] & left))
        chosen.append(case)
        left -= of_case
    return chosen
