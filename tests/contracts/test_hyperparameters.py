"""Hyperparameters may be numbers, arrays, tracers, schedules and trees, and have derivatives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import few_params_of, gradients_of, run, run_eagerly
from optimizers import each_row
from trees import assert_close, random, untyped

import adam_jax

pytestmark = [pytest.mark.covering, pytest.mark.usefixtures("small_leaves_in_int8")]


@each_row
def test_vmap_over_hyperparameters_equals_separate_runs(row):
    params = few_params_of()
    gradients = gradients_of(params, 5)
    settings = {
        "learning_rate": np.array([0.1, 0.01, 0.03]),
        "b1": np.array([0.9, 0.0, 0.5]),
        "b2": np.array([0.999, 0.9, 0.99]),
        "eps": np.array([1e-8, 1e-3, 0.0]),
    }
    settings = row.taken(settings)

    @jax.jit
    @jax.vmap
    def runs(settings):
        return run(row.make(**settings), params, gradients)[0]

    together = runs({name: jnp.asarray(x, jnp.float32) for name, x in settings.items()})
    for i in range(3):
        optimizer = row.make(**{k: float(x[i]) for k, x in settings.items()})
        alone, _ = run_eagerly(optimizer, params, gradients)
        # b2 = 0.999 as a float32 tracer changes 1 - b2 by 1e-5 of itself, the update by half that.
        tolerance = max(2e-5, row.storage_error)
        assert_close(jax.tree.map(lambda u, i=i: u[i], together), alone, tolerance)


@pytest.mark.slow
@each_row
@pytest.mark.usefixtures("standard_promotion")
def test_inject_hyperparams_works_with_bfloat16_parameters(row):
    params = few_params_of("bfloat16")
    gradients = gradients_of(params, 6)
    # Rounded to bfloat16, b2 = 0.999 becomes 1, and optax divides 0 by 0.
    rounded = optax.inject_hyperparams(row.factory)(**row.settings)
    exact = optax.inject_hyperparams(row.factory, hyperparam_dtype=jnp.float32)(**row.settings)
    desired, _ = run_eagerly(row.make(), params, gradients)
    for optimizer, tolerance in [(exact, 2.0**-7), (rounded, 0.02)]:
        updates, _ = run(optimizer, params, gradients)
        chex.assert_tree_all_finite(updates)
        chex.assert_trees_all_equal_dtypes(updates, desired)
        assert_close(updates, desired, max(tolerance, row.storage_error))


@each_row
def test_decay_rates_may_be_integers(row):
    gradients = random((2, 3, 5), "float32", 0)
    params = gradients[0]

    def updates(optimizer):
        return run_eagerly(optimizer, params, gradients)[0]

    for name in ("b1", "b2"):
        plain = updates(row.make(**{name: 0.0}))
        for zero in (0, np.int32(0), jnp.array(0), jnp.array(0, jnp.uint8)):
            chex.assert_trees_all_equal(updates(row.make(**{name: zero})), plain)
        injected = optax.inject_hyperparams(row.factory)(**row.settings | {name: 0})
        assert_close(updates(injected), plain, max(1e-6, row.storage_error))


@each_row
def test_injected_hyperparameters_can_be_changed_without_compiling_again(row):
    params = few_params_of()
    gradients = gradients_of(params)
    optimizer = untyped(optax.inject_hyperparams(row.factory)(**row.settings))
    state = optimizer.init(params)

    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return optimizer.update(gradients, state, params)

    before, _ = step(state)
    state.hyperparams["b1"] = jnp.asarray(0.5, jnp.float32)
    _, state = step(state)
    after, _ = step(state)
    assert not np.array_equal(before["kernel"], after["kernel"])
    assert len(traces) == 1


@each_row
def test_learning_rate_may_be_number_schedule_array_tracer_or_tree(row):
    params = {"a": random((3, 4), "float32", 0), "b": {"c": random((5,), "float32", 1)}}
    gradients = gradients_of(params, 4)

    def jitted(learning_rate):
        return run(row.make(learning_rate=learning_rate), params, gradients)[0]

    def updates(learning_rate):
        return run_eagerly(row.make(learning_rate=learning_rate), params, gradients)[0]

    plain = updates(0.02)
    rates = [jnp.float32(0.02), np.float32(0.02), lambda count: 0.02, {"a": 0.02, "b": 0.02}]
    rates += [{"a": lambda count: 0.02, "b": {"c": jnp.float32(0.02)}}]
    for rate in rates:
        chex.assert_trees_all_close(updates(rate), plain, rtol=1e-6)
    traced = jax.jit(jitted)(jnp.float32(0.02))
    chex.assert_trees_all_close(traced, jitted(0.02), rtol=1e-6)
    if row.takes("learning_rate"):
        factor = {"a": 1.0, "b": {"c": 0.5}}
        half = updates({"a": 0.02, "b": 0.01})
        if not row.takes("weight_decay"):  # with decay the gradients of later steps differ
            desired = jax.tree.map(lambda u, f: u * f, plain, factor)
            chex.assert_trees_all_close(half, desired, rtol=1e-6)
        first = updates(lambda count: jnp.where(count == 0, 0.0, 0.02))
        assert not jnp.any(first["a"][0])
        assert jnp.all(first["a"][1:] != 0)


@each_row
@pytest.mark.parametrize(
    "x64", [pytest.param(False, marks=pytest.mark.full), True], indirect=True, ids=["x32", "x64"]
)
def test_derivatives_through_ten_steps_are_finite_and_correct(row, x64):
    """Derivatives of a run are finite where a gradient is 0, and correct elsewhere."""
    dtype = jnp.float64 if x64 else jnp.float32
    g = np.array([0.0, 1.0, -0.3, 0.02])

    @jax.jit
    def final(scale):
        growth = jnp.linspace(1, 2, 10, dtype=dtype)
        gradients = jnp.outer(growth, jnp.asarray(g, dtype) * scale)
        updates, _ = run(row.make(eps=1e-2), jnp.ones(4, dtype), gradients)
        return updates.sum(axis=0)

    scale = jnp.ones(4, dtype)
    derivative = jax.jacrev(final)(scale)
    assert jnp.isfinite(derivative).all()
    chex.assert_trees_all_close(derivative, jax.jacfwd(final)(scale), rtol=1e-4, atol=1e-6)
    if x64 and not row.stochastic:
        step = 1e-6
        for i in range(4):
            up, down = (final(scale.at[i].add(s)) for s in (step, -step))
            difference = (up - down) / (2 * step)
            np.testing.assert_allclose(derivative[:, i], difference, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@each_row
@pytest.mark.parametrize("x64", [True], indirect=True, ids=["x64"])
def test_derivatives_by_hyperparameters_are_correct(row, x64):
    gradients = jnp.asarray(random((10, 4), "float64", 3))

    @jax.jit
    def final(b1, b2):
        updates, _ = run(row.make(b1=b1, b2=b2), jnp.ones(4), gradients)
        return updates.sum()

    for b1, b2 in [(0.9, 0.999), (0.3, 0.4)] if not row.stochastic else []:
        derivatives = jax.grad(final, argnums=(0, 1))(b1, b2)
        step = 1e-6
        differences = (
            (final(b1 + step, b2) - final(b1 - step, b2)) / (2 * step),
            (final(b1, b2 + step) - final(b1, b2 - step)) / (2 * step),
        )
        np.testing.assert_allclose(derivatives, differences, rtol=2e-5, atol=1e-9)
    assert np.isfinite(jax.grad(final, argnums=(0, 1))(0.0, 0.5)).all()


def test_inject_hyperparams_accepts_a_mask_function():
    """Needs `static_args`: otherwise optax would treat the mask as a schedule."""
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    injected = optax.inject_hyperparams(adam_jax.adamw, static_args="mask")
    optimizer = injected(0.1, weight_decay=0.5, mask=mask)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    updates = untyped(updates)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    assert not updates["bias"].any()
