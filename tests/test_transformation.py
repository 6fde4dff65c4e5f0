"""Everything around one leaf's step: rates, decay, masks, one rounding, compilation."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from trees import untyped

import adam_jax


@pytest.mark.parametrize("make", [adam_jax.adam, adam_jax.adamw])
def test_half_precision_updates_are_rounded_once(make):
    """Direction, decay and learning rate are float32, and only their result is rounded."""
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
    others = {"w": jnp.ones((37, 41))}  # no other test has this shape

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


PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}


def update(optimizer, gradients, params=PARAMS) -> Any:
    return optimizer.update(gradients, optimizer.init(params), params)


@pytest.mark.parametrize("as_function", [False, True])
def test_the_mask_selects_the_leaves_that_decay(as_function):
    mask = {"dense": {"kernel": True, "bias": False}}
    given = (lambda _: mask) if as_function else mask
    updates, state = update(adam_jax.adamw(0.1, weight_decay=0.5, mask=given), PARAMS)
    decayed, _ = update(adam_jax.adamw(0.1, weight_decay=0.5), PARAMS)
    plain, _ = update(adam_jax.adam(0.1), PARAMS)
    np.testing.assert_array_equal(updates["dense"]["kernel"], decayed["dense"]["kernel"])
    np.testing.assert_array_equal(updates["dense"]["bias"], plain["dense"]["bias"])
    theirs = optax.adamw(0.1, mask=mask).init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(theirs)


class CallableInFlax(flax.struct.PyTreeNode):
    w: Any

    def __call__(self):
        raise AssertionError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CallableDataclass:
    """Resembles a module of Equinox."""

    w: Any

    def __call__(self):
        raise AssertionError


@pytest.mark.parametrize("module", [CallableInFlax, CallableDataclass])
def test_a_callable_tree_is_treated_as_a_tree(module):
    params, frozen = module(jnp.ones(3)), module(jnp.zeros(3))
    for mask in (module(True), lambda _: module(True), functools.partial(lambda _: module(True))):
        optimizer = adam_jax.adamw(0.1, weight_decay=0.5, mask=mask)
        np.testing.assert_allclose(update(optimizer, frozen, params)[0].w, -0.05, rtol=1e-6)
    by_count = jax.tree_util.Partial(lambda count: 0.1)
    for rate in (module(0.1), module(by_count), by_count, functools.partial(by_count)):
        np.testing.assert_allclose(
            update(adam_jax.adam(rate), params, params)[0].w, -0.1, rtol=1e-6
        )
        optimizer = adam_jax.adamw(1.0, weight_decay=rate)
        np.testing.assert_allclose(update(optimizer, frozen, params)[0].w, -0.1, rtol=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Closure:
    """A function as Optimistix makes it: the values it encloses are leaves."""

    function: Any
    contents: Any

    def __call__(self, argument):
        return self.function(argument, *self.contents)


def test_a_function_with_leaves_is_treated_as_a_function():
    params = {"a": jnp.ones(3)}
    half = Closure(lambda count, rate: rate / 2, (0.2,))
    for optimizer in (adam_jax.adam(half), adam_jax.adam({"a": half})):
        np.testing.assert_allclose(update(optimizer, params, params)[0]["a"], -0.1, rtol=1e-6)
    mask = Closure(lambda params, decays: decays, (True,))
    optimizer = adam_jax.adamw(1.0, weight_decay=half, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(update(optimizer, zeros, params)[0]["a"], -0.1, rtol=1e-6)


def test_weight_decay_may_be_a_tree():
    """The tree may contain schedules, be masked, and be a prefix of the parameters."""
    decay = {"dense": {"kernel": optax.linear_schedule(0.1, 0.2, 1), "bias": 0.2}, "head": 0.4}
    params = {**PARAMS, "head": [jnp.ones(3), jnp.ones(3)]}
    mask = {"dense": True, "head": [True, False]}
    optimizer = untyped(adam_jax.adamw(1.0, weight_decay=decay, mask=mask))
    state, zeros = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    for kernel in (-0.1, -0.2):
        updates, state = optimizer.update(zeros, state, params)
        expected = [-0.2, kernel, -0.4, 0.0]  # bias, kernel and both heads
        for actual, desired in zip(jax.tree.leaves(updates), expected, strict=True):
            np.testing.assert_allclose(actual, desired, rtol=1e-6)
    with pytest.raises(ValueError, match="weight_decay must be one value or a tree prefix"):
        update(adam_jax.adamw(0.1, weight_decay={"conv": 0.1}), PARAMS)


def test_a_tree_of_rates_in_another_container_is_refused():
    """Flax NNX keeps parameters in such a container, a State."""
    rates = {"dense": 0.1}
    params = nnx.State(PARAMS)
    with pytest.raises(ValueError, match="in a State, but learning_rate is in a dict: use a State"):
        update(adam_jax.adam(rates), params, params)
    update(adam_jax.adam(nnx.State(rates)), params, params)


def test_weight_decay_may_follow_a_schedule():
    schedule = lambda count: 0.5 * jnp.asarray(count, float)  # noqa: E731
    optimizer = untyped(adam_jax.adamw(0.1, weight_decay=schedule))
    state = optimizer.init(PARAMS)
    first, state = optimizer.update(PARAMS, state, PARAMS)
    second, _ = optimizer.update(PARAMS, state, PARAMS)
    difference = np.asarray(second["dense"]["bias"] - first["dense"]["bias"])
    np.testing.assert_allclose(difference, -0.1 * 0.5, rtol=1e-5)


def test_a_mask_function_leaves_frozen_parameters_alone():
    """For a parameter that is None, the mask is None."""
    params = {"a": jnp.ones(3), "frozen": None}
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 0, params)  # noqa: E731
    optimizer = untyped(adam_jax.adamw(0.1, mask=mask))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates["frozen"] is None
    assert jnp.all(updates["a"] < 0)


def test_learning_rates_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="learning_rate must be one value or a tree prefix"):
        update(adam_jax.adam({"conv": 0.1}), PARAMS)


def test_a_leaf_without_a_learning_rate_is_refused():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    optimizer = adam_jax.adam({"a": 0.1, "b": None})
    with pytest.raises(ValueError, match=r"learning_rate is None at \['b'\]"):
        optimizer.update(params, optimizer.init(params), params)
