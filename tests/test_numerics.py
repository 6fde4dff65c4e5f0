"""What float32 and half precision get wrong if nobody takes care: the rows of one table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import adam_jax
from adam_jax._moments import bias_correction, decay

B2 = [0.9, 0.999, 0.99999, 0.9999999]


def directions(optimizer, gradients):
    """All updates of a run on the gradients, whose first axis is time."""

    @jax.jit
    def run(gradients):
        def step(state, g):
            updates, state = optimizer.update(g, state)
            return state, updates

        return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)

    state, updates = run(gradients)
    return updates, state


@pytest.fixture(scope="module")
def gradients():
    return np.random.default_rng(0).standard_normal((2000, 400)).astype(np.float32)


def error(actual, desired):
    """The largest error, relative to the direction, or to 0.05 where that is small."""
    difference = np.abs(np.asarray(actual, np.float64) - desired)
    return np.max(difference / np.maximum(np.abs(desired), 0.05))


@pytest.mark.parametrize("b2", B2)
@pytest.mark.parametrize("b1", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("nesterov", [False, True])
def test_two_thousand_steps_agree_with_float64(b1, b2, nesterov, gradients):
    actual, _ = directions(adam_jax.scale_by_adam(b1, b2, nesterov=nesterov), gradients)
    desired = reference.trajectory(gradients, b1=b1, b2=b2, nesterov=nesterov)
    assert error(actual, desired) < 4e-6


@pytest.mark.parametrize("b2", B2)
@pytest.mark.parametrize("maximum", ["raw", "corrected"])
def test_amsgrad_agrees_with_float64(b2, maximum, gradients):
    actual, _ = directions(adam_jax.scale_by_amsgrad(b2=b2, maximum=maximum), gradients)
    desired = reference.trajectory(gradients, b2=b2, amsgrad=maximum)
    assert error(actual, desired) < 4e-6


@pytest.mark.parametrize("b2", B2)
def test_adamax_agrees_with_float64(b2, gradients):
    actual, _ = directions(adam_jax.scale_by_adamax(b2=b2), gradients)
    desired = reference.trajectory(gradients, b2=b2, infinity_norm=True)
    # u shrinks by less than its own ulp, so that a step can be wrong by half of one, 2^-24, and
    # always in the same direction, for as long as a maximum lasts: 1 / (1 - b2) steps, or all.
    assert error(actual, desired) < 4e-6 + min(1 / (1 - b2), 2000) * 2.0**-24


@pytest.mark.parametrize("b", [0.0, 0.1, 0.5, 0.9, 0.95, 0.999, 0.99999, 0.9999999])
def test_bias_correction(b):
    counts = np.unique(np.geomspace(1, 2**24, 200).astype(np.int64))
    actual = jax.jit(lambda t: bias_correction(decay(b), t))(jnp.asarray(counts, jnp.float32))
    desired = -np.expm1(counts * np.log(b)) if b else np.ones(len(counts))
    np.testing.assert_allclose(actual, desired, rtol=3e-7)


def test_bias_correction_of_a_traced_decay_is_exact_for_the_number_it_was_given():
    b = np.float32(0.99999)
    counts = np.arange(1, 2000)
    correction = jax.jit(lambda b, t: bias_correction(decay(b), t))
    actual = correction(jnp.asarray(b), jnp.asarray(counts, jnp.float32))
    # Here log b is taken in float32: half an ulp more than in `test_bias_correction`.
    desired = -np.expm1(counts * np.log(np.float64(b)))
    np.testing.assert_allclose(actual, desired, rtol=3e-7 + 2.0**-24)


def test_bias_correction_reaches_one_and_the_count_saturates():
    optimizer = adam_jax.scale_by_adam()
    last = jnp.iinfo(jnp.int32).max
    state = optimizer.init(jnp.zeros(2))._replace(count=jnp.asarray(last, jnp.int32))
    updates, state = optimizer.update(jnp.ones(2), state)
    assert state.count == last
    np.testing.assert_allclose(updates, 0.1 / np.sqrt(0.001), rtol=1e-6)


@pytest.mark.parametrize("rounded", ["bfloat16", "float16"])
def test_a_decay_that_rounded_to_one_is_read_as_the_middle_of_what_it_may_have_been(rounded):
    half_an_ulp = {"bfloat16": 2.0**-9, "float16": 2.0**-12}[rounded]
    one = jnp.asarray(1 - half_an_ulp / 4, rounded)
    assert one == 1
    np.testing.assert_allclose(decay(one).one_minus_b, half_an_ulp / 2, rtol=1e-6)
    np.testing.assert_allclose(decay(one).log_b, np.log1p(-half_an_ulp / 2), rtol=1e-6)


@pytest.mark.parametrize("g", [0.0, 1e-3, 6e-5, 100.0])
def test_float16_gradients(g):
    """In float16, eps and g^2 are 0: optax gives NaN for 0 and -inf for 1e-3."""
    gradients = np.full((5, 1), g, np.float16)
    updates, _ = directions(adam_jax.adam(1e-3), gradients)
    desired = reference.trajectory(gradients.astype(np.float64), learning_rate=1e-3)
    np.testing.assert_allclose(updates, desired, rtol=2.0**-10)


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_bfloat16_parameters_have_moments_that_do_not_stick(moment):
    """In bfloat16, nu sticks at 0.5 under a constant gradient, and mu with b1 = 0.999 too."""
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
    # v decays again, at its own pace: 2^126 (1 - b2) b2^2989.
    np.testing.assert_allclose(state.nu, 2.0**126 * 0.001 * 0.999**2989, rtol=1e-4)


@pytest.mark.parametrize("x64", [True], indirect=True, ids=["x64"])
@pytest.mark.parametrize("nu_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("masters", [False, True], ids=["plain", "master_weights"])
def test_a_huge_float64_gradient_of_moments_in_fewer_bits(masters, nu_dtype, x64):
    """It is limited as what is stored has to be."""
    optimizer = adam_jax.adam(1e-3, nu_dtype=nu_dtype)
    if masters:
        optimizer = adam_jax.master_weights(optimizer, "int8")
    params = jnp.ones((64, 64), "bfloat16" if masters else "float32")
    gradient = jnp.full((64, 64), 1e300)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(gradient, state, params)
        assert jnp.isfinite(updates).all()
        for leaf in jax.tree.leaves(state):
            assert jnp.isfinite(leaf).all()
    # All gradients have been alike, so that a step is alpha, in int8 about so.
    if not masters:
        np.testing.assert_allclose(updates, -1e-3, rtol=0.1 if nu_dtype == "int8" else 0.01)


def test_a_huge_complex_gradient_saturates(x64):
    for dtype, huge in [("complex64", 3e38), ("complex128", 1e308)][: 1 + x64]:
        gradients = jnp.asarray([[1 + 1j], [huge * (1 - 1j)], [1 + 1j]], dtype)
        updates, state = directions(adam_jax.scale_by_adam(), gradients)
        assert jnp.isfinite(updates).all()
        assert jnp.isfinite(state.nu).all()


def test_a_huge_complex_gradient_and_nu_in_int8():
    """Its magnitude is infinite in complex64, and once its parts are limited still beyond that."""
    gradient = jnp.full((64, 64), 3e38 * (1 + 1j), jnp.complex64)
    optimizer = adam_jax.scale_by_adam(nu_dtype="int8")
    state = optimizer.init(gradient)
    for _ in range(3):
        updates, state = optimizer.update(gradient, state)
        assert jnp.isfinite(updates).all()
        assert jnp.isfinite(state.nu.scales).all()
        plain = adam_jax.convert_state(state).nu
        assert jnp.all(plain <= state.nu.scales)
        np.testing.assert_allclose(plain[:, :1], state.nu.scales, rtol=0.1)  # all are alike


def test_complex_nu_is_real_and_the_squared_magnitude():
    g = jnp.array([3 + 4j, 1j], jnp.complex64)
    optimizer = adam_jax.scale_by_adam(b1=0.0, b2=0.0)
    updates, state = optimizer.update(g, optimizer.init(g))
    assert state.nu.dtype == jnp.float32
    np.testing.assert_allclose(state.nu, [25, 1], rtol=1e-6)
    np.testing.assert_allclose(updates, [0.6 + 0.8j, 1j], rtol=1e-6)


def test_the_derivative_at_a_zero_gradient_is_that_of_the_limit():
    optimizer = adam_jax.scale_by_adam(eps=1e-2)
    derivative = jax.grad(lambda g: optimizer.update(g, optimizer.init(g))[0])(0.0)
    np.testing.assert_allclose(derivative, 1e2, rtol=1e-6)  # of g / (|g| + eps)


@pytest.mark.parametrize("make", [adam_jax.adam, adam_jax.adamw])
def test_half_precision_updates_are_rounded_once(make):
    """Direction, decay and learning rate are float32, and their result is rounded: not each."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal(1000), jnp.bfloat16)
    gradients = jnp.asarray(rng.standard_normal(1000), jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (gradients, params)]
    optimizer = make(3e-4)
    state = optimizer.init(params)
    narrow_updates, _ = optimizer.update(gradients, state, params)
    wide_updates, _ = optimizer.update(wide[0], state, wide[1])
    np.testing.assert_array_equal(narrow_updates, wide_updates.astype(jnp.bfloat16))


def test_eager_updates_compile_nothing_for_new_hyperparameters(caplog):
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    others = {"w": jnp.ones((37, 41))}  # of a shape that no other test has

    def step(**settings):
        optimizer = adam_jax.adamw(**settings)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        jax.block_until_ready(updates)
        return optimizer

    optimizer = step(learning_rate=0.1, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
    state = jax.block_until_ready(optimizer.init(others))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        step(learning_rate=0.2, b1=0.0, b2=0.9, eps=1e-3, weight_decay=0.2)
        assert not caplog.records
        # The check can fail: a new shape must be compiled.
        optimizer.update(others, state, others)
    assert "Compiling" in caplog.text


def test_amsgrad_takes_the_maximum_in_either_order():
    """A first gradient that is larger than the rest tells the two orders apart."""
    gradients = np.ones((50, 1), np.float32)
    gradients[0] = 10
    runs = {
        name: directions(adam_jax.scale_by_amsgrad(maximum=name), gradients)[0]
        for name in ("raw", "corrected")
    }
    with jax.numpy_dtype_promotion("standard"):
        theirs, _ = directions(optax.scale_by_amsgrad(), gradients)
    np.testing.assert_allclose(runs["corrected"], theirs, rtol=2e-5)
    assert runs["raw"][-1] > 2 * runs["corrected"][-1]
