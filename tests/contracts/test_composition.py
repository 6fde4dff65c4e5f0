"""Optimizers inside and around optax's wrappers and chains, and gradients that are not finite."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import few_params_of, gradients_of, params_of, run, run_eagerly
from low_precision import each_remainder
from optimizers import STORED_ROWS, each, each_row
from trees import assert_close, random, untyped

import adam_jax

pytestmark = [pytest.mark.covering, pytest.mark.usefixtures("small_leaves_in_int8")]


@each_row
def test_masked_leaves_pass_through(row):
    params = {"trained": random((3, 4), "float32", 0), "frozen": random((5,), "float32", 1)}
    gradients = gradients_of(params)
    optimizer = untyped(optax.masked(row.make(), {"trained": True, "frozen": False}))
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    chex.assert_trees_all_equal(updates["frozen"], gradients["frozen"])
    alone = row.make()
    desired, _ = alone.update(
        {"t": gradients["trained"]}, alone.init({"t": params["trained"]}), {"t": params["trained"]}
    )
    chex.assert_trees_all_equal(updates["trained"], desired["t"])


@each(STORED_ROWS)
@pytest.mark.usefixtures("standard_promotion")
def test_frozen_parts_do_not_move(row):
    """Parts frozen as in docs/settings.md do not move and take no memory."""
    params = {"w": random((3, 4), row.param_dtype, 0), "frozen": random((5,), row.param_dtype, 1)}
    gradients = gradients_of(params)
    transforms: Any = {"train": row.make(), "freeze": optax.set_to_zero()}
    optimizer = untyped(optax.multi_transform(transforms, {"w": "train", "frozen": "freeze"}))
    alone = row.make()
    state, own = optimizer.init(params), alone.init({"w": params["w"]})
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(own))
    trained = dict(params)
    for _ in range(2):
        updates, state = optimizer.update(gradients, state, trained)
        desired, own = alone.update({"w": gradients["w"]}, own, {"w": trained["w"]})
        chex.assert_trees_all_equal(updates["w"], desired["w"])
        trained = untyped(optax.apply_updates(trained, updates))
    chex.assert_trees_all_equal(trained["frozen"], params["frozen"])


@each_remainder
@pytest.mark.usefixtures("standard_promotion")
def test_frozen_parts_do_not_move_inside_master_weights(remainder):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params_of())
    gradients = gradients_of(params)
    labels = jax.tree.map(lambda _: "freeze", params) | {"kernel": "train"}
    transforms: Any = {"train": adam_jax.adamw(0.1), "freeze": optax.set_to_zero()}
    inside = optax.multi_transform(transforms, labels)
    optimizer = adam_jax.master_weights(inside, remainder)
    state, moved = optimizer.init(params), params
    for _ in range(3):
        updates, state = optimizer.update(gradients, state, moved)
        moved = untyped(optax.apply_updates(moved, updates))
    assert np.all(moved["kernel"] != params["kernel"])
    chex.assert_trees_all_equal(moved | {"kernel": None}, params | {"kernel": None})


@each_row
def test_multi_transform_steps_each_group_by_itself(row):
    params = {"a": random((3, 4), "float32", 0), "b": random((5,), "float32", 1)}
    gradients = gradients_of(params, 3)
    optimizer = optax.multi_transform(
        {"fast": row.make(b1=0.0), "slow": row.make()}, {"a": "fast", "b": "slow"}
    )
    updates, _ = run_eagerly(optimizer, params, gradients)
    for leaf, alone in [("a", row.make(b1=0.0)), ("b", row.make())]:
        desired, _ = run_eagerly(alone, {leaf: params[leaf]}, {leaf: gradients[leaf]})
        chex.assert_trees_all_close(updates[leaf], desired[leaf], rtol=1e-6, atol=1e-9)


@each_row
@pytest.mark.usefixtures("standard_promotion")
def test_multi_steps_step_on_the_mean(row):
    params = few_params_of()
    gradients = gradients_of(params, 6)
    every_second = optax.MultiSteps(row.make(), every_k_schedule=2).gradient_transformation()
    updates, _ = run(every_second, params, gradients)
    means = jax.tree.map(lambda g: (g[0::2] + g[1::2]) / 2, gradients)
    desired, _ = run_eagerly(row.make(), params, means)
    assert not any(jnp.any(u[0::2]) for u in jax.tree.leaves(updates))
    tolerance = max(2e-6, row.storage_error)
    assert_close(jax.tree.map(lambda u: u[1::2], updates), desired, tolerance)


@each_row
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_apply_if_finite_skips_bad_steps(row, bad):
    params = few_params_of()
    gradients = gradients_of(params, 4)
    poisoned = gradients | {"kernel": gradients["kernel"].at[2, 0, 0].set(bad)}
    updates, _ = run(optax.apply_if_finite(row.make(), 3), params, poisoned)
    without = jax.tree.map(lambda g: jnp.delete(g, 2, axis=0), gradients)
    desired, _ = run(row.make(), params, without)
    assert not any(jnp.any(u[2]) for u in jax.tree.leaves(updates))
    rest = jax.tree.map(lambda u: jnp.delete(u, 2, axis=0), updates)
    chex.assert_trees_all_close(rest, desired, rtol=1e-6, atol=1e-9)


@each_row
def test_flatten_gives_the_same_updates(row):
    params = {"a": random((3, 4), "float32", 0), "b": random((5,), "float32", 1)}
    gradients = gradients_of(params, 3)
    updates, _ = run(optax.flatten(row.make()), params, gradients)
    desired, _ = run_eagerly(row.make(), params, gradients)
    # In a flat array, elements have other coordinates, and so other random bits for rounding.
    assert_close(updates, desired, max(2e-6, row.storage_error))


@each_row
def test_a_chain_clips_before_the_step(row):
    params = few_params_of()
    gradients = gradients_of(params, 3)
    updates, _ = run_eagerly(optax.chain(optax.clip(0.1), row.make()), params, gradients)
    clipped = jax.tree.map(lambda g: jnp.clip(g, -0.1, 0.1), gradients)
    desired, _ = run_eagerly(row.make(), params, clipped)
    chex.assert_trees_all_close(updates, desired, rtol=1e-6, atol=1e-9)


@each_row
def test_extra_args_are_ignored(row):
    params = params_of()
    gradients = gradients_of(params)
    optimizer = row.make()
    state = optimizer.init(params)
    plain = optimizer.update(gradients, state, params)
    extra = optimizer.update(gradients, state, params, value=1.0, grad_fn=None)
    chex.assert_trees_all_equal(plain, extra)
