"""`average_params`: temporal averaging, section 7.2 of Kingma and Ba."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from low_precision import each_remainder
from trees import descend, normal, random, untyped

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


@pytest.mark.parametrize("change", ["on a schedule", "once", "traced"])
def test_an_average_follows_changes_of_its_decay(change, x64):
    """The weights of the average are the products of the decays that came after."""
    steps = 40
    decays = np.where(np.arange(steps) < 20, 0.9, 0.999)
    if change == "on a schedule":
        decays = np.minimum((np.arange(steps) + 1) / (np.arange(steps) + 11), 0.9999)
    params = jnp.asarray(normal(steps, 4))

    def step(state, at):
        decay, p = at
        optimizer = untyped(adam_jax.average_params(optax.identity(), decay))
        _, state = optimizer.update(jnp.zeros_like(p), state, p)
        return state, (untyped(adam_jax.averaged_params(p, state)), state.weight)

    state = adam_jax.average_params(optax.identity()).init(params[0])
    if change == "traced":
        _, (average, weight) = jax.lax.scan(step, state, (jnp.asarray(decays), params))
    else:
        rows = []
        for at in zip(decays.tolist(), params, strict=True):
            state, row = step(state, at)
            rows.append(row)
        average, weight = map(jnp.stack, zip(*rows, strict=True))
    for t in (1, 20, 21, steps):
        later = np.append(np.cumprod(decays[1:t][::-1])[::-1], 1)
        weights = (1 - decays[:t]) * later
        desired = np.tensordot(weights, np.asarray(params[:t], np.float64), 1) / weights.sum()
        np.testing.assert_allclose(weight[t - 1], weights.sum(), rtol=2e-6)
        np.testing.assert_allclose(average[t - 1], desired, rtol=5e-6, atol=2e-6)


def test_a_long_average_has_an_exact_weight():
    """1 - decay^t, accurate to float32. The recursion would stop 3e-5 short."""
    optimizer = adam_jax.average_params(optax.identity(), 0.999)
    p = jnp.ones(1)
    start = optimizer.init(p)
    step = lambda state, _: (optimizer.update(p, state, p)[1], state.weight)  # noqa: E731
    _, weight = jax.lax.scan(step, start, length=20_000)
    desired = -np.expm1(np.arange(20_000) * np.log(0.999))
    np.testing.assert_allclose(weight, desired, rtol=4e-7)


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


def test_the_average_of_bfloat16_parameters_is_stored_in_float32():
    params = {"w": jnp.full(3, 1.0, jnp.bfloat16)}
    optimizer = untyped(adam_jax.average_params(optax.identity(), 0.999))
    state = optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update({"w": jnp.zeros(3, jnp.bfloat16)}, state, params)
    assert state.average["w"].dtype == jnp.float32
    average = untyped(adam_jax.averaged_params(params, state))["w"]
    assert average.dtype == jnp.bfloat16
    np.testing.assert_array_equal(average, params["w"])


def test_the_average_is_found_inside_a_chain_and_its_absence_is_an_error():
    params = jnp.ones(3)
    wrapped = adam_jax.average_params(adam_jax.adam(0.1))
    state = optax.chain(optax.clip(1.0), wrapped).init(params)
    np.testing.assert_array_equal(adam_jax.averaged_params(params, state), params)
    with pytest.raises(ValueError, match="expected one average_params state, found 0"):
        adam_jax.averaged_params(params, adam_jax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="found 2"):
        adam_jax.averaged_params(params, (state, state))


class Layer(flax.struct.PyTreeNode):
    """Resembles an unfiltered Equinox module: its activation is a leaf."""

    w: Any
    activation: Any


def test_leaves_without_an_average_stay_as_they_are():
    """Such leaves are functions and members of another group."""
    model: Any = Layer(jnp.ones(3), jnp.tanh)
    gradients = start = Layer(jnp.ones(3), None)
    optimizer = untyped(adam_jax.average_params(optax.sgd(1.0), 0.5))
    state = optimizer.init(start)
    assert untyped(adam_jax.averaged_params(model, state)).activation is jnp.tanh
    _, state = optimizer.update(gradients, state, model)
    average = untyped(adam_jax.averaged_params(model, state))
    assert average.activation is jnp.tanh
    np.testing.assert_array_equal(average.w, jnp.zeros(3))
    groups: Any = {
        "averaged": adam_jax.average_params(optax.sgd(1.0)),
        "frozen": optax.set_to_zero(),
    }
    params = {"a": jnp.ones(4), "b": jnp.ones(4, jnp.bfloat16)}
    optimizer = optax.multi_transform(groups, {"a": "averaged", "b": "frozen"})
    _, state = optimizer.update(params, optimizer.init(params), params)
    average = untyped(adam_jax.averaged_params(params, state))
    np.testing.assert_array_equal(average["a"], jnp.zeros(4))
    np.testing.assert_array_equal(average["b"], params["b"])


ORDERS = {
    "inside": lambda make, **options: adam_jax.master_weights(
        adam_jax.average_params(make(), 0.9), **options
    ),
    "outside": lambda make, **options: adam_jax.average_params(
        adam_jax.master_weights(make(), **options), 0.9
    ),
}


@pytest.mark.covering
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_remainder
def test_float32_weights_are_averaged(remainder, dtype, order):
    """Averages float32 weights, not rounded parameters. Given weights, it returns float32."""
    steps, size = 40, 4096
    start = {"low": 1 + random((size,)), "wide": 1 + random((3,), seed=1)}
    params = jax.tree.map(jnp.asarray, start | {"low": start["low"].astype(dtype)})
    gradients = {"low": random((steps, size), seed=2), "wide": random((steps, 3), seed=3)}
    optimizer = ORDERS[order](lambda: optax.sgd(1e-4), remainder=remainder)
    params, state = adam_jax.load_master_params(start, params, optimizer.init(params))

    def step(at, gradient):
        params, state = at
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), untyped(adam_jax.master_params(params, state))

    (params, state), weights = jax.lax.scan(step, (params, state), gradients)
    masters = adam_jax.master_params(params, state)
    average = untyped(adam_jax.averaged_params(masters, state))
    shares = 0.1 * 0.9 ** np.arange(steps - 1, -1, -1.0) / (1 - 0.9**steps)
    for name in start:
        assert average[name].dtype == jnp.float32
        desired = np.tensordot(shares, np.asarray(weights[name], np.float64), 1)
        # Inside, weights are averaged before they are rounded to the stored bits.
        ulp = float(jnp.finfo(dtype).eps) * {"none": 1, "int8": 2.0**-8}.get(remainder, 0)
        exact = name == "wide" or order == "outside"
        np.testing.assert_allclose(average[name], desired, atol=2e-6 + (0 if exact else ulp))
    in_params = untyped(adam_jax.averaged_params(params, state))
    np.testing.assert_array_equal(in_params["low"], average["low"].astype(dtype))


CALLS = {
    "around MultiSteps": lambda: adam_jax.average_params(
        optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation(), 0.9
    ),
    "inside MultiSteps": lambda: optax.MultiSteps(
        adam_jax.average_params(optax.sgd(1.0), 0.9), 4
    ).gradient_transformation(),
    "around apply_if_finite": lambda: adam_jax.average_params(
        optax.apply_if_finite(optax.sgd(1.0), 100), 0.9
    ),
    "inside apply_if_finite": lambda: optax.apply_if_finite(
        adam_jax.average_params(optax.sgd(1.0), 0.9), 100
    ),
    "around both": lambda: adam_jax.average_params(
        optax.apply_if_finite(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), 100),
        0.9,
    ),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", CALLS)
def test_steps_of_the_optimizer_are_counted(name):
    """Counts steps, not calls: `optax.MultiSteps` makes several calls for each step."""
    optimizer = CALLS[name]()
    lost = 2 if name == "around both" else 3 if "finite" in name else 0  # of every four gradients
    gradients = jnp.where(np.arange(40) % 4 < lost, jnp.nan, jnp.ones(40))

    def step(at, gradient):
        p, state = at
        updates, state = optimizer.update(gradient, state, p)
        return (optax.apply_updates(p, updates), state), None

    p = jnp.zeros(())
    (p, state), _ = jax.lax.scan(step, (p, optimizer.init(p)), gradients)
    assert p == -10
    shares = 0.1 * 0.9 ** np.arange(9, -1, -1.0) / (1 - 0.9**10)
    average = untyped(adam_jax.averaged_params(p, state))
    np.testing.assert_allclose(average, -shares @ np.arange(1, 11), rtol=1e-6)


def test_a_step_that_is_not_finite_counts_only_if_it_is_made():
    inner = optax.apply_if_finite(optax.sgd(1.0), 1)
    optimizer = untyped(adam_jax.average_params(inner, 0.9))
    p = jnp.zeros(2)
    state = optimizer.init(p)
    gradient = jnp.array([0.0, jnp.nan])
    counts = []
    for _ in range(3):
        _, state = optimizer.update(gradient, state, p)
        counts.append(int(state.count))
    assert counts == [0, 1, 2]  # the first one is rejected


PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}


def test_averaging_needs_parameters_and_a_decay_below_one():
    optimizer = adam_jax.average_params(adam_jax.adam(0.1))
    with pytest.raises(ValueError, match="average_params needs the parameters"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        adam_jax.average_params(adam_jax.adam(0.1), decay=1.0)
