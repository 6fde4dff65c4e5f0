"""Adam against float64, at the edges of the number range, and the claims of its paper.

Kingma and Ba make the claims in arXiv:1412.6980.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from trees import descend, directions, largest_error, normal, untyped

import adam_jax

B2 = [0.9, 0.999, 0.99999, 0.9999999]


@pytest.fixture(scope="module")
def gradients():
    return normal(2000, 400)


@pytest.mark.covering
@pytest.mark.parametrize("b2", B2)
@pytest.mark.parametrize("b1", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("nesterov", [False, True])
def test_two_thousand_steps_agree_with_float64(b1, b2, nesterov, gradients):
    actual, _ = directions(adam_jax.scale_by_adam(b1, b2, nesterov=nesterov), gradients)
    desired = reference.trajectory(gradients, b1=b1, b2=b2, nesterov=nesterov)
    assert largest_error(actual, desired) < 4e-6


@pytest.mark.slow
@pytest.mark.parametrize("b2", [0.9, 0.999, 0.9999999])
def test_adam_is_as_accurate_as_the_readme_claims(b2):
    """Runs 40,000 coordinates; the other settings have their defaults."""
    rng = np.random.default_rng(1)
    optimizer = untyped(adam_jax.scale_by_adam(b2=b2, eps=0.0))
    update, state = jax.jit(optimizer.update), optimizer.init(jnp.zeros(40_000))
    m = v = np.zeros(40_000)
    for t in range(1, 2001):
        g = rng.standard_normal(40_000, np.float32)
        actual, state = update(g, state)
        m, v = m + 0.1 * (g - m), v + (1 - b2) * (np.square(g, dtype=np.float64) - v)
        desired = m / -np.expm1(t * np.log(0.9)) / np.sqrt(v / -np.expm1(t * np.log(b2)))
        assert largest_error(actual, desired) < 3e-6


def test_bias_correction_reaches_one_and_the_count_saturates():
    optimizer = untyped(adam_jax.scale_by_adam())
    last = jnp.iinfo(jnp.int32).max
    state = optimizer.init(jnp.zeros(2))._replace(count=jnp.asarray(last, jnp.int32))
    updates, state = optimizer.update(jnp.ones(2), state)
    assert state.count == last
    np.testing.assert_allclose(updates, 0.1 / np.sqrt(0.001), rtol=1e-6)


@pytest.mark.parametrize("g", [0.0, 1e-3, 6e-5, 100.0])
def test_float16_gradients_give_finite_steps(g):
    """In float16, eps and g^2 are 0: optax gives NaN for 0 and -inf for 1e-3."""
    gradients = np.full((5, 1), g, np.float16)
    updates, _ = directions(adam_jax.adam(1e-3), gradients)
    desired = reference.trajectory(gradients.astype(np.float64), learning_rate=1e-3)
    np.testing.assert_allclose(updates, desired, rtol=2.0**-10)


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_moments_of_bfloat16_parameters_do_not_stick(moment):
    """In bfloat16, a constant gradient would leave nu stuck at 0.5, and mu too at b1 = 0.999."""
    optimizer = adam_jax.scale_by_adam(b1=0.999)
    _, state = directions(optimizer, jnp.ones((20_000, 1), jnp.bfloat16))
    np.testing.assert_allclose(getattr(state, moment), 1.0, rtol=1e-4)
    _, state = jax.lax.scan(
        lambda s, g: (optimizer.update(g, s)[1], None),
        state,
        jnp.zeros((20_000, 1), jnp.bfloat16),
    )[::-1]
    assert jnp.all(getattr(state, moment) < 1e-7)


@pytest.mark.parametrize("g", [1e20, -3e38, 2.0**127])
def test_one_huge_gradient_saturates_and_is_forgotten(g):
    gradients = np.ones((3000, 1), np.float32)
    gradients[10] = g
    updates, state = directions(adam_jax.scale_by_adam(), gradients)
    assert np.isfinite(updates).all()
    assert np.abs(updates).max() <= 0.1 / np.sqrt(0.001)
    # Afterwards nu decays as usual, to 2^126 (1 - b2) b2^2989.
    np.testing.assert_allclose(state.nu, 2.0**126 * 0.001 * 0.999**2989, rtol=1e-4)


@pytest.mark.covering
@pytest.mark.parametrize("x64", [True], indirect=True, ids=["x64"])
@pytest.mark.parametrize("nu_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("masters", [False, True], ids=["plain", "master_weights"])
def test_a_huge_float64_gradient_stays_finite_in_narrow_moments(masters, nu_dtype, x64):
    """The gradient is limited to the range of the stored moments."""
    plain = adam_jax.adam(1e-3, nu_dtype=nu_dtype)
    optimizer = untyped(adam_jax.master_weights(plain, "int8") if masters else plain)
    params = jnp.ones((64, 64), "bfloat16" if masters else "float32")
    gradient = jnp.full((64, 64), 1e300)
    updates, state = gradient, optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(gradient, state, params)
        assert jnp.isfinite(updates).all()
        for leaf in jax.tree.leaves(state):
            assert jnp.isfinite(leaf).all()
    # All gradients are equal, so a step is alpha, in int8 approximately.
    if not masters:
        np.testing.assert_allclose(updates, -1e-3, rtol=0.1 if nu_dtype == "int8" else 0.01)


@pytest.mark.parametrize("conjugated", [True, False])
def test_complex_gradients_have_to_be_conjugated(conjugated):
    """With complex parameters, the loss falls only if gradients are conjugated."""
    target = jnp.array([1 + 2j, -1j, 3 + 0j], jnp.complex64)
    optimizer = untyped(adam_jax.adam(0.05))

    def step(at, _):
        z, state = at
        gradient = jax.grad(lambda z: jnp.sum(jnp.abs(z - target) ** 2))(z)
        gradient = jnp.conj(gradient) if conjugated else gradient
        updates, state = optimizer.update(gradient, state, z)
        return (optax.apply_updates(z, updates), state), None

    start = jnp.zeros(3, jnp.complex64)
    (z, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=400)
    distance = jnp.abs(untyped(z) - target)
    if conjugated:
        assert jnp.all(distance < 0.01)
    else:
        assert distance[0] > 1


def test_a_huge_complex_gradient_saturates(x64):
    for dtype, huge in [("complex64", 3e38), ("complex128", 1e308)][: 1 + x64]:
        gradients = jnp.asarray([[1 + 1j], [huge * (1 - 1j)], [1 + 1j]], dtype)
        updates, state = directions(adam_jax.scale_by_adam(), gradients)
        assert jnp.isfinite(updates).all()
        assert jnp.isfinite(state.nu).all()


def test_a_huge_complex_gradient_saturates_with_nu_in_int8():
    """Its magnitude is infinite in complex64, and still too large once its parts are limited."""
    gradient = jnp.full((64, 64), 3e38 * (1 + 1j), jnp.complex64)
    optimizer = untyped(adam_jax.scale_by_adam(nu_dtype="int8"))
    state = optimizer.init(gradient)
    for _ in range(3):
        updates, state = optimizer.update(gradient, state)
        assert jnp.isfinite(updates).all()
        assert jnp.isfinite(state.nu.scales).all()
        plain = adam_jax.convert_state(state).nu
        assert jnp.all(plain <= state.nu.scales)
        np.testing.assert_allclose(plain[:, :1], state.nu.scales, rtol=0.1)  # all are equal


def test_nu_of_complex_gradients_is_their_squared_magnitude():
    g = jnp.array([3 + 4j, 1j], jnp.complex64)
    optimizer = untyped(adam_jax.scale_by_adam(b1=0.0, b2=0.0))
    updates, state = optimizer.update(g, optimizer.init(g))
    assert state.nu.dtype == jnp.float32
    np.testing.assert_allclose(state.nu, [25, 1], rtol=1e-6)
    np.testing.assert_allclose(updates, [0.6 + 0.8j, 1j], rtol=1e-6)


def test_the_derivative_at_a_zero_gradient_equals_its_limit():
    optimizer = adam_jax.scale_by_adam(eps=1e-2)
    derivative = jax.grad(lambda g: optimizer.update(g, optimizer.init(g))[0])(0.0)
    np.testing.assert_allclose(derivative, 1e2, rtol=1e-6)  # derivative of g / (|g| + eps)


# Claim 1: rescaling the gradients changes nothing.


@pytest.mark.parametrize("k", [2.0**-20, 0.5, 2.0**30])
def test_rescaling_by_a_power_of_two_is_exact_without_eps(k):
    optimizer, g = adam_jax.scale_by_adam(eps=0.0), normal(100, 50)
    np.testing.assert_array_equal(
        directions(optimizer, np.float32(k) * g)[0], directions(optimizer, g)[0]
    )


def test_rescaling_by_any_factor_changes_only_rounding_without_eps():
    optimizer, g = adam_jax.scale_by_adam(eps=0.0), normal(100, 50)
    # Each gradient is rounded (half an ulp), which shows where the momentum cancels.
    np.testing.assert_allclose(
        directions(optimizer, np.float32(1 / 3) * g)[0], directions(optimizer, g)[0], atol=2e-6
    )


def test_rescaling_with_eps_changes_only_steps_of_small_gradients():
    optimizer, g = adam_jax.scale_by_adam(eps=1e-8), normal(100, 50)
    g = np.sign(g) * (0.5 + np.abs(g))
    steps = directions(optimizer, g)[0]
    np.testing.assert_allclose(directions(optimizer, np.float32(1e-2) * g)[0], steps, atol=1e-5)
    shrunk = directions(optimizer, np.float32(1e-8) * g)[0]
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
    steps = np.abs(directions(optimizer, gradients)[0])
    counts = np.arange(1, 3001)[:, None]
    corrections = np.sqrt(1 - b2**counts) / (1 - b1**counts)
    exact = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2)) if b1**2 < b2 else np.inf
    assert np.all(steps <= exact * corrections * (1 + 1e-5))  # Cauchy-Schwarz, at every step
    assert np.all(np.abs(directions(optimizer, sparse)[0][2000:]) <= bound(b1, b2) * 1.05)


def test_a_sparse_coordinate_steps_farther_than_alpha():
    """Zero gradients at all steps but the current one: 0.1 / sqrt(0.001) = 3.16 alpha."""
    gradients = np.zeros((20_000, 1), np.float32)
    gradients[-1] = 1e-3
    last = directions(adam_jax.adam(0.01, eps=0.0), gradients)[0][-1]
    np.testing.assert_allclose(last, -0.01 * 0.1 / np.sqrt(0.001), rtol=1e-5)
    assert np.abs(last) > 3.1 * 0.01


def test_a_dense_coordinate_stays_near_alpha():
    gradients = 1 + 0.1 * normal(3000, 50)
    steps = np.abs(directions(adam_jax.adam(0.01), gradients)[0])
    assert steps.max() < 1.2 * 0.01
    np.testing.assert_allclose(steps.mean(), 0.01, rtol=0.02)


# Claim 3: the objective may be non-stationary.


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


def test_bias_correction_removes_the_bias_of_a_single_gradient():
    optimizer = untyped(adam_jax.scale_by_adam(b1=0.2))
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
    corrected = directions(adam_jax.scale_by_adam(b1, b2), g)[0]
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
        theirs = directions(rmsprop, g)[0]
    # optax's 1 - 0.999^t is off by up to 1.3e-5, of which the root keeps half.
    np.testing.assert_allclose(directions(adam_jax.scale_by_adam(b1=0.0), g)[0], theirs, rtol=1e-5)


# Claim 8: AdaGrad is a limit.


def test_adagrad_is_the_limit_of_long_memory():
    g = normal(200, 50)
    adagrad = g / np.sqrt(np.cumsum(g.astype(np.float64) ** 2, axis=0))
    root_t = np.sqrt(np.arange(1, 201))[:, None]

    def distance(one_minus_b2):
        optimizer = adam_jax.scale_by_adam(b1=0.0, b2=1 - one_minus_b2, eps=0.0)
        return np.abs(directions(optimizer, g)[0] / root_t - adagrad).max()

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
        optimizer = untyped(adam_jax.scale_by_adam(eps=eps_hat / np.sqrt(1 - 0.999**t)))
        ours, state = optimizer.update(jnp.asarray(gradient), state)
        np.testing.assert_allclose(ours, updates[t - 1], atol=1e-6)
    assert np.abs(directions(adam_jax.scale_by_adam(eps=eps_hat), g)[0] - updates).max() > 0.1
