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
    """Return x; optax types its states as trees of arrays, without their fields."""
    return x


def random(shape, dtype="float32", seed=0):
    """Normal numbers; real and imaginary parts if the dtype is complex."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return jnp.asarray(x, dtype)


def normal(*shape, seed=0):
    """Normal numbers in float32, as a NumPy array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_tree(shapes, dtype="float32", seed: int | Sequence[int] = 0, time=()):
    """A leaf of normal numbers for each shape; `time` is put in front of all shapes."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal((*time, *shape)), dtype)
        for name, shape in shapes.items()
    }


def short_tree(shapes, dtype="float32", seed=0):
    """The same in 8 significant bits, so that squares are exact in float32."""
    return jax.tree.map(lambda x: x.astype(dtype), random_tree(shapes, "bfloat16", seed))


def widened(tree):
    """The tree in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def dtypes_of(tree):
    """The tree of its dtypes."""
    return jax.tree.map(lambda x: x.dtype, tree)


def step_of(optimizer, **options):
    """A jitted step: (params, state, gradients) to new parameters and state."""

    @functools.partial(jax.jit, **options)
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def scan(optimizer, params, gradients):
    """A run in one scan over gradients, whose first axis is time.

    Returns parameters and state after the last step, and the update of each step.
    """

    run = _jitted_scan(optimizer)
    (params, state), updates = run(params, optimizer.init(params), gradients)
    return params, state, updates


@functools.lru_cache(maxsize=64)
def _jitted_scan(optimizer):
    """A function for each optimizer, so that its runs on trees of the same shapes compile once."""

    @jax.jit
    def run(params, state, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, state), gradients)

    return run


def directions(optimizer, gradients):
    """The update of each step, and the last state, of a run that needs no parameters."""

    @jax.jit
    def run(gradients):
        step = lambda state, g: optimizer.update(g, state)[::-1]  # noqa: E731
        return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)

    state, updates = run(jnp.asarray(gradients))
    return np.asarray(updates), state


def descend(optimizer, gradient, start, inputs):
    """The parameters and states after each step; each step's gradient sees one of the inputs."""

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
    """The largest error of directions, relative to each, or to 0.05 where that is small."""
    difference = np.abs(np.asarray(actual, np.float64) - desired)
    return np.max(difference / np.maximum(np.abs(desired), 0.05))


def assert_close(actual, desired, rtol):
    """Trees equal up to `rtol` times the largest entry of each leaf."""

    def check(a, d):
        dtype = np.complex128 if np.iscomplexobj(d) else np.float64
        a, d = np.asarray(a, dtype), np.asarray(d, dtype)
        np.testing.assert_allclose(a, d, rtol=0, atol=rtol * np.max(np.abs(d), initial=0.0))

    jax.tree.map(check, actual, desired)


def assert_same_bits(tree, desired):
    """Trees of equal types and dtypes whose leaves are bit-identical."""
    chex.assert_trees_all_equal_structs(tree, desired)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(desired), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
