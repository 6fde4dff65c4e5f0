"""The claims of Kingma and Ba (arXiv:1412.6980), one test for each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax


def answers(optimizer, gradients):
    """The update for each gradient of a sequence, whose first axis is time."""

    @jax.jit
    def run(gradients):
        def step(state, g):
            updates, state = optimizer.update(g, state)
            return state, updates

        return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)[1]

    return np.asarray(run(jnp.asarray(gradients)))


def descend(optimizer, gradient, start, inputs):
    """The parameters after each step of a run; each step's gradient sees one of the inputs."""

    @jax.jit
    def run(start, inputs):
        def step(carry, x):
            params, state = carry
            updates, state = optimizer.update(gradient(params, x), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state)

        return jax.lax.scan(step, (start, optimizer.init(start)), inputs)[1]

    return run(start, inputs)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Claim 1: rescaling the gradients changes nothing.


@pytest.mark.parametrize("k", [2.0**-20, 0.5, 2.0**30])
def test_rescaling_by_a_power_of_two_is_exact_without_eps(k):
    optimizer, g = adam_jax.scale_by_adam(eps=0.0), normal(100, 50)
    np.testing.assert_array_equal(answers(optimizer, np.float32(k) * g), answers(optimizer, g))


def test_rescaling_by_any_factor_only_rounds_without_eps():
    optimizer, g = adam_jax.scale_by_adam(eps=0.0), normal(100, 50)
    # Rounding enters each gradient (half an ulp) and shows where the momentum cancels.
    np.testing.assert_allclose(
        answers(optimizer, np.float32(1 / 3) * g), answers(optimizer, g), atol=2e-6
    )


def test_rescaling_holds_with_eps_only_while_gradients_are_larger():
    optimizer, g = adam_jax.scale_by_adam(eps=1e-8), normal(100, 50)
    g = np.sign(g) * (0.5 + np.abs(g))
    steps = answers(optimizer, g)
    np.testing.assert_allclose(answers(optimizer, np.float32(1e-2) * g), steps, atol=1e-5)
    shrunk = answers(optimizer, np.float32(1e-8) * g)
    assert np.abs(shrunk).mean() < 0.6 * np.abs(steps).mean()


# Claim 2: the bound on a step, in units of alpha.


def bound(b1, b2):
    return max(1.0, (1 - b1) / np.sqrt(1 - b2))


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.0, 0.999), (0.9, 0.9), (0.5, 0.99)])
def test_no_step_is_longer_than_the_bound(b1, b2):
    optimizer = adam_jax.scale_by_adam(b1, b2, eps=0.0)
    rng = np.random.default_rng(0)
    noise = normal(3000, 20)
    heavy = rng.standard_t(1, (3000, 20)).astype(np.float32)
    sparse = np.where(rng.random((3000, 20)) < 0.001, heavy, 0)
    growing = np.geomspace(1e-6, 1e6, 3000, dtype=np.float32)[:, None] * np.sign(noise)
    gradients = np.concatenate([noise, heavy, sparse, growing], axis=1)
    # Bias correction lets early steps exceed it by the ratio of the two corrections: the paper's
    # bound is for the uncorrected ratio, and holds once 1 - b2^t is close to 1.
    steps = np.abs(answers(optimizer, gradients))
    counts = np.arange(1, 3001)[:, None]
    corrections = np.sqrt(1 - b2**counts) / (1 - b1**counts)
    exact = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2)) if b1**2 < b2 else np.inf
    assert np.all(steps <= exact * corrections * (1 + 1e-5))  # Cauchy-Schwarz, at every step
    assert np.all(np.abs(answers(optimizer, sparse)[2000:]) <= bound(b1, b2) * 1.05)


def test_a_sparse_coordinate_steps_farther_than_alpha():
    """Zero gradients at all steps but the current one: 0.1 / sqrt(0.001) = 3.16 alpha."""
    gradients = np.zeros((20_000, 1), np.float32)
    gradients[-1] = 1e-3
    last = answers(adam_jax.adam(0.01, eps=0.0), gradients)[-1]
    np.testing.assert_allclose(last, -0.01 * 0.1 / np.sqrt(0.001), rtol=1e-5)
    assert np.abs(last) > 3.1 * 0.01


def test_a_dense_coordinate_stays_near_alpha():
    gradients = 1 + 0.1 * normal(3000, 50)
    steps = np.abs(answers(adam_jax.adam(0.01), gradients))
    assert steps.max() < 1.2 * 0.01
    np.testing.assert_allclose(steps.mean(), 0.01, rtol=0.02)


# Claim 3: no stationary objective is needed.


def test_a_moving_optimum_is_followed_where_adagrad_stalls():
    target = 5 * jnp.sin(jnp.linspace(0, 20, 4000))[:, None]

    def lag(optimizer):
        params, _ = descend(optimizer, lambda p, x: 2 * (p - x), jnp.zeros(1), target)
        return np.abs(params - target)[2000:].mean()

    assert lag(adam_jax.adam(0.1)) < 0.5
    assert lag(optax.adagrad(0.1)) > 2.0


# Claim 4: steps shrink by themselves where noise dominates.


def test_the_signal_to_noise_ratio_anneals_the_steps():
    noise = jnp.asarray(normal(3000, 100))
    optimizer = adam_jax.adam(0.01)
    start = jnp.full(100, 5.0)
    params, _ = descend(optimizer, lambda p, x: p + 0.5 * x, start, noise)
    steps = np.abs(np.diff(np.asarray(params), axis=0, prepend=start[None]))
    assert steps[:100].mean() > 0.9 * 0.01
    assert steps[-500:].mean() < 0.3 * 0.01


# Claim 5: the example of bias correction.


def test_the_bias_correction_of_one_gradient():
    optimizer = adam_jax.scale_by_adam(b1=0.2)
    g = jnp.array([10.0])
    updates, state = optimizer.update(g, optimizer.init(g))
    assert state.mu == 8.0
    assert state.mu / np.float32(1 - 0.2) == 10.0
    np.testing.assert_allclose(updates, 1.0, rtol=1e-6)


# Claim 6: without correction, the start is bad.


@pytest.mark.parametrize("b2", [0.99, 0.999, 0.9999])
@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_without_bias_correction_the_first_steps_are_too_long(b1, b2):
    g = normal(10, 200)
    corrected = answers(adam_jax.scale_by_adam(b1, b2), g)
    counts = np.arange(1, 11)[:, None]
    # m / sqrt(v) = m^ / sqrt(v^) times (1 - b1^t) / sqrt(1 - b2^t)
    uncorrected = corrected * (1 - b1**counts) / np.sqrt(1 - b2**counts)
    m = v = 0.0
    for t, gradient in enumerate(g.astype(np.float64)):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        np.testing.assert_allclose(uncorrected[t], m / np.sqrt(v), atol=2e-5 / np.sqrt(1 - b2))
    first = np.abs(uncorrected[0]).mean() / np.abs(corrected[0]).mean()
    np.testing.assert_allclose(first, (1 - b1) / np.sqrt(1 - b2), rtol=1e-5)


# Claim 7: RMSProp is Adam with b1 = 0.


def test_b1_of_zero_is_rmsprop_with_bias_correction():
    g = normal(200, 50)
    rmsprop = optax.scale_by_rms(0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True)
    with jax.numpy_dtype_promotion("standard"):
        theirs = answers(rmsprop, g)
    # optax's 1 - 0.999^t is off by up to 1.3e-5, of which the root keeps half.
    np.testing.assert_allclose(answers(adam_jax.scale_by_adam(b1=0.0), g), theirs, rtol=1e-5)


# Claim 8: AdaGrad is a limit.


def test_adagrad_is_the_limit_of_long_memory():
    g = normal(200, 50)
    adagrad = g / np.sqrt(np.cumsum(g.astype(np.float64) ** 2, axis=0))
    root_t = np.sqrt(np.arange(1, 201))[:, None]

    def distance(one_minus_b2):
        optimizer = adam_jax.scale_by_adam(b1=0.0, b2=1 - one_minus_b2, eps=0.0)
        return np.abs(answers(optimizer, g) / root_t - adagrad).max()

    distances = [distance(10.0**-k) for k in (2, 3, 4, 5)]
    for farther, nearer in itertools.pairwise(distances):
        assert nearer < 0.2 * farther
    assert distance(1e-8) < 2e-6


# Section 2.1's cheaper order of operations, with another epsilon.


def test_eps_hat_is_another_epsilon():
    g = 1e-4 * normal(20, 50)
    eps_hat, updates = 1e-6, []
    m = v = np.zeros(50)
    for t, gradient in enumerate(g.astype(np.float64), start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        alpha = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        updates.append(alpha * m / (np.sqrt(v) + eps_hat))
    state = adam_jax.scale_by_adam().init(jnp.zeros(50))
    for t, gradient in enumerate(g, start=1):
        optimizer = adam_jax.scale_by_adam(eps=eps_hat / np.sqrt(1 - 0.999**t))
        ours, state = optimizer.update(jnp.asarray(gradient), state)
        np.testing.assert_allclose(ours, updates[t - 1], atol=1e-6)
    assert np.abs(answers(adam_jax.scale_by_adam(eps=eps_hat), g) - updates).max() > 0.1


# Algorithm 2: AdaMax.


def test_adamax_hardly_steps_farther_than_alpha():
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(1, (3000, 50)).astype(np.float32)
    heavy[:, :10] = np.where(rng.random((3000, 10)) < 0.01, heavy[:, :10], 0)
    steps = np.abs(answers(adam_jax.adamax(0.002), heavy))
    # Gradients that shrink by b2 a step make the exact bound b2 (1 - b1) / (b2 - b1) = 1.009, to
    # which the paper's "alpha" is an approximation.
    assert steps.max() <= 0.002 * 0.999 * 0.1 / 0.099 * (1 + 1e-6)


def test_adamax_reaches_its_bound_on_gradients_that_shrink_with_its_memory():
    shrinking = 0.999 ** np.arange(3000.0)[:, None]
    steps = np.abs(answers(adam_jax.scale_by_adamax(eps=0.0), shrinking))
    np.testing.assert_allclose(steps[-1], 0.999 * 0.1 / 0.099, rtol=1e-4)


def test_adamax_without_any_gradient_makes_no_step():
    assert not answers(adam_jax.adamax(0.002, eps=0.0), np.zeros((10, 3), np.float32)).any()


# Section 7.2: temporal averaging.


def averaged(params, states, row):
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
    np.testing.assert_array_equal(adam_jax.averaged_params(params, state)["w"], params["w"])


def test_the_average_of_bfloat16_parameters_is_kept_in_float32():
    params = {"w": jnp.full(3, 1.0, jnp.bfloat16)}
    optimizer = adam_jax.average_params(optax.identity(), 0.999)
    state = optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update({"w": jnp.zeros(3, jnp.bfloat16)}, state, params)
    assert state.average["w"].dtype == jnp.float32
    average = adam_jax.averaged_params(params, state)["w"]
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
