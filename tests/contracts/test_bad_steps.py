"""Inside `optax.apply_if_finite`, steps on gradients that are not finite change nothing."""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from low_precision import each_dtype, each_remainder
from optimizers import each_row
from trees import random_tree, step_of

import adam_jax
from adam_jax import master_weights

# optax.apply_updates adds float32 updates to 16-bit parameters.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def tree_of(dtype, seed):
    return random_tree({"kernel": (64, 64), "bias": (24,)}, dtype, seed)


def bad_gradients(dtype):
    """Yields gradients with one infinity, and then with one NaN."""
    good = tree_of(dtype, 1)
    yield good | {"kernel": good["kernel"].at[3, 4].set(jnp.inf)}
    yield good | {"bias": good["bias"].at[5].set(jnp.nan)}


def begin(optimizer, dtype, gradient_dtype):
    """Makes two good steps. Returns the step function, the parameters and the state."""
    step = step_of(optimizer)
    params = tree_of(dtype, 0)
    state = optimizer.init(params)
    for seed in (2, 3):
        params, state = step(params, state, tree_of(gradient_dtype, seed))
    return step, params, state


def assert_bad_steps_do_nothing(optimizer, dtype):
    """Asserts that the step after bad float32 gradients is bit-identical to one without them."""
    step, params, state = begin(optimizer, dtype, "float32")
    after, after_state = params, state
    for i, bad in enumerate(bad_gradients("float32"), start=1):
        after, after_state = step(after, after_state, bad)
        assert after_state.total_notfinite == i
        chex.assert_trees_all_equal(after, params)
        chex.assert_trees_all_equal(after_state.inner_state, state.inner_state)
    good = tree_of("float32", 4)
    after, after_state = step(after, after_state, good)
    desired, desired_state = step(params, state, good)
    chex.assert_trees_all_equal(after, desired)
    chex.assert_trees_all_equal(after_state.inner_state, desired_state.inner_state)
    assert np.any(desired["kernel"] != params["kernel"])


@each_row
def test_apply_if_finite_works_around_every_optimizer(row):
    assert_bad_steps_do_nothing(optax.apply_if_finite(row.make(), 3), "float32")


@pytest.mark.covering
@each_remainder
@each_dtype
def test_apply_if_finite_works_around_master_weights(remainder, dtype):
    """It needs updates in the gradients' dtype, float32, which unscaling the loss returns."""
    optimizer = optax.apply_if_finite(master_weights(adam_jax.adamw(1e-2), remainder), 3)
    assert_bad_steps_do_nothing(optimizer, dtype)


@pytest.mark.covering
@each_remainder
@each_dtype
def test_apply_if_finite_works_inside_master_weights(remainder, dtype):
    """Gradients may have 16 bits here. Only the count of draws of random bits increases."""
    optimizer = master_weights(optax.apply_if_finite(adam_jax.adamw(1e-2), 3), remainder)
    step, params, state = begin(optimizer, dtype, dtype)
    after, after_state = params, state
    for i, bad in enumerate(bad_gradients(dtype), start=1):
        after, after_state = step(after, after_state, bad)
        assert after_state.inner_state.total_notfinite == i
        assert after_state.count == 2 + i
        chex.assert_trees_all_equal(after, params)
        chex.assert_trees_all_equal(after_state.remainder, state.remainder)
        moments, desired = after_state.inner_state.inner_state, state.inner_state.inner_state
        chex.assert_trees_all_equal(moments, desired)
    good = tree_of(dtype, 4)
    after, after_state = step(after, after_state._replace(count=state.count), good)
    desired, desired_state = step(params, state, good)
    chex.assert_trees_all_equal(after, desired)
    chex.assert_trees_all_equal(after_state.remainder, desired_state.remainder)
