"""`check_landing` finds parameters that did not move by the last updates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from low_precision import each_dtype, each_remainder
from trees import random_tree, step_of, untyped

import adam_jax
from adam_jax import check_landing, convert_remainder, load_master_params, master_weights
from adam_jax._landing import _raise_unless

pytestmark = pytest.mark.usefixtures("standard_promotion")

NOT_WHERE = r"\['kernel'\] is not where"
CHANGES = {
    "scaled": optax.scale(0.5),
    "clipped": optax.clip(1e-3),
    "by their norm": optax.clip_by_global_norm(1e-3),
    "decayed": optax.add_decayed_weights(0.01),
}


def make(remainder="int8") -> Any:
    return untyped(check_landing(master_weights(adam_jax.adamw(1e-2), remainder)))


def params_of(dtype) -> Any:
    return random_tree({"kernel": (16, 24), "wide": (3,)}, dtype) | {"wide": jnp.ones(3)}


@pytest.mark.parametrize("change", CHANGES)
@each_remainder
def test_updates_that_are_changed_later_are_found(remainder, change):
    optimizer = optax.chain(make(remainder), CHANGES[change])
    params = params_of("bfloat16")
    step = step_of(optimizer)
    moved, state = step(params, optimizer.init(params), params)
    with pytest.raises(jax.errors.JaxRuntimeError, match=NOT_WHERE):
        jax.block_until_ready(step(moved, state, params))


def test_eager_steps_raise_a_value_error():
    optimizer = optax.chain(make(), optax.scale(0.5))
    params = params_of("bfloat16")
    updates, state = optimizer.update(params, optimizer.init(params), params)
    with pytest.raises(ValueError, match=NOT_WHERE):
        optimizer.update(params, state, optax.apply_updates(params, updates))
    with pytest.raises(ValueError, match="check_landing needs the parameters"):
        optimizer.update(params, state)


def test_the_callback_computes_nothing_with_jax():
    """On a CPU, JAX would wait for threads that wait for the callback: a deadlock."""

    class Landed:
        def __array__(self, dtype=None, copy=None):
            return np.array([True, False])

        def __iter__(self):
            raise AssertionError("JAX would take the array apart with a computation")

    with pytest.raises(ValueError, match="parameter second is not where"):
        _raise_unless(["first", "second"], Landed())


@pytest.mark.covering
@each_dtype
@each_remainder
def test_a_correct_run_raises_nothing(remainder, dtype):
    """Parameters may also change between steps, when they are loaded or converted."""
    optimizer = make(remainder)
    alone = optimizer.init(params_of(dtype)).inner_state
    params, state = params_of(dtype), optimizer.init(params_of(dtype))
    weights = jax.tree.map(lambda p: p.astype(jnp.float32) * 1.01, params)
    step = step_of(optimizer)
    plain = step_of(master_weights(adam_jax.adamw(1e-2), remainder))
    desired = params
    for move in (None, None, "load", None, "convert", None, None):
        if move == "load":
            params, state = load_master_params(weights, params, state)
            desired, alone = load_master_params(weights, desired, alone)
        if move == "convert":
            params, state = convert_remainder(params, state, remainder)
            desired, alone = convert_remainder(desired, alone, remainder)
        params, state = step(params, state, params_of(dtype))
        desired, alone = plain(desired, alone, params_of(dtype))
    jax.block_until_ready(params)
    jax.effects_barrier()
    assert state.known
    jax.tree.map(np.testing.assert_array_equal, (params, state.inner_state), (desired, alone))


def test_vmap_over_models_finds_changed_updates():
    optimizer = optax.chain(make(), optax.scale(0.5))
    params = jax.tree.map(lambda p: jnp.stack([p, p + 1]), params_of("bfloat16"))
    state = jax.vmap(optimizer.init)(params)
    _, state = jax.vmap(optimizer.update)(params, state, params)
    with pytest.raises(Exception, match=NOT_WHERE):
        jax.vmap(optimizer.update)(params, state, params)
