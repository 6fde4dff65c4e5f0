"""Steps inside JAX's transformations: donation, shard_map, cond, checkpoint, export."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import few_params_of, gradients_of, moments_of, run_eagerly
from jax.sharding import Mesh, PartitionSpec
from optimizers import each_row
from trees import assert_close

pytestmark = [pytest.mark.covering, pytest.mark.usefixtures("small_leaves_in_int8")]


@each_row
def test_a_donated_step_reuses_its_buffers(row):
    params = few_params_of()
    gradients = gradients_of(params)
    optimizer = row.make()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    desired, _ = run_eagerly(optimizer, params, jax.tree.map(lambda g: g[None], gradients))
    before = jax.tree.map(jnp.copy, params)
    kernel, mu = params["kernel"], moments_of(state)["mu"]["kernel"]
    params, _ = step(params, state)
    assert kernel.is_deleted()
    assert mu.is_deleted()
    expected = jax.tree.map(lambda p, u: p + u[0], before, desired)
    # Relative to the leaf, because a step may cancel a parameter.
    assert_close(params, expected, 1e-6)


@each_row
def test_shard_map_gives_the_same_step(row):
    params = few_params_of()
    gradients = gradients_of(params)
    optimizer = row.make()
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    everywhere = PartitionSpec()
    update = jax.shard_map(
        optimizer.update, mesh=mesh, in_specs=(everywhere,) * 3, out_specs=everywhere
    )
    state = optimizer.init(params)
    sharded = jax.jit(update)(gradients, state, params)
    chex.assert_trees_all_close(
        sharded, optimizer.update(gradients, state, params), rtol=1e-6, atol=1e-9
    )


@each_row
def test_steps_work_inside_cond_and_checkpoint(row):
    params = few_params_of()
    gradients = gradients_of(params)
    optimizer = row.make()
    state = optimizer.init(params)
    desired = optimizer.update(gradients, state, params)

    # These are arguments: XLA would encode constants itself, and add constants first.
    @jax.jit
    def maybe(yes, *args):
        def unchanged(gradients, state, params):
            return jax.tree.map(jnp.zeros_like, gradients), state

        return jax.lax.cond(yes, jax.checkpoint(optimizer.update), unchanged, *args)

    args = gradients, state, params
    chex.assert_trees_all_close(maybe(True, *args), desired, rtol=1e-6, atol=1e-9)
    chex.assert_trees_all_equal(maybe(False, *args)[1], state)


@pytest.mark.usefixtures("standard_promotion")
@each_row
def test_an_exported_step_runs_again(row):
    """A step is exported for several platforms, serialized, and run again.

    It is a function of leaves, because JAX serializes only trees of registered types, which
    optax's states are not.
    """
    optimizer = row.make()
    params = {"kernel": jnp.ones((64, 128), jnp.bfloat16), "bias": jnp.ones(128, jnp.bfloat16)}
    gradients = jax.tree.map(lambda p: p / 3, params)
    leaves, tree = jax.tree.flatten((params, optimizer.init(params), gradients))

    @jax.jit
    def step(*leaves):
        params, state, gradients = tree.unflatten(leaves)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.leaves((optax.apply_updates(params, updates), state))

    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*leaves)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda", "tpu")
    for x, y in zip(again.call(*leaves), step(*leaves), strict=True):
        np.testing.assert_array_equal(x, y)
