"""A training run continues in another storage format, with another remainder, from optax."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from low_precision import KEPT, REMAINDERS, each_dtype, log_uniform, ulp
from optimizers import each_row_with_peer
from trees import dtypes_of, untyped

import adam_jax
from adam_jax import convert_remainder, load_master_params, master_params, master_weights

SHAPE = (64, 64)


@pytest.mark.slow
@pytest.mark.covering
@pytest.mark.parametrize("formats", [("int8", "int8"), ("bfloat16", "int8"), ("int8", "bfloat16")])
@pytest.mark.parametrize("factory", [adam_jax.adam, adam_jax.nadamw], ids=["adam", "nadamw"])
def test_a_run_continues_in_another_format(formats, factory):
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(7), "none": None}
    rng = np.random.default_rng(3)

    def gradients():
        return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)

    plain, stored = factory(0.1), factory(0.1, mu_dtype=formats[0], nu_dtype=formats[1])
    state = plain.init(params)
    for _ in range(20):
        _, state = plain.update(gradients(), state, params)
    converted = adam_jax.convert_state(state, *formats)
    assert jax.tree.structure(converted) == jax.tree.structure(stored.init(params))
    g = gradients()
    updates, converted = stored.update(g, converted, params)
    desired, _ = plain.update(g, state, params)
    error = jnp.linalg.norm(updates["w"] - desired["w"]) / jnp.linalg.norm(desired["w"])
    assert error < 0.08
    # Small leaves stay in float32 under int8, but not under bfloat16.
    np.testing.assert_allclose(updates["b"], desired["b"], rtol=0.03)
    back, _ = plain.update(g, adam_jax.convert_state(converted), params)
    assert jnp.isfinite(back["w"]).all()
    # Converting a format into itself changes nothing.
    chex.assert_trees_all_equal(adam_jax.convert_state(converted, *formats), converted)


@pytest.mark.usefixtures("standard_promotion")
def test_an_optax_run_in_bfloat16_continues():
    params = jnp.ones(SHAPE)
    theirs = optax.adam(0.1, mu_dtype="bfloat16")
    _, state = theirs.update(params, theirs.init(params))
    ours = untyped(adam_jax.adam(0.1))
    updates, _ = ours.update(params, adam_jax.convert_state(state))
    np.testing.assert_allclose(updates, -0.1, rtol=0.01)


@pytest.mark.covering
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@each_row_with_peer
def test_an_optax_state_continues(row, dtype):
    """Optax stores moments in the parameters' dtype, and nu of complex ones as complex numbers."""
    params = {"w": jnp.ones((3, 5), dtype), "b": jnp.ones(4, dtype)}
    gradients = jax.tree.map(lambda p: p * jnp.asarray(0.25, dtype), params)
    theirs, ours = row.make_peer(), row.make()
    state, own = theirs.init(params), ours.init(params)
    for _ in range(3):
        _, state = theirs.update(gradients, state, params)
        _, own = ours.update(gradients, own, params)
    converted = adam_jax.convert_state(state)
    assert jax.tree.structure(converted) == jax.tree.structure(own)
    assert dtypes_of(converted) == dtypes_of(own)
    for new, old in zip(jax.tree.leaves(converted), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new.astype(complex), old.astype(complex))
    updates, state = ours.update(gradients, converted, params)
    desired, own = ours.update(gradients, own, params)
    assert dtypes_of(state) == dtypes_of(own)
    assert dtypes_of(updates) == dtypes_of(gradients)
    # Optax's moments in bfloat16 and float16 lose this much, three times each.
    rtol = {"bfloat16": 3 * 2.0**-8, "float16": 3 * 2.0**-11}.get(dtype, 1e-5)
    for u, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(u.astype(complex), expected.astype(complex), rtol=rtol)


# ------------------------------------------------------------------ convert_remainder


@pytest.mark.covering
@each_dtype
@pytest.mark.parametrize("new", REMAINDERS)
@pytest.mark.parametrize("old", REMAINDERS)
def test_weights_stay_when_remainders_change(old, new, dtype):
    weights = {"w": log_uniform(4096, -16, 15), "none": None, "wide": jnp.ones(3)}
    params = jax.tree.map(lambda w: jnp.zeros_like(w, dtype), weights) | {"wide": jnp.ones(3)}
    before = master_weights(adam_jax.adam(1e-3), old)
    params, state = load_master_params(weights, params, before.init(params))
    kept = jax.tree.map(np.asarray, master_params(params, state))
    new_params, new_state = convert_remainder(params, state, new)
    like = master_weights(adam_jax.adam(1e-3), new).init(params)
    assert jax.tree.structure(new_state) == jax.tree.structure(like)
    assert dtypes_of(new_state) == dtypes_of(like)
    assert dtypes_of(new_params) == dtypes_of(params)
    after = jax.tree.map(np.asarray, master_params(new_params, new_state))
    if KEPT[new] >= KEPT[old]:
        chex.assert_trees_all_equal(after, kept)
        chex.assert_trees_all_equal(new_params, params)
    else:
        half = ulp(kept["w"], dtype) * 2.0 ** -(KEPT[new] + 1)
        assert np.all(np.abs(after["w"].astype(float) - kept["w"]) <= half)
        assert np.any(after["w"] != kept["w"])
    # The rest of the state is unchanged, and converting back loses nothing more.
    chex.assert_trees_all_equal(new_state.inner_state, state.inner_state)
    if KEPT[new] >= KEPT[old]:
        back = convert_remainder(new_params, new_state, old)
        chex.assert_trees_all_equal(back, (params, state))


@pytest.mark.usefixtures("standard_promotion")  # optax.apply_updates adds bfloat16 and float32
def test_a_run_moves_from_float32_to_seven_bytes_and_back():
    """Follows docs/formats.md."""
    rng = np.random.default_rng(5)
    weights = {"w": jnp.asarray(rng.standard_normal((64, 128)), jnp.float32)}
    gradients = jax.tree.map(lambda w: w + 0.5, weights)
    plain = adam_jax.adamw(1e-3)
    _, state = plain.update(gradients, plain.init(weights), weights)
    seven = master_weights(adam_jax.adamw(1e-3, mu_dtype="int8", nu_dtype="int8"), "int8")
    moments = adam_jax.convert_state(state, mu_dtype="int8", nu_dtype="int8")
    params = optax.tree.cast(weights, jnp.bfloat16)
    new = jax.jit(seven.init)(params)._replace(inner_state=moments)
    params, new = load_master_params(weights, params, new)
    params_after, new = jax.jit(take_step, static_argnums=0)(seven, params, new, gradients)
    assert dtypes_of(params_after) == dtypes_of(params)
    after = untyped(master_params(params_after, new))["w"]
    back = adam_jax.convert_state(new.inner_state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert dtypes_of(back) == dtypes_of(state)
    desired, state = take_step(plain, weights, state, gradients)
    # int8 moments miss a step of 1e-3 by some hundredths. A weight with 8 bits more than bfloat16
    # has an error of one part in 2^16, and is rounded twice.
    error = np.abs(after - desired["w"])
    assert np.all(error < 2e-4 + 2.0**-15 * np.abs(weights["w"]))
    assert back[0].count == state[0].count == 2


def take_step(optimizer, params, state, gradients) -> tuple[Any, Any]:
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def test_unknown_and_missing_remainders_are_refused():
    params = jnp.ones(3, jnp.bfloat16)
    state = master_weights(adam_jax.adam(1e-3), "int8").init(params)
    with pytest.raises(ValueError, match=r"remainder must be one of 'none', .* got 'int4'"):
        convert_remainder(params, state, "int4")
    with pytest.raises(ValueError, match="expected one master_weights state, found 0"):
        convert_remainder(params, adam_jax.adam(1e-3).init(params), "int8")


def test_impossible_formats_are_refused():
    amsgrad = adam_jax.amsgrad(0.1).init(jnp.ones(SHAPE))
    with pytest.raises(ValueError, match="nu_max is a maximum"):
        adam_jax.convert_state(amsgrad, nu_dtype="int8")
    with pytest.raises(ValueError, match="found no state of scale_by_adam"):
        adam_jax.convert_state(optax.sgd(0.1).init(jnp.ones(3)))
