"""Trees of arrays for tests: made, compared, stepped."""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


def untyped(x: Any) -> Any:
    """Returns x without its type: optax types its states as trees of arrays, without fields."""
    return x


def random(shape, dtype="float32", seed=0):
    """Returns normal numbers; real and imaginary parts if the dtype is complex."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return jnp.asarray(x, dtype)


def normal(*shape, seed=0):
    """Returns normal numbers in float32, as a NumPy array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_tree(shapes, dtype="float32", seed: int | Sequence[int] = 0, time=()):
    """Returns a leaf of normal numbers for each shape; `time` precedes all shapes."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal((*time, *shape)), dtype)
        for name, shape in shapes.items()
    }


def short_tree(shapes, dtype="float32", seed=0):
    """Does the same in 8 significant bits, so squares are exact in float32."""
    return jax.tree.map(lambda x: x.astype(dtype), random_tree(shapes, "bfloat16", seed))


def widened(tree):
    """Returns the tree in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def dtypes_of(tree):
    """Returns the tree of its dtypes."""
    return jax.tree.map(lambda x: x.dtype, tree)


def step_of(optimizer, **options):
    """Returns a jitted step: (params, state, gradients) to new parameters and state."""

    @functools.partial(jax.jit, **options)
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def scan(optimizer, params, gradients):
    """Runs all steps in one scan over gradients, whose first axis is time.

    Returns parameters and state after the last step, and the update of each step.
    """

    run = _jitted_scan(optimizer)
    (params, state), updates = run(params, optimizer.init(params), gradients)
    return params, state, updates


@functools.lru_cache(maxsize=64)
def _jitted_scan(optimizer):
    """Returns one function per optimizer: its runs on trees of the same shapes compile once."""

    @jax.jit
    def run(params, state, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, state), gradients)

    return run


def directions(optimizer, gradients):
    """Returns each step's update and the last state, of a run that needs no parameters."""

    @jax.jit
    def run(gradients):
        step = lambda state, g: optimizer.update(g, state)[::-1]  # noqa: E731
        return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)

    state, updates = run(jnp.asarray(gradients))
    return np.asarray(updates), state


def descend(optimizer, gradient, start, inputs):
    """Returns parameters and states after each step; each step's gradient sees one input."""

    @jax.jit
    def run(start, inputs):
        def step(carry, x):
            params, state = carry
            updates, state = optimizer.update(gradient(params, x), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state)

        return jax.lax.scan(step, (start, optimizer.init(start)), inputs)[1]

    return run(start, inputs)


def largest_error(actual, desired):
    """Returns the largest error of directions, relative to each, or to 0.05 where it is small."""
    difference = np.abs(np.asarray(actual, np.float64) - desired)
    return np.max(difference / np.maximum(np.abs(desired), 0.05))


def assert_close(actual, desired, rtol):
    """Asserts that trees are equal up to `rtol` times the largest entry of each leaf."""

    def check(a, d):
        dtype = np.complex128 if np.iscomplexobj(d) else np.float64
        a, d = np.asarray(a, dtype), np.asarray(d, dtype)
        np.testing.assert_allclose(a, d, rtol=0, atol=rtol * np.max(np.abs(d), initial=0.0))

    jax.tree.map(check, actual, desired)


def assert_same_bits(tree, desired):
    """Asserts that trees have equal types and dtypes, and bit-identical leaves."""
    chex.assert_trees_all_equal_structs(tree, desired)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(desired), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
