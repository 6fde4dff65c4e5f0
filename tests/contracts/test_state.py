"""The state is optax's, works with optax's functions, and is known before any array is made."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from contract import gradients_of, moments_of, params_of, run
from optimizers import each_row, each_row_with_peer
from trees import assert_close, random

import adam_jax

pytestmark = pytest.mark.usefixtures("small_leaves_in_int8")


@each_row_with_peer
def test_the_state_equals_optax_s(row):
    params = params_of()
    ours, theirs = row.make().init(params), row.make_peer().init(params)
    chex.assert_trees_all_equal_structs(ours, theirs)
    chex.assert_trees_all_equal(ours, theirs)


@each_row_with_peer
@pytest.mark.usefixtures("standard_promotion")
def test_an_optax_run_continues_here_and_back(row):
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
        # optax itself loses 1e-5 in its bias correction, see test_adam.
        assert_close(stacked, desired, 3e-5)


@each_row
def test_optax_tree_functions_work_on_the_state(row):
    params = params_of()
    optimizer = row.make()
    state = optimizer.init(params)
    chex.assert_trees_all_equal(optax.tree.get(state, "mu"), moments_of(state)["mu"])
    ones = optax.tree.map_params(optimizer, jnp.ones_like, state)
    assert all(jnp.all(x == 1) for x in jax.tree.leaves(moments_of(ones)))
    assert optax.tree.get_all_with_path(ones, "count")[0][1] == 0


@each_row
def test_eval_shape_predicts_the_state(row):
    params = params_of("bfloat16")
    optimizer = row.make()
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(optimizer.init, params), optimizer.init(params)
    )


@each_row
def test_init_accepts_shapes(row):
    """A state can be made without a parameter in memory."""
    params = params_of(row.param_dtype)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    optimizer = row.make()
    state = optimizer.init(shapes)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    chex.assert_trees_all_equal(state, optimizer.init(params))
    chex.assert_trees_all_equal_dtypes(state, optimizer.init(params))


@each_row
@pytest.mark.parametrize("shape", [(2**31,), (3, 2**32), (2**16, 2**16)])
def test_leaves_may_have_more_than_2_to_the_31_elements(row, shape, standard_promotion):
    """All functions trace, because no size is an int32."""
    params = {"w": jax.ShapeDtypeStruct(shape, row.param_dtype)}
    optimizer = row.make()

    def everything(params, gradients):
        old_state = optimizer.init(params)
        updates, state = optimizer.update(gradients, old_state, params)
        statistics = adam_jax.step_statistics(updates, state, params, old_state=old_state)
        formats = {} if "max" in row.name else {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
        converted = adam_jax.convert_state(state, **formats)
        readers = []
        if row.name == "average_params":
            readers = [adam_jax.averaged_params(params, state)]
        return optax.apply_updates(params, updates), statistics, converted, readers

    new_params, statistics, *_ = jax.eval_shape(everything, params, params)
    assert new_params["w"].shape == shape
    assert all(x.shape == () for x in statistics.values())


@pytest.mark.parametrize("remainder", ["none", "int8", "int16", "float32"])
def test_init_of_master_weights_accepts_shapes(remainder):
    params = params_of("bfloat16") | {"wide": jnp.ones((64, 64))}
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    inner = adam_jax.adam(0.1, mu_dtype="int8", nu_dtype="int8")
    optimizer = adam_jax.average_params(adam_jax.master_weights(inner, remainder))
    state = optimizer.init(shapes)
    chex.assert_trees_all_equal(state, optimizer.init(params))
    chex.assert_trees_all_equal_dtypes(state, optimizer.init(params))


@pytest.mark.parametrize("remainder", ["none", "int8", "int16", "float32"])
def test_master_weights_may_have_more_than_2_to_the_31_elements(remainder):
    shape = (2**16, 2**16)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    optimizer = adam_jax.master_weights(adam_jax.adam(0.1), remainder)

    def everything(params):
        state = optimizer.init(params)
        masters = adam_jax.master_params(params, state)
        params, state = adam_jax.load_master_params(masters, params, state)
        return adam_jax.convert_remainder(params, state, "int8")

    new_params, state = jax.eval_shape(everything, params)
    assert new_params["w"].shape == state.remainder["w"].shape == shape
