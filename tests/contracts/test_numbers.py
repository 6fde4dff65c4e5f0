"""The numbers, shapes and dtypes of every optimizer's steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import gradients_of, moments_of, params_of, run, run_eagerly
from optimizers import each_row
from trees import assert_close

import adam_jax

pytestmark = [pytest.mark.covering, pytest.mark.usefixtures("small_leaves_in_int8")]

# The dtypes that each of JAX's two modes has.
NARROW = ["float16", "bfloat16", "float32", "complex64"]
WIDE = ["float64", "complex128"]
each_dtype = pytest.mark.parametrize(
    ("dtype", "x64"),
    [(d, False) for d in NARROW] + [(d, True) for d in NARROW + WIDE],
    indirect=["x64"],
)

# How far an update may be from the reference, relative to the leaf's largest: rounding the update
# to its own dtype (half an ulp: 2^-11, 2^-8), and rounding in the arithmetic (a few ulps).
TOLERANCE = {
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float32": 2e-6,
    "complex64": 2e-6,
    "float64": 1e-14,
    "complex128": 1e-14,
}


def stored_dtypes(row, name, wide):
    """Returns a moment's dtypes for `params_of`, some of whose leaves are too small for codes."""
    real = name in ("nu", "nu_max")
    full = jnp.finfo(wide).dtype if real else wide
    format = {"mu": row.mu_format, "average": None}.get(name, row.nu_format)
    if format is None:
        return {full}
    if format == "bfloat16":
        return {jnp.dtype("bfloat16")}
    single = np.dtype("complex64" if jnp.issubdtype(full, jnp.complexfloating) else "float32")
    return {single} if format == "float32" else {single, np.dtype("uint8" if real else "int8")}


def refused(row, params):
    """Returns whether the row refuses these parameters: a complex mu must be in float32."""
    if not (jnp.iscomplexobj(params["kernel"]) and row.mu_format in ("bfloat16", "int8")):
        return False
    with pytest.raises(TypeError, match="holds real numbers only"):
        row.make().init(params)
    return True


def assert_dtypes(row, dtype, params, updates, state, steps):
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(dtype, jnp.float32)
    last_updates = jax.tree.map(lambda u: u[-1], updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(last_updates, params)
    moments = moments_of(state)
    assert {"mu", "nu"} <= moments.keys()
    rows = [moments.pop(name, {}) for name in ("scales", "units")]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(rows))
    for name, moment in moments.items():
        chex.assert_trees_all_equal_shapes(moment, params)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(moment)}
        assert dtypes == stored_dtypes(row, name, wide)
    counts = optax.tree.get_all_with_path(state, "count")
    assert counts
    for _, count in counts:
        chex.assert_shape(count, ())
        assert count.dtype == jnp.int32
        assert count == steps


def assert_agrees_with_the_reference(row, dtype, params, gradients, updates):
    wide = np.complex128 if jnp.iscomplexobj(params["kernel"]) else np.float64

    def reference(p, g):
        return row.updates(np.asarray(g, wide), np.asarray(p, wide))

    def first_steps(tree):
        return jax.tree.map(lambda u: u[:1], tree)

    desired = jax.tree.map(reference, params, gradients)
    tolerance = max(TOLERANCE[dtype], row.storage_error)
    assert_close(first_steps(updates), first_steps(desired), tolerance)
    if not row.takes("weight_decay"):
        assert_close(updates, desired, tolerance)
    elif dtype not in ("float16", "bfloat16"):
        # Weight decay adds the weight's own rounding, an ulp of 1 in each step, to the updates.
        assert_close(updates, desired, 10 * tolerance)


@each_row
@each_dtype
def test_a_run_has_the_right_numbers_shapes_and_dtypes(row, dtype, x64):
    """One test checks all three, because compiling a run takes long."""
    params = params_of(dtype)
    if refused(row, params):
        return
    gradients = gradients_of(params, 20)
    optimizer = row.make()
    first = optimizer.init(params)
    # lax.scan accepts a carry only if a step returns exactly the types it was given.
    updates, last = run(optimizer, params, gradients)
    chex.assert_trees_all_equal_structs(first, last)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, last)
    assert_dtypes(row, dtype, params, updates, last, steps=20)
    assert_agrees_with_the_reference(row, dtype, params, gradients, updates)


@each_row
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")])
def test_ten_steps_compile_once(row, dtypes):
    param_dtype, gradient_dtype = dtypes
    optimizer, params = row.make(), params_of(param_dtype)
    gradients = gradients_of(params_of(gradient_dtype))
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        with jax.numpy_dtype_promotion("standard"):  # apply_updates adds float32 to bfloat16
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), updates, state

    state = jax.jit(optimizer.init)(params)
    first = params
    for _ in range(10):
        params, updates, state = step(params, state)
        chex.assert_trees_all_equal_dtypes(updates, gradients)
    chex.assert_trees_all_equal_dtypes(params, first)
    assert len(traces) == 1


@each_row
def test_jit_equals_eager(row):
    params = params_of()
    gradients = gradients_of(params)
    optimizer = row.make()
    state = optimizer.init(params)
    jitted = jax.jit(optimizer.update)
    for _ in range(3):
        eager_updates, eager_state = optimizer.update(gradients, state, params)
        jit_updates, state = jitted(gradients, state, params)
        # A compiler may or may not contract a product and a sum into one rounding.
        chex.assert_trees_all_close(eager_updates, jit_updates, rtol=1e-6, atol=1e-9)
        states, units = zip(*map(without_units, (eager_state, state)), strict=True)
        chex.assert_trees_all_close(*states, rtol=1e-6, atol=1e-9)
        # Their lowest 12 bits are a checksum, which changes with each ulp of a scale.
        chex.assert_trees_all_close(*units, rtol=2**-11)


def without_units(state):
    """Returns a state without the units of int8 moments, and these units."""
    is_struct = lambda x: isinstance(x, adam_jax.Int8Moment)  # noqa: E731
    found = [x.units for x in jax.tree.leaves(state, is_leaf=is_struct) if is_struct(x)]
    rest = jax.tree.map(
        lambda x: x._replace(units=()) if is_struct(x) else x, state, is_leaf=is_struct
    )
    return rest, found


@each_row
def test_numpy_arrays_and_python_scalars_are_accepted(row):
    optimizer = row.make()
    params = {"array": np.array([1.0, 2.0], np.float32), "scalar": 3.0}
    gradients = {"array": np.array([0.5, -0.5], np.float32), "scalar": 0.25}
    state = optimizer.init(params)
    updates, _ = optimizer.update(gradients, state, params)
    desired = jax.tree.map(lambda g, p: row.updates(np.array([g]), p)[0], gradients, params)
    assert_close(updates, desired, max(1e-6, row.storage_error))


@each_row
def test_a_nan_gradient_is_not_hidden(row):
    """NaN reaches the update of its own coordinate (in int8 of its row) and no other."""
    # Rows are long, because XLA for CPU takes their maximum with vectors and may lose NaN.
    gradient = jnp.ones((3, 64)).at[1, 40].set(jnp.nan)
    params = {"w": jnp.ones((3, 64))}
    gradients = {"w": jnp.stack([gradient, jnp.ones((3, 64)), gradient])}
    updates, _ = run(row.make(), params, gradients)
    assert jnp.isnan(updates["w"][:, 1, 40]).all()
    if row.nu_format == "int8":
        assert jnp.isnan(updates["w"][:, 1]).all()
        assert jnp.isfinite(updates["w"][:, [0, 2]]).all()
    else:
        assert jnp.isnan(updates["w"]).sum() == 3


@each_row
def test_a_none_gradient_freezes_its_parameter(row):
    params = params_of()
    gradients = gradients_of(params)
    optimizer = row.make()
    state = optimizer.init(params)
    _, state = optimizer.update(gradients, state, params)
    updates, after = optimizer.update(gradients | {"kernel": None}, state, params)
    whole, _ = optimizer.update(gradients, state, params)
    assert updates["kernel"] is None
    chex.assert_trees_all_equal(updates["stack"], whole["stack"])
    for name, moment in moments_of(after).items():
        if name != "average":  # a frozen parameter is still averaged
            chex.assert_trees_all_equal(moment["kernel"], moments_of(state)[name]["kernel"])
    chex.assert_trees_all_equal_structs(state, after)


@each_row
def test_zero_gradients_make_no_step(row):
    params = jax.tree.map(jnp.zeros_like, params_of())
    zeros = jax.tree.map(lambda p: jnp.zeros((5, *p.shape)), params)
    for settings in ({}, {"eps": 0.0}):
        updates, _ = run_eagerly(row.make(**settings), params, zeros)
        chex.assert_trees_all_equal(updates, zeros)


@each_row
def test_without_eps_zero_and_tiny_gradients_give_finite_steps_and_derivatives(row):
    """The square of 1e-30 is 0 in float32: the denominator is 0, but the numerator is not."""
    gradients = jnp.asarray([0.0, 1e-38, 1e-30, -1e-20, 1e-15])

    def last(gradients):
        updates, _ = run(row.make(eps=0.0), jnp.zeros(5), jnp.tile(gradients, (3, 1)))
        return updates[-1]

    updates = last(gradients)
    longest = (1.1 + row.storage_error) * row.settings.get(
        "learning_rate", 1.0
    )  # Nesterov looks ahead
    assert updates[0] == 0
    assert jnp.all(jnp.abs(updates) <= longest)
    moderate = gradients[jnp.array([0, 0, 0, 4, 4])]  # the square of 1 / 1e-30 is infinite
    assert jnp.isfinite(jax.jacrev(last)(moderate)).all()
