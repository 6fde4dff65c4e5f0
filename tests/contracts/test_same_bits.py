"""Runs give the same bits if repeated, and with leaves renamed, moved, added or removed."""

import functools

import jax
import numpy as np
import optax
import pytest
from optimizers import EXACT, LAYOUT_ROWS, STORED_ROWS, each_layout
from trees import short_tree, step_of

# Two leaves are large enough for int8 and have the same shape: only their places distinguish
# them.
SHAPES = [(40, 128), (128,), (40, 128), ()]

# optax.apply_updates adds float32 updates to 16-bit parameters.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def leaves_of(seed, dtype):
    return list(short_tree(dict(enumerate(SHAPES)), dtype, seed).values())


def three_steps(row, arrange=lambda leaves: leaves):
    """Returns parameters and state after a run on leaves that are arranged as a tree."""
    optimizer, dtype = row.make(**row.settings), row.param_dtype  # a new optimizer each time
    params = arrange(leaves_of(0, dtype))
    state = optimizer.init(params)
    step = step_of(optimizer)
    for seed in (1, 2, 3):
        params, state = step(params, state, arrange(leaves_of(seed, dtype)))
    return params, state


@functools.cache
def as_a_list(row):
    return three_steps(row)


def places(tree, order):
    """Selects places from each list in the tree, which holds the parameters' leaves."""

    def is_list(x):
        return isinstance(x, list)

    return jax.tree.map(lambda x: [x[i] for i in order] if is_list(x) else x, tree, is_leaf=is_list)


def differing(tree, desired):
    """Returns the numbers of the leaves that are not bit-identical."""

    def bits(tree):
        return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]

    pairs = zip(bits(tree), bits(desired), strict=True)
    return [i for i, (x, y) in enumerate(pairs) if x != y]


@pytest.mark.slow
def test_repeated_runs_give_the_same_bits(pytestconfig):
    """New optimizers with the same settings are traced and compiled again."""
    rows = STORED_ROWS if pytestconfig.getoption("full") else LAYOUT_ROWS
    first = list(map(as_a_list, rows))
    jax.clear_caches()
    for row, run in zip(rows, first, strict=True):
        assert not differing(three_steps(row), run), row.name


@each_layout
def test_jit_and_eager_agree_where_products_are_exact(row):
    """Only contraction distinguishes them elsewhere.

    (The decay of `average_params` is no power of two, but both compile its product and sum
    separately.)
    """
    optimizer, dtype = row.make(**EXACT), row.param_dtype
    jitted = jax.jit(optimizer.update)
    params, gradients = (leaves_of(seed, dtype) for seed in (0, 1))
    state = optimizer.init(params)
    # Nesterov adds products with bias corrections. After 25 steps these are exactly 1.
    for i in range(32):
        scaled = [g * (-2.0) ** (i % 3) for g in gradients]
        updates, new_state = jitted(scaled, state, params)
        if i >= 28:
            assert not differing(optimizer.update(scaled, state, params), (updates, new_state))
        params, state = optax.apply_updates(params, updates), new_state


RENAMED = {
    "dict": lambda leaves: dict(zip("abcd", leaves, strict=True)),
    "nested": lambda leaves: {"x": [leaves[0], {"y": leaves[1]}], "z": tuple(leaves[2:])},
}


@pytest.mark.covering
@each_layout
@pytest.mark.parametrize("arrange", RENAMED.values(), ids=RENAMED)
def test_names_of_leaves_change_no_bit(row, arrange):
    """A leaf's place is its number in the tree. JAX sorts the keys of dicts."""
    assert not differing(three_steps(row, arrange), as_a_list(row))


@each_layout
def test_the_order_of_leaves_changes_only_random_bits(row):
    """Only stochastic rounding changes results: a leaf's place determines its random bits."""
    order = [2, 3, 1, 0]
    moved = three_steps(row, lambda leaves: [leaves[i] for i in order])
    assert bool(differing(moved, places(as_a_list(row), order))) == row.stochastic


@each_layout
def test_an_added_leaf_changes_no_other(row):
    """At the end of the tree it moves no other leaf."""
    longer = three_steps(row, lambda leaves: [*leaves, leaves[0]])
    assert not differing(places(longer, range(len(SHAPES))), as_a_list(row))


@each_layout
def test_a_removed_leaf_changes_no_other(row):
    """With None in its place, no other leaf moves."""
    shorter = three_steps(row, lambda leaves: [leaves[0], None, *leaves[2:]])
    assert not differing(shorter, places(as_a_list(row), [0, 2, 3]))
