"""`average_params`: temporal averaging, section 7.2 of Kingma and Ba."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import descend, normal, untyped

import adam_jax

# Section 7.2: temporal averaging.


def averaged(params, states, row) -> Any:
    return adam_jax.averaged_params(params[row], jax.tree.map(lambda x: x[row], states))


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_the_average_is_the_weighted_mean_of_the_parameters(decay):
    noise = jnp.asarray(normal(50, 4))
    optimizer = adam_jax.average_params(adam_jax.adam(0.1), decay)
    params, states = descend(optimizer, lambda p, x: p + x, jnp.ones(4), noise)
    for t in (1, 2, 50):
        weights = (1 - decay) * np.power(decay, np.arange(t - 1, -1, -1.0))
        desired = np.tensordot(weights, np.asarray(params[:t], np.float64), 1) / weights.sum()
        np.testing.assert_allclose(averaged(params, states, t - 1), desired, rtol=2e-6, atol=1e-6)


def test_the_average_is_nearer_to_the_optimum_than_the_parameters():
    noise = jnp.asarray(normal(4000, 100))
    optimizer = adam_jax.average_params(adam_jax.adam(0.05), 0.99)
    params, states = descend(optimizer, lambda p, x: p + x, jnp.ones(100), noise)
    assert np.abs(averaged(params, states, -1)).mean() < 0.6 * np.abs(params[-1]).mean()


def test_before_the_first_step_the_average_is_the_parameters():
    params = {"w": jnp.ones(3), "none": None}
    state = adam_jax.average_params(adam_jax.adam(0.1)).init(params)
    average = untyped(adam_jax.averaged_params(params, state))
    np.testing.assert_array_equal(average["w"], params["w"])


def test_the_average_of_bfloat16_parameters_is_kept_in_float32():
    params = {"w": jnp.full(3, 1.0, jnp.bfloat16)}
    optimizer = untyped(adam_jax.average_params(optax.identity(), 0.999))
    state = optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update({"w": jnp.zeros(3, jnp.bfloat16)}, state, params)
    assert state.average["w"].dtype == jnp.float32
    average = untyped(adam_jax.averaged_params(params, state))["w"]
    assert average.dtype == jnp.bfloat16
    np.testing.assert_array_equal(average, params["w"])


def test_the_average_is_found_inside_a_chain_and_missed_where_there_is_none():
    params = jnp.ones(3)
    wrapped = adam_jax.average_params(adam_jax.adam(0.1))
    state = optax.chain(optax.clip(1.0), wrapped).init(params)
    np.testing.assert_array_equal(adam_jax.averaged_params(params, state), params)
    with pytest.raises(ValueError, match="expected one average_params state, found 0"):
        adam_jax.averaged_params(params, adam_jax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="found 2"):
        adam_jax.averaged_params(params, (state, state))


PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}


def test_averaging_without_parameters():
    optimizer = adam_jax.average_params(adam_jax.adam(0.1))
    with pytest.raises(ValueError, match="average_params needs the parameters"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        adam_jax.average_params(adam_jax.adam(0.1), decay=1.0)
