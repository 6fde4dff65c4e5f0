"""Compares whole trajectories with torch and Keras, as golden/make_golden.py recorded them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import experimental

import adam_jax

# JAX 0.7 has this under `experimental`, later versions at the top.
enable_x64 = (jax if hasattr(jax, "enable_x64") else experimental).enable_x64  # pyright: ignore[reportAttributeAccessIssue]

# The largest deviation, in units of the largest magnitude that the coordinate reaches.
#
# float64: the peers subtract b2^t from 1, with an error of up to 2^-54 / (1 - b2) = 6e-14 in v^
# for b2 = 0.999. Ours has no such error.
# float32: each of the 50 steps rounds the parameter by at most half an ulp, 2^-24 of it. The
# roundings add up where gradients repeat. The tolerance must also cover the updates' own errors;
# it would not if 1 - b2^t or 1 - b2 were computed in float32.
TOLERANCE = {"float64": 1e-13, "float32": 50 * 2.0**-24}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)
settings = pytest.mark.parametrize("setting", ["default", "other"])
torch_names = pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "adamax", "amsgrad"])
keras_names = pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad"])


def load(file: str, setting: str) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """Returns the contents, one setting's hyperparameters and its parameters after each step."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / f"{file}.json").read_text())
    chosen = golden["settings"][setting]
    return golden, chosen["hyperparameters"], np.array(chosen["params"])


def trajectory(
    optimizer_at: Callable[[Any], optax.GradientTransformation],
    golden: dict[str, Any],
    dtype: str,
) -> np.ndarray:
    """Returns the parameters after each step t = 0, 1, ... of `optimizer_at(t)`."""

    def step(carry, t_and_gradients):
        params, state = carry
        t, gradients = t_and_gradients
        updates, state = optimizer_at(t).update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    with enable_x64(dtype == "float64"):
        params = jnp.array(golden["initial"], dtype)
        gradients = jnp.array(golden["gradients"], dtype)
        carry = params, optimizer_at(0).init(params)
        _, trajectory = jax.lax.scan(step, carry, (jnp.arange(len(gradients)), gradients))
        trajectory = np.array(trajectory)
    assert trajectory.dtype == dtype
    return trajectory.astype(np.float64)


def deviation(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Returns each coordinate's deviation: one that hardly moves needs as many digits as others."""
    return np.abs(actual - expected).max(axis=0) / np.abs(expected).max(axis=0)


@dtypes
@settings
@torch_names
def test_trajectories_equal_torch(name, setting, dtype):
    golden, hyperparameters, expected = load(f"torch_{name}", setting)
    optimizer = getattr(adam_jax, name)(**hyperparameters)
    actual = trajectory(lambda t: optimizer, golden, dtype)
    np.testing.assert_array_less(deviation(actual, expected), TOLERANCE[dtype])


@dtypes
@settings
@keras_names
def test_trajectories_equal_keras_if_eps_follows_eps_hat(name, setting, dtype):
    # Keras uses the paper's cheaper order (end of section 2), which for s = sqrt(1 - b2^t) is
    #     alpha s / (1 - b1^t)  m / (sqrt(v) + eps_hat)  =  alpha m^ / (sqrt(v^) + eps_hat / s)
    # so our eps is theirs divided by s, a different number at every step.
    golden, hyperparameters, expected = load(f"keras_{name}", setting)
    t = 1 + np.arange(len(expected))
    eps = hyperparameters.pop("eps_hat") / np.sqrt(1 - hyperparameters["b2"] ** t)

    def optimizer_at(t):
        return getattr(adam_jax, name)(**hyperparameters, eps=jnp.array(eps, dtype)[t])

    actual = trajectory(optimizer_at, golden, dtype)
    np.testing.assert_array_less(deviation(actual, expected), TOLERANCE[dtype])


@settings
@keras_names
def test_trajectories_differ_from_keras_with_a_fixed_eps(name, setting):
    # On small gradients, where eps matters, the same eps makes the first steps up to
    # 1 / sqrt(1 - b2) times as long as Keras' steps: 32 times with its defaults.
    golden, hyperparameters, expected = load(f"keras_{name}", setting)
    eps = hyperparameters.pop("eps_hat")
    optimizer = getattr(adam_jax, name)(**hyperparameters, eps=eps)
    actual = trajectory(lambda t: optimizer, golden, "float64")
    assert deviation(actual, expected).max() > 0.1


@dtypes
@settings
def test_amsgrad_in_the_other_order_equals_optax(setting, dtype):
    golden, hyperparameters, raw = load("torch_amsgrad", setting)
    peer = optax.amsgrad(**hyperparameters)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        expected = trajectory(lambda t: peer, golden, "float64")
    optimizer = adam_jax.amsgrad(**hyperparameters, maximum="corrected")
    actual = trajectory(lambda t: optimizer, golden, dtype)
    np.testing.assert_array_less(deviation(actual, expected), TOLERANCE[dtype])
    assert deviation(raw, expected).max() > 0.1  # these gradients distinguish the orders
