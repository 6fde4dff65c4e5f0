"""Callers' mistakes: each error names what is wrong, where, and what to do."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import ROWS, each_row
from trees import untyped

import adam_jax

PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}


def update(optimizer, gradients, params=PARAMS):
    return optimizer.update(gradients, optimizer.init(params), params)


def with_kernel(kernel):
    return {"dense": {"kernel": kernel, "bias": jnp.ones(3)}}


@each_row
@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan"), np.float32(1), np.array(2.0)])
@pytest.mark.parametrize("name", ["b1", "b2"])
def test_decay_rates_out_of_range_are_refused(row, name, value):
    message = rf"{name} must be in \[0, 1\), got {re.escape(str(value))}"
    with pytest.raises(ValueError, match=message):
        row.make(**{name: value})


@each_row
@pytest.mark.parametrize("value", [-1e-8, float("inf"), float("nan"), 1e39])
@pytest.mark.parametrize("name", ["eps", "eps_root"])
def test_negative_or_infinite_eps_is_refused(row, name, value):
    make = functools.partial(row.make, **{name: value})
    if row.takes(name):
        with pytest.raises(
            ValueError,
            match=f"{name} must be non-negative and finite in float32, got {re.escape(str(value))}",
        ):
            make()


def test_concrete_arrays_are_checked_and_tracers_are_not():
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\), got 1.5"):
        adam_jax.adam(0.1, b2=jnp.float32(1.5))
    # An array that is known during tracing is no tracer, but everything computed from it is.
    b2, eps = jnp.float32(0.9), jnp.bfloat16(1e-8)
    jax.jit(lambda g: update(adam_jax.adam(0.1, b2=b2, eps=eps), g)[0])(PARAMS)
    b2 = jnp.float32(1.5)
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\), got 1.5"):
        jax.jit(lambda g: update(adam_jax.adam(0.1, b2=b2), g)[0])(PARAMS)
    jax.jit(lambda b2: update(adam_jax.adam(0.1, b2=b2), PARAMS)[0])(1.5)


def test_hyperparameters_must_be_scalars():
    with pytest.raises(ValueError, match=r"b1 must be a scalar, got shape \(2,\).*jax\.vmap"):
        adam_jax.adam(0.1, b1=jnp.array([0.9, 0.8]))
    with pytest.raises(TypeError, match="eps must be a number, got 'small'"):
        adam_jax.adam(0.1, eps="small")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_rates_must_be_scalars(name):
    """A rate of another shape would broadcast, and with it the parameters."""

    def make(value: Any):
        return adam_jax.adamw(**{"learning_rate": 0.1, name: value})

    for value in (jnp.array([0.1]), np.ones((3, 1)), {"dense": jnp.ones(3)}):
        with pytest.raises(ValueError, match=rf"^{name}.* must be a scalar, got shape .*vmap"):
            make(value)
    for schedule in (lambda count: jnp.ones(1), {"dense": lambda count: jnp.ones((2, 3))}):
        optimizer = make(schedule)
        message = rf"^the schedule {name}.* must be a scalar, got shape"
        with pytest.raises(ValueError, match=message):
            update(optimizer, PARAMS)
        with pytest.raises(ValueError, match=message):
            jax.jit(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS)


def test_rates_of_the_wrong_type_are_refused():
    with pytest.raises(TypeError, match="learning_rate must be a number or a schedule, got 'fast'"):
        adam_jax.adam("fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"learning_rate\['a'\] must be a number or a schedule"):
        adam_jax.adam({"a": "fast"})
    with pytest.raises(TypeError, match="weight_decay must be a number or a schedule"):
        adam_jax.adamw(0.1, weight_decay="strong")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
@pytest.mark.parametrize("value", ["int4", jnp.int32, "nonsense", 7, jnp.float16])
def test_unknown_storage_formats_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be None or one of 'float32'.*got"):
        adam_jax.adam(0.1, **{name: value})


@pytest.mark.parametrize("value", [None, "float32", jnp.float32, np.dtype("float32")])
def test_known_storage_formats_are_accepted(value, x64):
    optimizer = untyped(adam_jax.scale_by_adam(mu_dtype=value, nu_dtype=value))
    wide = jnp.float64 if x64 and value is None else jnp.float32
    state = optimizer.init(jnp.ones(3, jnp.float64 if x64 else jnp.float32))
    assert state.mu.dtype == state.nu.dtype == wide


@each_row
@pytest.mark.parametrize("kind", ["int32", "bool", "float0"])
def test_integer_gradients_are_refused(row, kind):
    dtype = jax.dtypes.float0 if kind == "float0" else kind
    gradients = with_kernel(np.zeros((2, 3), dtype))
    message = r"gradient \['dense'\]\['kernel'\] has dtype .*optax\.masked"
    with pytest.raises(TypeError, match=message):
        update(row.make(), gradients)


@each_row
def test_integer_parameters_are_refused(row):
    message = r"parameter \['dense'\]\['kernel'\] has dtype int32.*optax\.masked"
    with pytest.raises(TypeError, match=message):
        row.make().init(with_kernel(jnp.ones((2, 3), jnp.int32)))


@each_row
@pytest.mark.parametrize(
    ("leaf", "detail"),
    [
        (jax.nn.relu, "is a .* and no array.*equinox.filter"),
        ("float32", "is a str and no array"),
        (jnp.ones(3, jnp.float8_e4m3fn), "has dtype float8_e4m3fn; only .* of 16 bits or more"),
        (jax.random.key(0), "has dtype key<fry>; only real and complex"),
    ],
)
def test_leaves_that_are_no_parameters_are_refused(row, leaf, detail):
    with pytest.raises(TypeError, match=rf"parameter \['dense'\]\['kernel'\] {detail}"):
        row.make().init(with_kernel(leaf))


@each_row
def test_gradients_of_another_shape_are_refused(row):
    message = r"gradient \['dense'\]\['kernel'\] has shape \(3, 2\), but state\.mu .* \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        update(row.make(), with_kernel(jnp.ones((3, 2))))


@each_row
@pytest.mark.parametrize(
    ("gradients", "detail"),
    [
        ({"dense": {"kernel": jnp.ones((2, 3))}}, r"\['dense'\]\['bias'\] is only in state\.mu"),
        ({"conv": PARAMS["dense"]}, r"\['conv'\]\['bias'\] is missing in state\.mu"),
        (jnp.ones(3), "state.mu there is dict"),
    ],
)
def test_gradients_of_another_structure_are_refused(row, gradients, detail):
    with pytest.raises(ValueError, match=f"{detail}.*the parameters|{detail}.*those parameters"):
        update(row.make(), gradients)


@each_row
def test_a_gradient_for_a_parameter_that_was_none_is_refused(row):
    params = with_kernel(None)
    message = r"gradient \['dense'\]\['kernel'\] is an array, but state\.mu there is NoneType"
    with pytest.raises(ValueError, match=message):
        update(row.make(), PARAMS, params)


@each_row
def test_complex_gradients_of_real_parameters_are_refused(row):
    message = r"gradient \['dense'\]\['kernel'\] has dtype complex64, but state\.mu .*float"
    with pytest.raises(TypeError, match=message):
        update(row.make(), with_kernel(jnp.ones((2, 3), jnp.complex64)))


def test_a_mask_of_elements_is_refused():
    mask = {"dense": {"kernel": True, "bias": jnp.array([True, False, True])}}
    with pytest.raises(ValueError, match=r"mask has shape \(3,\) at \['dense'\]\['bias'\].*bool"):
        update(adam_jax.adamw(0.1, mask=mask), PARAMS)


@pytest.mark.parametrize("name", ["adamw", "nadamw", "adamaxw"])
def test_weight_decay_needs_parameters(name):
    optimizer = getattr(adam_jax, name)(0.1)
    with pytest.raises(ValueError, match=r"weight decay needs the parameters: call update\(grad"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))


@pytest.mark.parametrize("name", ["adamw", "nadamw", "adamaxw"])
def test_weight_decay_refuses_parameters_of_another_shape(name):
    """Such parameters would broadcast, and so would the update."""
    optimizer = getattr(adam_jax, name)(0.1)
    state = optimizer.init(PARAMS)
    message = r"gradient \['dense'\]\['kernel'\] has shape \(2, 3\), but the parameter .* \(1, 3\)"
    with pytest.raises(ValueError, match=message):
        optimizer.update(PARAMS, state, with_kernel(jnp.ones((1, 3))))


@pytest.mark.parametrize(
    ("gradient", "error", "detail"),
    [
        (jnp.ones((2, 3), int), TypeError, "has dtype int32; only real and complex"),
        (jnp.ones((2, 3), bool), TypeError, "has dtype bool; only real and complex"),
        (jnp.ones((2, 3), complex), TypeError, "has dtype complex64, but the parameter there has"),
        (jnp.ones((1, 3)), ValueError, r"has shape \(1, 3\), but the parameter there has shape"),
    ],
)
def test_wrong_gradients_of_16_bit_parameters_are_not_cast(gradient, error, detail):
    params = optax.tree.cast(PARAMS, jnp.bfloat16)
    optimizer = adam_jax.master_weights(optax.sgd(0.1), "int8")  # which would accept any of them
    with pytest.raises(error, match=rf"gradient \['dense'\]\['kernel'\] {detail}"):
        optimizer.update(with_kernel(gradient), optimizer.init(params), params)


def test_remainders_of_other_parameters_are_refused():
    params = {"w": jnp.ones(7, jnp.bfloat16)}
    optimizer = adam_jax.master_weights(optax.sgd(0.1), "int8")
    state = optimizer.init({"w": jnp.ones((5, 7), jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"state.remainder\['w'\] has shape \(5, 7\).* \(7,\)"):
        optimizer.update(params, state, params)


def test_scales_of_other_parameters_are_refused():
    params = {"w": jnp.ones((64, 128))}
    optimizer = untyped(adam_jax.adam(0.1, nu_dtype="int8"))
    state = optimizer.init(params)
    nu = state[0].nu._replace(scales={"w": jnp.ones((1, 1))})
    with pytest.raises(ValueError, match=r"state.nu.scales\['w'\] has shape \(1, 1\).* \(64, 1\)"):
        optimizer.update(params, (state[0]._replace(nu=nu), *state[1:]))


def test_states_of_another_type_are_refused():
    optimizer = adam_jax.scale_by_adam()
    with pytest.raises(TypeError, match=r"expected the ScaleByAdamState .*got dict"):
        optimizer.update(PARAMS, {"count": 0, "mu": PARAMS, "nu": PARAMS})
    for state, got in [(optimizer.init(PARAMS), "ScaleByAdamState"), (None, "NoneType")]:
        expected = r"\(ScaleByAdamState, EmptyState\)"
        with pytest.raises(TypeError, match=f"init returns, {expected}, got {got}"):
            adam_jax.adam(0.1).update(PARAMS, state)
    wrappers = {
        "AverageParamsState": adam_jax.average_params(optimizer),
        "MasterWeightsState": adam_jax.master_weights(optimizer, "int8"),
    }
    for name, wrapper in wrappers.items():
        with pytest.raises(TypeError, match=f"expected the {name} that init returns, got tuple"):
            wrapper.update(PARAMS, (), PARAMS)


def without_types(state):
    """Returns the state as a checkpoint restores it without a target."""
    if hasattr(state, "_asdict"):
        state = state._asdict()
    if isinstance(state, dict):
        return {key: without_types(value) for key, value in state.items()}
    return list(map(without_types, state)) if isinstance(state, tuple) else state


@each_row
def test_a_state_without_types_is_refused(row):
    optimizer = row.make()
    state = without_types(optimizer.init(PARAMS))
    with pytest.raises(TypeError, match=r"expected the .* that init returns, .*got .*restore it"):
        optimizer.update(PARAMS, state, PARAMS)


@each_row
def test_the_state_of_another_optimizer_is_refused(row):
    """For any two optimizers, the error names the expected and the given state."""
    schedule = functools.partial(jnp.multiply, 0.1)
    states = [row.make().init(PARAMS) for row in ROWS]
    states += [row.make(learning_rate=schedule).init(PARAMS) for row in ROWS]
    states += [row.make(weight_decay=schedule, mask=True).init(PARAMS) for row in ROWS]
    optimizer = row.make()
    own = jax.tree.structure(optimizer.init(PARAMS))
    others = [state for state in states if jax.tree.structure(state) != own]
    assert len(others) > len(ROWS)
    for state in others:
        with pytest.raises((TypeError, ValueError), match=r"expected the .*got|is stored in"):
            optimizer.update(PARAMS, state, PARAMS)
