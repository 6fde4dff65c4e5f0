"""Gradients accumulated over microbatches: the mean, unbiased, in one buffer, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optimizers import seven_bytes
from trees import assert_same_bits, random

import adam_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")

LAYERS = {"blocks": {"w": True, "b": True}, "head": False, "none": None}


def params_of(dtype="float32"):
    shapes = {"w": (4, 16, 16), "b": (4, 16)}
    blocks = {name: 0.3 * random(shape, dtype, 0) for name, shape in shapes.items()}
    return {"blocks": blocks, "head": random((16, 8), dtype, 1), "none": None}


def microbatches_of(dtype="float32", number=8):
    return random((number, 6, 16), dtype, 2)


def loss(params, x, scan=jax.lax.scan):
    @jax.checkpoint
    def block(x, p):
        return jnp.tanh(x @ p["w"] + p["b"][None]), None

    x, _ = scan(block, x, params["blocks"])
    return jnp.mean(jnp.square(x @ params["head"]), dtype=jnp.float32)


@functools.cache
def differentiated(**settings):
    return jax.jit(adam_jax.accumulated_value_and_grad(loss, **settings))


def released(buffer="float32"):
    return jax.jit(adam_jax.accumulated_value_and_grad(loss, layers=LAYERS, buffer=buffer))


def reference(params, microbatches):
    """Returns the mean over microbatches of unrounded gradients, accumulated in float64."""
    each = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))
    values, gradients = each(params, microbatches)
    mean = lambda g: np.asarray(g, np.float64).mean(axis=0)  # noqa: E731
    return mean(values), jax.tree.map(mean, gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_result_is_the_mean(dtype):
    """The mean is in float32 for every dtype of parameters."""
    params, microbatches = params_of(dtype), microbatches_of(dtype)
    value, gradients = differentiated()(params, microbatches)
    desired, mean = reference(params, microbatches)
    np.testing.assert_allclose(value, desired, rtol=1e-6)
    for gradient, x in zip(jax.tree.leaves(gradients), jax.tree.leaves(mean), strict=True):
        assert gradient.dtype == jnp.float32
        # Eight roundings of half an ulp each; the products in XLA's vmap differ by more.
        tolerance = 1e-6 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(gradient, x, rtol=0, atol=tolerance * np.abs(x).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("buffer", ["float32", "bfloat16"])
def test_layers_give_bit_identical_results(buffer, dtype):
    """In bfloat16 too: a layer draws the same random bits alone as in its stack."""
    params, microbatches = params_of(dtype), microbatches_of(dtype)
    plain = differentiated(buffer=buffer)(params, microbatches, step=5)
    layered = released(buffer)(params, microbatches, step=5)
    assert_same_bits(layered, plain)
    assert {x.dtype for x in jax.tree.leaves(layered[1])} == {jnp.dtype(buffer)}


def test_sums_keep_terms_that_bfloat16_would_lose():
    """Adds parts of 2^-10 to 1, each less than half an ulp of the sum."""

    def linear(params, x):
        return jnp.sum(params * x, dtype=jnp.float32)

    x = jnp.full((65, 4096), 2.0**-10, jnp.bfloat16).at[0].set(1.0)
    params = jnp.zeros(4096, jnp.bfloat16)
    desired = (1 + 64 * 2.0**-10) / 65
    _, exact = adam_jax.accumulated_value_and_grad(linear)(params, x)
    np.testing.assert_allclose(exact, desired, rtol=1e-6)
    rounded = jax.jit(adam_jax.accumulated_value_and_grad(linear, buffer="bfloat16"))
    means = []
    for step in range(4):
        _, gradient = rounded(params, x, step=step)
        gradient = np.asarray(gradient, np.float64)
        assert len(np.unique(gradient)) > 2
        # 65 roundings of an ulp of 2^-13, with a variance of a quarter of its square at most.
        deviation = np.sqrt(65 / 4) * 2.0**-13
        assert abs(gradient.mean() - desired) < 4 * deviation / np.sqrt(4096)
        means.append(gradient)
    # Each step draws other random bits.
    assert abs(np.corrcoef(means)[np.triu_indices(4, 1)]).max() < 0.07


def test_master_weights_train_on_the_mean():
    """Moments follow the mean in float32, though parameters are in bfloat16."""
    params, microbatches = params_of("bfloat16"), microbatches_of("bfloat16")
    optimizer = adam_jax.master_weights(adam_jax.adamw(1e-2), "int16")
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        f = adam_jax.accumulated_value_and_grad(loss, layers=LAYERS)
        value, gradients = f(params, microbatches)
        updates, state = optimizer.update(gradients, state, params)
        return value, gradients, optax.apply_updates(params, updates), state

    first, gradients, params, state = step(params, state)
    mu = optax.tree.get(state, "mu")
    for x, g in zip(jax.tree.leaves(mu), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(x, 0.1 * g, rtol=1e-6)
    for _ in range(20):
        last, _, params, state = step(params, state)
    assert last < 0.7 * first


def test_aux_is_stacked():
    def with_aux(params, x, scan=jax.lax.scan):
        return loss(params, x, scan), {"first": x[0, 0]}

    params, microbatches = params_of(), microbatches_of()
    for layers in (False, LAYERS):
        f = adam_jax.accumulated_value_and_grad(with_aux, layers=layers, has_aux=True)
        (value, aux), gradients = jax.jit(f)(params, microbatches)
        assert_same_bits((value, gradients), differentiated()(params, microbatches))
        np.testing.assert_array_equal(aux["first"], microbatches[:, 0, 0])


@pytest.mark.parametrize("x64", [True], indirect=True)
@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_wider_leaves_keep_their_dtype(dtype, x64):
    params = random((16,), dtype, 0)
    x = random((4, 3, 16), dtype, 1)

    def linear(params, x):
        return jnp.mean(jnp.abs(x @ params) ** 2)

    for buffer in ("float32", "bfloat16"):
        f = adam_jax.accumulated_value_and_grad(linear, buffer=buffer)
        value, gradient = f(params, x, step=0)
        assert gradient.dtype == dtype
        desired = jax.value_and_grad(linear)(params, x.reshape(-1, 16))
        np.testing.assert_allclose(value, desired[0], rtol=1e-6)
        np.testing.assert_allclose(gradient, desired[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_microbatches_may_be_divided_over_a_mesh(kind):
    """Microbatches are divided over devices, and gradients are placed like the parameters."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = {"w": random((16, 8), "float32", 0)}
    microbatches = random((4, 16, 16), "float32", 1)

    def linear(params, x):
        return jnp.mean(jnp.square(x @ params["w"]))

    f = jax.jit(adam_jax.accumulated_value_and_grad(linear))
    desired = f(params, microbatches)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    spec = PartitionSpec(None, "data")
    value, gradients = f(params, jax.device_put(microbatches, NamedSharding(mesh, spec)))
    np.testing.assert_allclose(value, desired[0], rtol=1e-6)
    np.testing.assert_allclose(gradients["w"], desired[1]["w"], rtol=1e-5, atol=1e-6)
    assert gradients["w"].sharding.is_equivalent_to(params["w"].sharding, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_multi_steps_work_with_gradient_release(dtype):
    """`optax.MultiSteps`, which accumulates in its state, works with `value_and_update`."""

    def wrapped(inner):
        return adam_jax.master_weights(inner, "int16") if dtype == "bfloat16" else inner

    adam = adam_jax.adamw(1e-2, mu_dtype="int8", nu_dtype="int8")
    several = wrapped(optax.MultiSteps(adam, 8).gradient_transformation())
    start, microbatches = params_of(dtype), microbatches_of(dtype)
    params, state = start, several.init(start)
    step = jax.jit(adam_jax.value_and_update(loss, several, layers=LAYERS))
    for x in microbatches:
        _, params, state = step(params, state, x)
    _, gradients = differentiated()(start, microbatches)
    once = wrapped(adam)
    updates, _ = once.update(gradients, once.init(start), start)
    desired = optax.apply_updates(start, updates)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(desired), strict=True):
        # A first step moves by the rate for any gradient, unless the gradient is all rounding.
        np.testing.assert_allclose(
            x.astype(float), y.astype(float), rtol=1e-2 if dtype == "bfloat16" else 0, atol=1e-4
        )


def test_a_loss_of_microbatches_has_no_gradient_release():
    """Each layer's gradient would be complete only after the last microbatch."""

    def of_all(params, microbatches, scan=jax.lax.scan):
        one = lambda total, x: (total + loss(params, x, scan), None)  # noqa: E731
        total, _ = jax.lax.scan(one, jnp.float32(0), microbatches)
        return total

    step = adam_jax.value_and_update(of_all, adam_jax.adamw(1e-2), layers=LAYERS)
    params = params_of()
    with pytest.raises(ValueError, match="inside a function that is transformed"):
        step(params, adam_jax.adamw(1e-2).init(params), microbatches_of())


@pytest.mark.parametrize(
    ("microbatches", "message"),
    [
        ({"x": np.ones((4, 3)), "y": np.ones(5)}, r"\['x'\] \(4, 3\), \['y'\] \(5,\)"),
        (np.ones(()), r"the only leaf\) \(\)"),
        (np.ones((0, 3)), r"the only leaf\) \(0, 3\)"),
        ({}, "no leaf"),
    ],
)
def test_microbatches_that_do_not_fit_are_refused(microbatches, message):
    with pytest.raises(ValueError, match=message):
        adam_jax.accumulated_value_and_grad(loss)(params_of(), microbatches)


def test_other_mistakes_are_refused():
    with pytest.raises(ValueError, match="buffer must be one of 'float32', 'bfloat16'"):
        adam_jax.accumulated_value_and_grad(loss, buffer="int8")
    f = adam_jax.accumulated_value_and_grad(loss, buffer="bfloat16")
    with pytest.raises(TypeError, match="step=i"):
        f(params_of(), microbatches_of())
    with pytest.raises(TypeError, match=r"\['w'\] has dtype int32"):
        adam_jax.accumulated_value_and_grad(loss)({"w": jnp.ones(3, int)}, microbatches_of())


@pytest.mark.parametrize("layers", [0, 1, {"blocks": 0, "head": False, "none": None}])
def test_layers_that_are_no_bools(layers):
    """0 is no way to spell False: it raises as 1 does, and is not taken for "no layers"."""
    value_and_grad = adam_jax.accumulated_value_and_grad(loss, layers=layers)
    with pytest.raises(TypeError, match=r"layers has [01] at \['blocks'\]\['b'\]"):
        value_and_grad(params_of(), microbatches_of())


def test_offloaded_state_and_seven_bytes():
    """Accumulation works in one step with everything else that saves memory."""
    if jax.__version_info__ < (0, 10):
        pytest.skip("offload needs JAX 0.10")
    params, microbatches = params_of("bfloat16"), microbatches_of("bfloat16")
    results = []
    for optimizer in (seven_bytes(), adam_jax.offload(seven_bytes())):
        f = released("bfloat16")
        _, gradients = f(params, microbatches, step=jnp.int32(1))
        results.append(jax.jit(optimizer.update)(gradients, optimizer.init(params), params))
    assert_same_bits(*results)
