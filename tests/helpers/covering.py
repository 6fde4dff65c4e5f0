"""Selects the few of many cases that CI runs."""

import pytest


def first(number, cases):
    """Returns the cases; all but the first few run with --full only."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if i < number else pytest.mark.full for i in range(len(cases))]
    return [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)]


def cover(cases, values):
    """Chooses cases greedily until all their values occur; of equal cases the first is chosen.

    `values` returns the set of a case's values: each occurs in a chosen case.
    """
    pairs = [(case, values(case)) for case in cases]
    left, chosen = set().union(*(of_case for _, of_case in pairs)), []
    while left:
        case, of_case = max(pairs, key=lambda pair: len(pair[1] & left))
        chosen.append(case)
        left -= of_case
    return chosen
