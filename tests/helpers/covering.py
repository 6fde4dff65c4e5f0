"""Few of many cases, in which still everything occurs that occurs in all of them."""


def cover(cases, values):
    """Those of the cases that it takes for all their values to occur, greedily: first come, first.

    `values` returns the set of a case's values.
    """
    pairs = [(case, values(case)) for case in cases]
    left, chosen = set().union(*(of_case for _, of_case in pairs)), []
    while left:
        case, of_case = max(pairs, key=lambda pair: len(pair[1] & left))
        chosen.append(case)
        left -= of_case
    return chosen
