"""The state: optax's own, found by optax's functions, known before any array is made."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from contract import gradients_of, moments_of, params_of, run
from optimizers import each_row, each_row_with_peer
from trees import assert_close, random

pytestmark = pytest.mark.usefixtures("small_leaves_in_int8")


@each_row_with_peer
def test_the_state_is_optax_state(row):
    params = params_of()
    ours, theirs = row.make().init(params), row.make_peer().init(params)
    chex.assert_trees_all_equal_structs(ours, theirs)
    chex.assert_trees_all_equal(ours, theirs)


@each_row_with_peer
@pytest.mark.usefixtures("standard_promotion")
def test_a_run_of_optax_continues_here_and_back(row):
    params = {"a": random((3, 4), "float32", 0), "b": random((5,), "float32", 1)}
    gradients = gradients_of(params, 12)
    ours, theirs = row.make(), row.make_peer()
    desired, _ = run(theirs, params, gradients)
    for first, then in [(theirs, ours), (ours, theirs)]:
        state, p, updates = first.init(params), params, []
        for i in range(12):
            optimizer = first if i < 6 else then
            u, state = optimizer.update(jax.tree.map(lambda g, i=i: g[i], gradients), state, p)
            p = optax.apply_updates(p, u)
            updates.append(u)
        stacked = jax.tree.map(lambda *u: jnp.stack(u), *updates)
        # 1e-5 is what optax itself loses in its bias correction, see test_adam.
        assert_close(stacked, desired, 3e-5)


@each_row
def test_optax_tree_functions_find_their_way(row):
    params = params_of()
    optimizer = row.make()
    state = optimizer.init(params)
    chex.assert_trees_all_equal(optax.tree.get(state, "mu"), moments_of(state)["mu"])
    ones = optax.tree.map_params(optimizer, jnp.ones_like, state)
    assert all(jnp.all(x == 1) for x in jax.tree.leaves(moments_of(ones)))
    assert optax.tree.get_all_with_path(ones, "count")[0][1] == 0


@each_row
def test_eval_shape(row):
    params = params_of("bfloat16")
    optimizer = row.make()
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(optimizer.init, params), optimizer.init(params)
    )
