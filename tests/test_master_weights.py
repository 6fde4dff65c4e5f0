"""`master_weights` stores the promised bits of each float32 weight and loses nothing more."""

import functools
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import linen
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from low_precision import (
    KEPT,
    LOW,
    REMAINDERS,
    each_dtype,
    each_remainder,
    given_steps,
    log_uniform,
    start,
    ulp,
)
from optimizers import EXACT
from trees import assert_close, descend, random_tree, scan, step_of, untyped, widened

import adam_jax
from adam_jax import load_master_params, master_params, master_weights

# optax.apply_updates adds float32 updates to 16-bit parameters.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def train(optimizer, params, gradients):
    """Returns parameters and state after a run on these gradients, in one scan."""
    params, state, _ = scan(optimizer, params, gradients)
    return params, state


def tree_of(dtype, time=(), seed=0) -> dict[str, Any]:
    shapes = {"kernel": (16, 24), "scalar": (), "zero_size": (0, 5)}
    return random_tree(shapes, dtype, seed, time) | {"nothing": {}}


# Parameter and remainder together store the weight after each step.


class Seen(NamedTuple):
    """The weights and updates of the inner optimizer's last step."""

    count: Any
    weights: Any
    updates: Any
    inner_state: Any


def seeing(inner, *, rounded):
    """Returns the optimizer with its last weights and updates in the state.

    With `rounded`, updates pass through an integer operation, a xor with 0. Then no compiler can
    fuse a product at their end with the sum that follows.
    """

    def init(params):
        return Seen(jnp.int32(0), params, jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update(updates, state, params=None):
        updates, inner_state = inner.update(updates, state.inner_state, params)
        if rounded:
            zero = state.count >> 31  # unknown to a compiler
            updates = jax.tree.map(
                lambda u: (u.view(jnp.int32) ^ zero).view(jnp.float32) if u.size else u, updates
            )
        return updates, Seen(state.count + 1, params, updates, inner_state)

    return optax.GradientTransformation(init, update)


def seen_in_1000_steps(inner, dtype, remainder, *, rounded):
    """Returns weights, (1001, ...), and updates, (1000, ...), of a jitted run, for each leaf."""
    optimizer = master_weights(seeing(inner, rounded=rounded), remainder)
    params, gradients = tree_of(dtype), tree_of(dtype, (1000,), 1)
    params, states = descend(optimizer, lambda _, g: g, params, gradients)
    last = jax.tree.map(lambda x: x[-1:], (params, states))
    last = jax.vmap(master_params)(*last)
    seen = states.inner_state
    weights = jax.tree.map(lambda w, x: np.concatenate([w, x]), seen.weights, last)
    return jax.tree.leaves(weights), [np.asarray(u) for u in jax.tree.leaves(seen.updates)]


INNER = {
    "adamw": lambda: adam_jax.adamw(1e-3, weight_decay=0.1),
    "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
}
FLOAT32 = [("bfloat16", "int16"), ("bfloat16", "float32"), ("float16", "float32")]
each_inner = pytest.mark.parametrize("name", INNER)
each_that_is_float32 = pytest.mark.parametrize(
    ("dtype", "remainder"), FLOAT32, ids=map("-".join, FLOAT32)
)


@pytest.mark.covering
@each_inner
@each_that_is_float32
def test_parameter_and_remainder_are_the_float32_weight_of_each_step(name, dtype, remainder, x64):
    weights, updates = seen_in_1000_steps(INNER[name](), dtype, remainder, rounded=True)
    for w, u in zip(weights, updates, strict=True):
        assert w.dtype == u.dtype == np.float32
        np.testing.assert_array_equal(w[1:], w[:-1] + u)
    kernel = weights[0]
    assert np.all(kernel[0] != kernel[-1])


@pytest.mark.slow
@pytest.mark.covering
@each_inner
@each_that_is_float32
def test_a_compiler_that_fuses_product_and_sum_rounds_once(name, dtype, remainder, x64):
    """The added update then has extra bits, worth less than half an ulp of it."""
    weights, updates = seen_in_1000_steps(INNER[name](), dtype, remainder, rounded=False)
    for w, u in zip(weights, updates, strict=True):
        exact = w[:-1].astype(np.float64) + u.astype(np.float64)
        half_ulps = (np.spacing(np.abs(w[1:])) + np.spacing(np.abs(u))) / 2
        assert np.all(np.abs(w[1:] - exact) <= half_ulps)


@pytest.mark.slow
@pytest.mark.covering
@each_inner
@each_that_is_float32
def test_eager_steps_are_bit_identical_to_float32_steps(name, dtype, remainder, x64):
    """A program rounds each product at its end, and the next program adds it."""
    inner = INNER[name]()
    optimizer = untyped(master_weights(inner, remainder))
    low, gradients = tree_of(dtype), tree_of(dtype, (20,), 1)
    state, params = optimizer.init(low), widened(low)
    inner_state = inner.init(params)
    for i in range(20):
        g = jax.tree.map(lambda x, i=i: x[i], gradients)
        updates, state = optimizer.update(g, state, low)
        low = optax.apply_updates(low, updates)
        updates, inner_state = inner.update(widened(g), inner_state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(master_params(low, state), params)
    chex.assert_trees_all_equal(state.inner_state, inner_state)


EXACT_INNER = {
    "adamw": lambda: adam_jax.adamw(**EXACT),
    "momentum": lambda: optax.sgd(2**-10, momentum=0.5),
}


@pytest.mark.covering
@pytest.mark.parametrize("name", EXACT_INNER)
@each_that_is_float32
def test_1000_jitted_steps_of_exact_products_equal_float32_steps(name, dtype, remainder, x64):
    """It makes no difference then whether a compiler fuses products and sums."""
    params, gradients = tree_of(dtype), tree_of(dtype, (1000,), 1)
    low, state = train(master_weights(EXACT_INNER[name](), remainder), params, gradients)
    desired, desired_state = train(EXACT_INNER[name](), widened(params), widened(gradients))
    chex.assert_trees_all_equal_dtypes(low, params)
    chex.assert_trees_all_equal(master_params(low, state), desired)
    chex.assert_trees_all_equal(state.inner_state, desired_state)
    assert not np.array_equal(desired["kernel"], widened(params)["kernel"])


@pytest.mark.slow
@pytest.mark.covering
@each_inner
@each_that_is_float32
def test_1000_jitted_steps_equal_float32_steps_up_to_fused_roundings(name, dtype, remainder):
    params, gradients = tree_of(dtype), tree_of(dtype, (1000,), 1)
    low, _ = state = train(master_weights(INNER[name](), remainder), params, gradients)
    desired, _ = train(INNER[name](), widened(params), widened(gradients))
    # An ulp of the weight in each step at most, if the compiler fuses the programs differently.
    assert_close(master_params(*state), desired, 1000 * 2.0**-23)
    chex.assert_trees_all_equal_dtypes(low, params)


@pytest.mark.slow
@pytest.mark.covering
@each_dtype
@pytest.mark.parametrize("direction", [1, -1])
def test_small_steps_add_up(dtype, direction):
    """Makes 500 steps of 1e-4 from 1 on 65,536 coordinates: float32 reaches 1.05 or .95."""
    n, steps, step = 2**16, 500, direction * 1e-4
    params = jnp.ones(n, dtype)
    gradients = jnp.full((steps, n), step)
    plain, _ = train(optax.identity(), params, gradients.astype(dtype))
    np.testing.assert_array_equal(plain, params)
    desired, _ = train(optax.identity(), jnp.ones(1), gradients[:, :1])
    for remainder, unit in [("none", 1.0), ("int8", 2.0**-8), ("int16", 2.0**-16)]:
        low, state = train(master_weights(optax.identity(), remainder), params, gradients)
        error = np.asarray(master_params(low, state), np.float64) - np.float64(desired)
        # Numbers are `grid` apart, and a step of a share p between two of them has variance
        # p (1 - p) grid^2. The 500 roundings of float32 add to that.
        grid = ulp(1.0 if direction > 0 else 0.99, dtype) * unit
        share = abs(step) / grid % 1
        deviation = grid * np.sqrt(steps * share * (1 - share))
        rounding = steps * 2.0**-24
        assert np.sqrt(np.mean(error**2)) <= 1.1 * deviation + rounding
        assert abs(error.mean()) <= 5 * deviation / np.sqrt(n) + rounding


def test_random_bits_differ_between_steps_leaves_and_coordinates():
    optimizer, run = given_steps("none")
    params = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16)}
    steps = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-8), params)  # half an ulp
    state = optimizer.init(params)
    went_up = []
    for _ in range(2):
        after, state, _ = run(params, state, steps)
        went_up += [np.asarray(after[k]) > 1 for k in ("a", "b")]
    for i, ups in enumerate(went_up):
        # Of 4096 fair coins, heads or agreements stay within 5 standard deviations of a half.
        assert abs(ups.mean() - 0.5) <= 5 * 0.5 / 64
        assert abs(np.mean(ups[1:] == ups[:-1]) - 0.5) <= 5 * 0.5 / 64
        for other in went_up[:i]:
            assert abs(np.mean(ups == other) - 0.5) <= 5 * 0.5 / 64


@pytest.mark.slow
def test_loaded_float32_weights_can_be_read_back():
    master = {"w": log_uniform(4096, -17, 15.9), "b": np.float32(0.1), "c": np.zeros(0, np.float32)}
    for dtype in LOW:
        params = jax.tree.map(lambda w, dtype=dtype: jnp.asarray(w, dtype), master)
        for remainder in REMAINDERS:
            optimizer = optax.chain(optax.identity(), master_weights(optax.adam(0.1), remainder))
            low, state = load_master_params(master, params, optimizer.init(params))
            chex.assert_trees_all_equal_shapes_and_dtypes(low, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, optimizer.init(params))
            read = untyped(master_params(low, state))
            assert {x.dtype for x in jax.tree.leaves(read)} == {np.dtype(np.float32)}
            if remainder in ("int16", "float32"):
                chex.assert_trees_all_equal(read, master)
            else:
                error = np.abs(np.asarray(read["w"], np.float64) - master["w"])
                bound = ulp(master["w"], dtype) * 2.0 ** -KEPT[remainder] / 2
                assert np.all(error <= bound)
    wide_master = np.array([1e-30, 1e5, 3e38], np.float32)  # float32 remainders have no bounds
    low, state = start(master_weights(optax.sgd(0.1), "float32"), wide_master, "float16")
    np.testing.assert_array_equal(np.asarray(low, np.float32), [0, 65504, 65504])
    np.testing.assert_array_equal(master_params(low, state), wide_master)


def test_loading_changes_neither_wide_nor_missing_leaves_nor_other_state():
    params = {"low": jnp.ones(3, jnp.bfloat16), "wide": jnp.ones(3), "none": None}
    optimizer = untyped(master_weights(adam_jax.adam(0.1), "int8"))
    _, state = optimizer.update(params, optimizer.init(params), params)
    low, wide = np.array([[0.1, 0.2, 0.3], [1, 2, 3]], np.float32)
    master = {"low": low, "wide": wide, "none": None}
    target = jax.eval_shape(lambda: params)
    low, new_state = untyped(load_master_params(master, target, state))
    np.testing.assert_array_equal(low["wide"], master["wide"])
    assert low["none"] is None
    assert new_state.count == 1
    chex.assert_trees_all_equal(new_state.inner_state, state.inner_state)
    assert new_state.remainder["wide"].shape == ()
    assert new_state.remainder["low"].dtype == jnp.int8


def test_weights_that_do_not_fit_their_parameters_are_refused():
    params = {"none": None, "w": jnp.ones((2, 3), jnp.bfloat16), "wide": jnp.ones(3)}
    state = master_weights(adam_jax.adam(0.1), "int8").init(params)
    for name, wrong, error, message in [
        ("w", jnp.ones((3, 2)), ValueError, r"weight \['w'\] has shape \(3, 2\), .* \(2, 3\)"),
        ("w", jnp.ones((2, 3), complex), TypeError, r"weight \['w'\] has dtype complex"),
        ("wide", jnp.ones(()), ValueError, r"weight \['wide'\] has shape \(\)"),
        ("w", jnp.ones((2, 3), int), TypeError, r"weight \['w'\] has dtype int"),
    ]:
        with pytest.raises(error, match=message):
            load_master_params(params | {name: wrong}, params, state)


# Around and inside other transformations


def mask(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


SCHEDULE = optax.linear_schedule(1e-2, 0.0, 20)
CHAINS = {
    "clip, decay, schedule": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), adam_jax.adamw(SCHEDULE, weight_decay=0.1, mask=mask)
    ),
    "optax clip, decay, schedule": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE, weight_decay=0.1, mask=mask)
    ),
    "MultiSteps": lambda: optax.MultiSteps(adam_jax.adamw(1e-2), 3).gradient_transformation(),
    "masked": lambda: optax.chain(
        optax.masked(adam_jax.adamw(1e-2), mask),
        optax.masked(optax.set_to_zero(), lambda p: jax.tree.map(lambda x: not x, mask(p))),
    ),
    "multi_transform": lambda: optax.multi_transform(
        {True: adam_jax.adamw(1e-2), False: optax.sgd(1e-2)}, mask
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(adam_jax.adamw(1e-2), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(adam_jax.adamw)(1e-2, b2=0.99),
    "average_params": lambda: adam_jax.average_params(adam_jax.adamw(1e-2), 0.9),
    "extra args": lambda: optax.chain(adam_jax.adamw(1e-2), optax.contrib.reduce_on_plateau()),
}


def train_with_value(optimizer, params, gradients):
    optimizer = optax.with_extra_args_support(optimizer)

    def with_value(updates, state, params=None):
        return optimizer.update(updates, state, params, value=1.0)

    return train(optax.GradientTransformation(optimizer.init, with_value), params, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_other_transformations_work_inside(name):
    """With an int16 remainder, each transformation treats bfloat16 weights like float32."""
    params, gradients = tree_of("bfloat16"), tree_of("bfloat16", (10,), 1)
    if name == "apply_if_finite":
        gradients["kernel"] = gradients["kernel"].at[4, 0, 0].set(jnp.nan)
    low, state = train_with_value(master_weights(CHAINS[name](), "int16"), params, gradients)
    desired, _ = train_with_value(CHAINS[name](), widened(params), widened(gradients))
    chex.assert_tree_all_finite(desired)
    # A compiler may or may not contract a product and a sum into one rounding.
    chex.assert_trees_all_close(master_params(low, state), desired, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_equal_dtypes(low, params)
    assert np.any(low["kernel"] != params["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("remainder", ["none", "int16"])
def test_transformations_that_keep_its_updates_work_outside(remainder):
    params, gradients = tree_of("bfloat16"), widened(tree_of("bfloat16", (6,), 1))
    make = lambda rate=1e-2: master_weights(adam_jax.adamw(rate), remainder)  # noqa: E731
    low, state = train(make(), params, gradients)
    everything = jax.tree.map(lambda _: True, params)
    for optimizer in [
        optax.apply_if_finite(optax.masked(make(), everything), 3),
        optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(1e-2),
        adam_jax.average_params(make(), 0.9),
    ]:
        other, other_state = train(optimizer, params, gradients)
        chex.assert_trees_all_equal_dtypes(other, params)
        ours, theirs = (master_params(*run) for run in ((low, state), (other, other_state)))
        # Stochastic rounding may turn a difference in the last bit into a difference of one code.
        steps = {"none": 2.0**-7, "int8": 2.0**-15}.get(remainder, 1e-6)
        chex.assert_trees_all_close(ours, theirs, rtol=steps, atol=1e-6)


@pytest.mark.covering
@each_remainder
@each_dtype
def test_multi_steps_outside_keeps_every_bit_of_the_weights(dtype, remainder):
    """MultiSteps accumulates in 16 bits and steps on the sums of gradients."""
    calls, k = 32, 4
    params = tree_of(dtype)
    gradients = jax.tree.map(lambda g: jnp.round(g * 8) / 8, tree_of(dtype, (calls // k,), 1))
    make = lambda: master_weights(adam_jax.adamw(**EXACT), remainder)  # noqa: E731
    low, state = train(make(), params, gradients)
    outside = optax.MultiSteps(make(), k).gradient_transformation()
    step, other, other_state = step_of(outside), params, untyped(outside.init(params))
    # No scan here: optax 0.2.6 changes the dtype of its sums at the first step.
    for i in range(calls):
        gradient = jax.tree.map(lambda g, i=i: g[i // k], gradients)  # the mean of k is exact
        other, other_state = step(other, other_state, gradient)
    chex.assert_trees_all_equal(other, low)
    chex.assert_trees_all_equal(other_state.inner_opt_state, state)


WITH_WEIGHTS = {
    "schedule_free": lambda: optax.contrib.schedule_free(adam_jax.adamw(1e-3, b1=0.0), 1e-3),
    "mechanize": lambda: optax.contrib.mechanize(adam_jax.adamw(1e-3)),
    "prodigy": lambda: optax.contrib.prodigy(1e-2),
    "cocob": lambda: optax.contrib.cocob(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_optimizers_with_weights_in_their_state_learn_of_loaded_weights(name):
    """Such optimizers learn of loaded weights in the way that the docstring describes."""
    inner = WITH_WEIGHTS[name]()
    weights = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)), jnp.float32)}
    gradients = {"kernel": tree_of("bfloat16", (40,), 1)["kernel"]}
    desired, _ = train(inner, weights, widened(gradients))
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    optimizer = master_weights(inner, "int16")
    params, state = load_master_params(weights, low, optimizer.init(low))
    state = state._replace(inner_state=inner.init(weights))
    step = step_of(optimizer)
    (params, state), _ = jax.lax.scan(
        lambda at, g: (step(*at, g), None), (params, state), gradients
    )
    way = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b), desired, weights)["kernel"]
    error = jax.tree.map(
        lambda a, b: jnp.linalg.norm(a - b), untyped(master_params(params, state)), desired
    )["kernel"]
    assert way > 0
    assert error < 1e-3 * way


@each_remainder
def test_optimizers_that_cannot_be_inside_are_refused(remainder):
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    mechanized = optax.chain(optax.clip(1.0), optax.contrib.mechanize(adam_jax.adamw(1e-3)))
    optimizer = untyped(master_weights(mechanized, remainder))
    if remainder in ("none", "int8"):
        with pytest.raises(ValueError, match=f"mechanize divides .*'{remainder}'"):
            optimizer.init(params)
    else:
        assert optimizer.init(params).remainder["w"].shape == (3,)
    lookahead = optax.lookahead(adam_jax.adamw(1e-3), 6, 0.5)
    both = optax.LookaheadParams.init_synced(params)
    with pytest.raises(ValueError, match="lookahead cannot be inside master_weights"):
        master_weights(lookahead, remainder).init(both)


def test_masked_leaves_are_not_touched():
    params = {"trained": jnp.ones((3, 4), jnp.bfloat16), "frozen": jnp.ones(5, jnp.bfloat16)}
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, 0.5, p.dtype), params)
    trained = {"trained": True, "frozen": False}
    optimizer = untyped(optax.masked(master_weights(adam_jax.adamw(1e-2), "int8"), trained))
    state = optimizer.init(params)
    assert jax.tree.leaves(state.inner_state.remainder)[0].shape == (3, 4)
    updates, state = optimizer.update(gradients, state, params)
    assert updates["trained"].dtype == jnp.float32
    chex.assert_trees_all_equal(updates["frozen"], gradients["frozen"])
    only_leaf = optax.masked(master_weights(adam_jax.adamw(1e-2), "none"), False)
    state = only_leaf.init(params["frozen"])
    updates, after = only_leaf.update(gradients["frozen"], state, params["frozen"])
    chex.assert_trees_all_equal(updates, gradients["frozen"])
    chex.assert_trees_all_equal_structs(state, after)


@pytest.mark.slow
@pytest.mark.covering
@each_remainder
def test_wide_leaves_get_the_inner_optimizer_s_updates(remainder, x64):
    dtypes = ["float32", "complex64"] + ["float64", "complex128"] * x64
    params = {d: jnp.ones(3, d) for d in dtypes} | {"low": jnp.ones(3, jnp.bfloat16)}
    gradients = jax.tree.map(lambda p: jnp.full(3, 0.3, p.dtype), params)
    inner = adam_jax.adamw(1e-2)
    optimizer = master_weights(inner, remainder)
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(gradients, state, params)
    alone = params | {"low": widened(params["low"])}
    desired, _ = jax.jit(inner.update)(
        gradients | {"low": widened(gradients["low"])}, inner.init(alone), alone
    )
    for d in dtypes:
        chex.assert_trees_all_equal(updates[d], desired[d])
        assert updates[d].dtype == d
        if remainder != "none":
            assert after.remainder[d].shape == ()
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    read = untyped(master_params(params, after))
    for d in dtypes:
        chex.assert_trees_all_equal(read[d], params[d])
        assert read[d].dtype == d


@each_remainder
def test_a_none_gradient_freezes_its_parameter(remainder):
    params, gradients = tree_of("bfloat16") | {"none": None}, tree_of("bfloat16", seed=1)
    gradients |= {"none": None}
    optimizer = untyped(master_weights(adam_jax.adamw(1e-2), remainder))
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    whole, _ = optimizer.update(gradients, state, params)
    updates, after = optimizer.update(gradients | {"kernel": None}, state, params)
    assert updates["kernel"] is None
    # The other leaves stay in their places in the tree, which determine their random bits.
    chex.assert_trees_all_equal(updates["scalar"], whole["scalar"])
    assert updates["none"] is None
    chex.assert_trees_all_equal_structs(state, after)
    if remainder != "none":
        chex.assert_trees_all_equal(after.remainder["kernel"], state.remainder["kernel"])


@pytest.mark.covering
@each_remainder
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_the_state_has_the_documented_types_and_bytes(remainder, dtype, x64):
    params = tree_of(dtype)
    optimizer = master_weights(optax.sgd(0.1), remainder)
    state = optimizer.init(params)
    assert isinstance(state, adam_jax.MasterWeightsState)
    assert state.count.dtype == jnp.int32
    n = sum(p.size for p in jax.tree.leaves(params))
    size = sum(r.nbytes for r in jax.tree.leaves(state.remainder))
    assert size == {"none": 0, "int8": 1, "int16": 2, "float32": 4}[remainder] * n
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(optimizer.init, params), state)
    _, after = train(optimizer, params, tree_of(dtype, (2,)))  # scan's carry may not change types
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert after.count == 2


@each_remainder
def test_optax_tree_functions_and_checkpoints_accept_the_state(remainder, tmp_path):
    params = tree_of("bfloat16") | {"wide": jnp.ones(3)}
    optimizer = master_weights(adam_jax.adamw(1e-2), remainder)
    params, state = train(optimizer, params, tree_of("bfloat16", (3,)) | {"wide": jnp.ones((3, 3))})
    marked = untyped(optax.tree.map_params(optimizer, lambda _: "param", state))
    assert jax.tree.leaves(marked.remainder) == ["param"] * (0 if remainder == "none" else 4)
    assert marked.count == 3
    specs = jax.tree.map(lambda p: p.shape, params)
    with_rest = optax.tree.map_params(
        optimizer, lambda r, shape: jnp.broadcast_to(r, shape), state, specs
    )
    chex.assert_trees_all_equal(optax.tree.get(with_rest, "mu"), optax.tree.get(state, "mu"))

    params, state = jax.tree.map(lambda x: x if x.size else None, (params, state))  # Orbax can't
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"params": params, "state": state})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda p: {"params": p, "state": optimizer.init(p)}, params),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    chex.assert_trees_all_equal(restored, {"params": params, "state": state})


@pytest.mark.covering
@each_remainder
@each_dtype
def test_jit_equals_eager(remainder, dtype):
    """The results are bit-identical if contracting products and sums cannot change the steps."""
    optimizer = master_weights(optax.sgd(0.125), remainder)
    params, gradients = tree_of(dtype), tree_of(dtype, seed=1)
    state = optimizer.init(params)
    for _ in range(3):
        updates, new_state = optimizer.update(gradients, state, params)
        jitted = jax.jit(optimizer.update)(gradients, state, params)
        chex.assert_trees_all_equal((updates, new_state), jitted)
        params, state = optax.apply_updates(params, updates), new_state


@each_remainder
def test_vmap_equals_separate_steps(remainder):
    optimizer, _ = given_steps(remainder)
    params = jnp.stack([jnp.ones(8, jnp.bfloat16), jnp.full(8, -3.0, jnp.bfloat16)])
    steps = jnp.asarray(log_uniform(16, -12, 0)).reshape(2, 8)
    state = jax.vmap(optimizer.init)(params)
    together = jax.vmap(optimizer.update)(steps, state, params)
    for i in range(2):
        alone = optimizer.update(steps[i], optimizer.init(params[i]), params[i])
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], together), alone)


@each_remainder
def test_steps_work_with_donation_and_in_shard_map(remainder):
    optimizer, _ = given_steps(remainder)
    params, steps = tree_of("bfloat16"), widened(tree_of("bfloat16", seed=1))
    state = optimizer.init(params)
    desired = optimizer.update(steps, state, params)
    everywhere = PartitionSpec()
    update = jax.shard_map(
        optimizer.update,
        mesh=Mesh(np.array(jax.devices()[:1]), ("data",)),
        in_specs=(everywhere,) * 3,
        out_specs=everywhere,
    )
    chex.assert_trees_all_equal(jax.jit(update)(steps, state, params), desired)
    donated = jax.tree.map(jnp.copy, (params, state))
    step = jax.jit(
        lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*optimizer.update(steps, s, p)),
        donate_argnums=(0, 1),
    )
    result = step(*donated)
    assert all(x.is_deleted() for x in jax.tree.leaves(donated) if x.size)
    chex.assert_trees_all_equal(result, (optax.apply_updates(params, desired[0]), desired[1]))


# Compilation


def is_jaxpr(x):
    return hasattr(x, "jaxpr") or hasattr(x, "eqns")


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


@pytest.mark.covering
@each_dtype
@each_remainder
def test_nothing_is_cast_from_float32_to_16_bits_and_back(dtype, remainder, x64):
    """XLA for GPU would remove such a pair of casts, and with it the remainder."""
    optimizer = master_weights(adam_jax.adamw(1e-2), remainder)
    params = jnp.ones((4, 8), dtype)
    gradients = jnp.ones((4, 8), dtype)
    state = optimizer.init(params)
    casts = [
        (equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype)
        for equation in equations(jax.make_jaxpr(optimizer.update)(gradients, state, params).jaxpr)
        if equation.primitive.name == "convert_element_type"
        and equation.invars[0].aval.shape == gradients.shape
    ]
    assert not [pair for pair in casts if pair[1] == dtype]
    assert [pair for pair in casts if pair[0] == dtype] == [(dtype, np.float32)]  # the gradient
    assert not [pair for pair in casts if np.float64 in pair]
    compiled = jax.jit(optimizer.update).lower(gradients, state, params).compile().as_text()
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert compiled is not None
    assert f"{short}[4,8]" in compiled
    assert f" = {short}[4,8]{{1,0}} convert(" not in compiled


def test_a_new_step_compiles_nothing():
    optimizer = master_weights(adam_jax.adamw(1e-2), "int8")
    params, gradients = tree_of("bfloat16"), tree_of("bfloat16", seed=1)
    state = optimizer.init(params)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1


# In Flax


X = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
Y = np.sin(X[:, :2])


@pytest.mark.parametrize("remainder", ["none", "int16"])
def test_an_nnx_model_trains(remainder):
    layer = functools.partial(nnx.Linear, param_dtype=jnp.bfloat16)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(layer(8, 32, rngs=rngs), nnx.tanh, layer(32, 2, rngs=rngs))
    optimizer = nnx.Optimizer(model, master_weights(adam_jax.adamw(3e-3), remainder), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    params = nnx.state(model, nnx.Param)
    assert {p.dtype for p in jax.tree.leaves(params)} == {LOW["bfloat16"]}
    assert losses[-1] < 0.5 * losses[0]
    params, state = (
        jax.tree.map(lambda v: v[...], tree, is_leaf=lambda v: isinstance(v, nnx.Variable))
        for tree in (params, optimizer.opt_state)
    )
    master = master_params(params, state)
    nearest = jax.tree.map(lambda w: w.astype(jnp.bfloat16), master)
    chex.assert_trees_all_close(widened(nearest), widened(params), rtol=2.0**-8)


@pytest.mark.parametrize("remainder", ["int8", "float32"])
def test_a_linen_model_trains(remainder):
    layer = functools.partial(nn.Dense, param_dtype=jnp.bfloat16)
    model = nn.Sequential([layer(32), nn.tanh, layer(2)])
    optimizer = master_weights(adam_jax.adamw(3e-3), remainder)
    before, after, losses = linen.train(model, optimizer, X, Y, 60)
    chex.assert_trees_all_equal_dtypes(after, before)
    assert losses[-1] < 0.5 * losses[0]


# Warnings and errors


def test_parameters_without_16_bit_leaves_raise_a_warning():
    """This happens when an example is pasted without its cast."""
    optimizer = master_weights(adam_jax.adam(1e-3), "int8")
    wide = {"w": jnp.ones(3), "b": jnp.ones((), jnp.complex64)}
    for params in (wide, jax.eval_shape(lambda: wide)):
        with pytest.warns(adam_jax.NoLowPrecisionWarning, match=r"cast.*load_master_params"):
            optimizer.init(params)
    optimizer.init(wide | {"low": jnp.ones(3, jnp.float16)})
    optimizer.init({})


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"remainder must be one of 'none', 'int8', .*'int4'"):
        master_weights(optax.sgd(0.1), "int4")
    optimizer = untyped(master_weights(optax.sgd(0.1), "int8"))
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match="master_weights needs the parameters"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(TypeError, match=r"\['w'\] has dtype int32"):
        optimizer.init({"w": jnp.ones(3, jnp.int32)})
    with pytest.raises(ValueError, match=r"\['v'\] is missing in params"):
        optimizer.update({"v": params["w"]}, optimizer.init(params), params)
    with pytest.raises(ValueError, match=r"\['v'\] is missing in state.remainder"):
        optimizer.update({"v": params["w"]}, optimizer.init(params), {"v": params["w"]})
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    promoted = {"w": params["w"] + updates["w"]}  # float32, as equinox's apply_updates adds
    with pytest.raises(TypeError, match=r"\['w'\] is float32, but .* with optax\.apply_updates"):
        optimizer.update(params, state, promoted)
    twice = optax.chain(optimizer, optimizer).init(params)
    for state, found in [(optax.sgd(0.1).init(params), 0), (twice, 2)]:
        with pytest.raises(ValueError, match=f"expected one master_weights state, found {found}"):
            master_params(params, state)
        with pytest.raises(ValueError, match=f"expected one master_weights state, found {found}"):
            load_master_params(params, params, state)
