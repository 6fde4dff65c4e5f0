"""Properties that hold for any input, on inputs that hypothesis draws."""

import functools

import chex
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from optimizers import ROWS, each, each_row

import adam_jax

pytestmark = pytest.mark.usefixtures("small_leaves_in_int8")

# With stochastic rounding, an element's place determines its random bits.
each_exact_row = each([row for row in ROWS if not row.stochastic])
some_examples = settings(max_examples=25, deadline=None, derandomize=True)
STEPS, WIDTH = 12, 4

# These include the largest finite values, the smallest normal ones and zeros. They exclude
# subnormal numbers: JAX changes the processor's setting for those.
any_gradients = hnp.arrays(
    np.float32,
    (STEPS, WIDTH),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
)

moderate_gradients = hnp.arrays(
    np.float32, (STEPS, WIDTH), elements=st.floats(-100, 100, width=32, allow_subnormal=False)
).map(lambda g: np.where(np.abs(g) < 1e-3, np.float32(0), g))
decays = st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99, 0.999])


@functools.cache
def compiled(name):
    """Returns a jitted run of a row's optimizer, given gradients and hyperparameters."""
    row = next(row for row in ROWS if row.name == name)

    @jax.jit
    def run(gradients, hyperparameters):
        optimizer = row.make(**hyperparameters)
        params = jax.tree.map(lambda g: jnp.ones_like(g[0]), gradients)

        def step(state, g):
            updates, state = optimizer.update(g, state, params)
            return state, (updates, state)

        return jax.lax.scan(step, optimizer.init(params), gradients)[1]

    return run


@each_row
@given(any_gradients, decays, decays)
@some_examples
def test_finite_gradients_make_finite_steps_and_states(row, gradients, b1, b2):
    updates, state = compiled(row.name)(gradients, {"b1": b1, "b2": b2})
    chex.assert_tree_all_finite((updates, state))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if ".nu" in jax.tree_util.keystr(path):
            assert jnp.all(leaf >= 0)


@each_row
@given(moderate_gradients, st.integers(-20, 20), decays)
@some_examples
def test_rescaling_by_a_power_of_two_changes_nothing(row, gradients, exponent, b1):
    run = functools.partial(compiled(row.name), hyperparameters={"b1": b1, "eps": 0.0})
    updates, _ = run(gradients)
    rescaled, _ = run(gradients * np.float32(2.0**exponent))
    np.testing.assert_array_equal(updates, rescaled)


@each_exact_row
@given(moderate_gradients, st.permutations(range(WIDTH)))
@some_examples
def test_coordinates_do_not_affect_each_other(row, gradients, order):
    updates, _ = compiled(row.name)(gradients, {})
    permuted, _ = compiled(row.name)(gradients[:, order], {})
    np.testing.assert_array_equal(updates[:, order], permuted)


@each_exact_row
@given(hnp.arrays(np.float32, (STEPS, 3, WIDTH), elements=st.floats(-9, 9, width=32)))
@some_examples
def test_leaves_do_not_affect_each_other(row, gradients):
    a, b, c = (gradients[:, i] for i in range(3))
    one, _ = compiled(row.name)({"a": a, "b": b, "c": c}, {})
    other, _ = compiled(row.name)({"x": c, "y": {"z": a}, "b": b}, {})
    chex.assert_trees_all_equal(
        (one["a"], one["b"], one["c"]), (other["y"]["z"], other["b"], other["x"])
    )


@given(any_gradients, decays, decays)
@some_examples
def test_no_step_exceeds_its_bound(gradients, b1, b2):
    """Applies Cauchy-Schwarz to the two sums; eps excludes gradients whose squares underflow."""
    hyperparameters = {"b1": b1, "b2": b2, "eps": 1e-8}
    updates, _ = compiled("scale_by_adam")(gradients, hyperparameters)
    t = np.arange(1, STEPS + 1)
    for step, count in zip(np.asarray(updates), t, strict=True):
        ages = np.arange(count)
        m_weights = (1 - b1) * b1**ages / (1 - b1**count)
        v_weights = (1 - b2) * np.float64(b2) ** ages / (1 - b2**count)
        where = m_weights > 0
        with np.errstate(divide="ignore"):
            bound = np.sqrt(np.sum(m_weights[where] ** 2 / v_weights[where]))
        assert np.all(np.abs(step) <= bound * (1 + 1e-4))


@given(any_gradients)
@some_examples
def test_no_step_of_adamax_exceeds_its_bound(gradients):
    updates, _ = compiled("scale_by_adamax")(gradients, {"b1": 0.9, "b2": 0.999})
    # b1^k / b2^k < 1: an old gradient outweighs the decaying maximum by at most b2^-k.
    assert np.all(np.abs(updates) <= 0.999 ** -(STEPS - 1) * (1 + 1e-5))


shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)


@given(
    st.recursive(
        shapes, lambda tree: st.dictionaries(st.sampled_from("abc"), tree, max_size=3), max_leaves=5
    )
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_tree_keeps_its_structure_and_shapes(shapes):
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(jnp.ones, shapes, is_leaf=is_shape)
    optimizer = adam_jax.adamw(0.1)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
