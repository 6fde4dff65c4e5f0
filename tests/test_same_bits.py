"""The same run has the same bits: repeated, with leaves renamed, moved, added and left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from low_precision import REMAINDERS
from optimizers import ROWS

import adam_jax

# Two of the leaves are large enough for int8, and of one shape: nothing but their place tells
# them apart.
SHAPES = [(40, 128), (128,), (40, 128), ()]
# XLA may contract a product and a sum into one rounding, or not. With powers of two it makes no
# difference, because the product is exact anyway.
EXACT = {"learning_rate": 2**-10, "b1": 0.5, "b2": 1 - 2**-10, "weight_decay": 2**-7}


def with_master_weights(remainder, moments, **hyperparameters):
    hyperparameters = {"learning_rate": 0.01, "weight_decay": 0.1} | hyperparameters
    formats = {"mu_dtype": moments, "nu_dtype": moments}
    return adam_jax.master_weights(adam_jax.adamw(**hyperparameters, **formats), remainder)


# By name: how to make the optimizer, its parameters' dtype, and whether it rounds at random.
OPTIMIZERS = {row.name: (row.make, jnp.float32, row.storage_error > 0) for row in ROWS} | {
    f"{remainder} remainder, {moments} moments": (
        functools.partial(with_master_weights, remainder, moments),
        jnp.bfloat16,
        moments == "int8" or remainder in ("none", "int8"),
    )
    for remainder in REMAINDERS
    for moments in ("float32", "int8")
}

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
# optax.apply_updates adds float32 updates to 16-bit parameters.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def leaves_of(seed, dtype):
    """In 8 bits, so that squares are exact too."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), jnp.bfloat16).astype(dtype) for s in SHAPES]


def step_of(optimizer):
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def three_steps(name, arrange=lambda leaves: leaves):
    """Parameters and state after a run on leaves that are arranged as a tree."""
    make, dtype, _ = OPTIMIZERS[name]
    optimizer = make()
    params = arrange(leaves_of(0, dtype))
    state = optimizer.init(params)
    step = step_of(optimizer)
    for seed in (1, 2, 3):
        params, state = step(params, state, arrange(leaves_of(seed, dtype)))
    return params, state


@functools.cache
def as_a_list(name):
    return three_steps(name)


def places(tree, order):
    """Of each list in the tree, which stands for the parameters' leaves, those at some places."""

    def is_list(x):
        return isinstance(x, list)

    return jax.tree.map(lambda x: [x[i] for i in order] if is_list(x) else x, tree, is_leaf=is_list)


def differing(tree, desired):
    """The numbers of the leaves that are not the same to the bit."""

    def bits(tree):
        return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]

    pairs = zip(bits(tree), bits(desired), strict=True)
    return [i for i, (x, y) in enumerate(pairs) if x != y]


@each_optimizer
def test_a_run_repeated(name):
    """With another optimizer of the same settings, traced and compiled anew."""
    first = as_a_list(name)
    jax.clear_caches()
    assert not differing(three_steps(name), first)


@each_optimizer
def test_jit_and_eager_where_products_are_exact(name):
    """So contraction is all that tells them apart.

    (`average_params` has a decay that is no power of two; but that product and sum are compiled by
    themselves, in both.)
    """
    make, dtype, _ = OPTIMIZERS[name]
    optimizer = make(**EXACT)
    jitted = jax.jit(optimizer.update)
    params, gradients = (leaves_of(seed, dtype) for seed in (0, 1))
    state = optimizer.init(params)
    # Nesterov adds products with bias corrections. After 25 steps these are 1, to the last bit.
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


@each_optimizer
@pytest.mark.parametrize("arrange", RENAMED.values(), ids=RENAMED)
def test_leaves_under_other_names(name, arrange):
    """A leaf's place is its number in the tree, in JAX's order, which sorts the keys of dicts."""
    assert not differing(three_steps(name, arrange), as_a_list(name))


@each_optimizer
def test_leaves_in_another_order(name):
    """Where nothing is rounded at random: which random bits a leaf has, its place says."""
    order = [2, 3, 1, 0]
    moved = three_steps(name, lambda leaves: [leaves[i] for i in order])
    *_, rounds_at_random = OPTIMIZERS[name]
    assert bool(differing(moved, places(as_a_list(name), order))) == rounds_at_random


@each_optimizer
def test_a_leaf_more(name):
    """At the end, where it moves no other."""
    longer = three_steps(name, lambda leaves: [*leaves, leaves[0]])
    assert not differing(places(longer, range(len(SHAPES))), as_a_list(name))


@each_optimizer
def test_a_leaf_less(name):
    """None in its place moves no other."""
    shorter = three_steps(name, lambda leaves: [leaves[0], None, *leaves[2:]])
    assert not differing(shorter, places(as_a_list(name), [0, 2, 3]))
