"""Functions that read and convert a state find it in groups, in Flax and on meshes."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from low_precision import REMAINDERS, each_remainder
from optimizers import INT8
from trees import normal, step_of, untyped

import adam_jax
from adam_jax import (
    averaged_params,
    convert_remainder,
    convert_state,
    load_master_params,
    master_params,
    master_weights,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def make(remainder="int8", **formats) -> Any:
    inner = adam_jax.average_params(adam_jax.adamw(1e-3, **formats), 0.9)
    return untyped(master_weights(inner, remainder))


def structures(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


# ------------------------------------------------------------------------------- donated arrays

FUNCTIONS = {
    "master_params": lambda params, state, weights: master_params(params, state),
    "load_master_params": lambda params, state, weights: load_master_params(weights, params, state),
    "convert_remainder": lambda params, state, weights: convert_remainder(params, state, "int8"),
    "averaged_params": lambda params, state, weights: averaged_params(params, state),
    "convert_state": lambda params, state, weights: convert_state(state, "bfloat16"),
}


def deleted(tree):
    return [x.is_deleted() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("started", [False, True], ids=["at first", "after a step"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_donating_results_deletes_no_argument(name, started):
    params = {"low": jnp.ones((8, 8), jnp.bfloat16), "wide": jnp.ones(4)}
    weights = jax.tree.map(lambda p: p.astype(jnp.float32) * 1.001, params)
    optimizer = make()
    state = optimizer.init(params)
    if started:
        _, state = optimizer.update(params, state, params)
    returned = FUNCTIONS[name](params, state, weights)
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(returned)
    assert all(deleted(returned))
    assert not any(deleted((params, state, weights)))


# --------------------------------------------------------------------------------------- groups


def groups(remainder):
    """Labels a whole subtree, which optax then leaves out as a whole."""
    return optax.multi_transform(
        {"low": make(remainder), "plain": adam_jax.adam(1e-3)},
        {"a": "low", "b": {"c": "plain", "d": "low"}},
    )


@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # the other group's
@pytest.mark.parametrize("new", REMAINDERS)
@pytest.mark.parametrize("old", REMAINDERS)
def test_parameters_of_other_groups_stay_untouched(old, new, dtype):
    """Parameters of another group stay untouched, and `optax.MaskedNode` stays in its place."""

    def tree(low, other) -> Any:
        c = {"kernel": jnp.full((2, 3), *other), "bias": [jnp.full(4, *other)]}
        return {"a": jnp.full((4, 4), *low), "b": {"c": c, "d": jnp.full(2, *low)}}

    params, weights = tree((1, "bfloat16"), (1, dtype)), tree((0.1,), (0.1,))
    optimizer = untyped(groups(old))
    _, state = optimizer.update(params, optimizer.init(params), params)
    loaded, loaded_state = untyped(load_master_params(weights, params, state))
    assert structures((loaded, loaded_state)) == structures((params, state))
    rounded = jax.tree.map(lambda w: w.astype(dtype), weights["b"]["c"])
    chex.assert_trees_all_equal(loaded["b"]["c"], rounded)
    read = untyped(master_params(loaded, loaded_state))
    bits = {"none": 8, "int8": 16}.get(old, 24)
    for found, desired in [(read["a"], weights["a"]), (read["b"]["d"], weights["b"]["d"])]:
        np.testing.assert_allclose(found, desired, rtol=2.0**-bits)
        assert found.dtype == jnp.float32
    chex.assert_trees_all_equal(read["b"]["c"], rounded)
    moved, moved_state = convert_remainder(loaded, loaded_state, new)
    assert structures(moved_state) == structures(groups(new).init(params))
    bits = min(bits, {"none": 8, "int8": 16}.get(new, 24))
    after = untyped(master_params(moved, moved_state))
    np.testing.assert_allclose(after["a"], weights["a"], rtol=2.0**-bits)
    groups(new).update(params, moved_state, moved)
    average = untyped(averaged_params(loaded, loaded_state))
    assert average["a"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(average["b"]["c"], rounded)
    statistics = adam_jax.step_statistics(params, loaded_state, params)
    assert {"update_rms/b/c/kernel", "remainder_use/b/d"} - {*statistics} <= (
        {"remainder_use/b/d"} if old == "none" else set()
    )


def test_each_group_may_have_its_own_format():
    """A tree of formats gives each group its format, and may name leaves that a group lacks."""
    params = {"m": jnp.ones((64, 64)), "v": jnp.ones((128, 64))}

    def make(formats):
        return untyped(
            optax.multi_transform(
                {"m": adam_jax.adam(1e-3, **formats), "v": adam_jax.adam(1e-3)},
                {"m": "m", "v": "v"},
            )
        )

    old, new = make({}), make(INT8)
    _, state = old.update(params, old.init(params))
    with pytest.raises(ValueError, match=r"convert_state.*group"):
        new.update(params, state)
    formats = {"m": "int8", "v": None}
    converted = convert_state(state, mu_dtype=formats, nu_dtype=formats)
    updates, _ = new.update(params, converted)
    desired, _ = old.update(params, state)
    np.testing.assert_allclose(updates["m"], desired["m"], rtol=0.05)
    np.testing.assert_array_equal(updates["v"], desired["v"])


# ------------------------------------------------------------------------------------- Flax NNX


class Model(nnx.Module):
    def __init__(self, rngs):
        self.low = nnx.Linear(64, 64, rngs=rngs, param_dtype=jnp.bfloat16)
        self.wide = nnx.Linear(64, 4, rngs=rngs)


def nnx_optimizer(model, remainder="int8", formats: Any = None):
    return nnx.Optimizer(model, make(remainder, **(formats or {})), wrt=nnx.Param)


@pytest.mark.covering
@pytest.mark.parametrize("formats", [None, INT8], ids=["float32", "int8"])
@each_remainder
def test_nnx_states_are_accepted_and_returned(remainder, formats):
    """Accepts `nnx.state(model, nnx.Param)` and `nnx.Optimizer.opt_state`, which box each array."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx_optimizer(model, remainder, formats)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, gradients)
    params, state = nnx.state(model, nnx.Param), optimizer.opt_state
    masters = master_params(params, state)
    assert jax.tree.structure(masters) == jax.tree.structure(params)
    assert {x.dtype for x in jax.tree.leaves(masters)} == {np.dtype(np.float32)}
    loaded = load_master_params(masters, params, state)
    assert structures(loaded) == structures((params, state))
    chex.assert_trees_all_equal(master_params(*loaded), masters)
    average = averaged_params(params, state)
    assert structures(average) == structures(params)
    for new in REMAINDERS:
        like = nnx_optimizer(model, new, formats).opt_state
        assert structures(convert_remainder(params, state, new)) == structures((params, like))
    for new_formats in ({}, INT8):
        like = nnx_optimizer(model, remainder, new_formats).opt_state
        assert structures(convert_state(state, **new_formats)) == structures(like)
    statistics = adam_jax.step_statistics(gradients, state, params, old_state=state)
    paths = {name.partition("/")[2] for name in statistics}
    assert paths == {"", "low/kernel", "low/bias", "wide/kernel", "wide/bias"}
    plain = map(nnx.to_pure_dict, (gradients, params))
    same = adam_jax.step_statistics(next(plain), state, next(plain), old_state=state)
    chex.assert_trees_all_equal(statistics, same)


def test_an_nnx_run_continues_after_conversion():
    model = Model(nnx.Rngs(0))
    old = nnx_optimizer(model, "int16")
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    old.update(model, gradients)
    params, state = convert_remainder(nnx.state(model, nnx.Param), old.opt_state, "float32")
    before = master_params(params, state)
    new = nnx_optimizer(model, "float32")
    nnx.update(model, params)
    nnx.update(new.opt_state, nnx.state(state))
    new.update(model, gradients)
    after = master_params(nnx.state(model, nnx.Param), new.opt_state)
    steps = jax.tree.map(lambda a, b: a - b, after, before)
    for step in jax.tree.leaves(steps):
        np.testing.assert_allclose(step, -1e-3, rtol=0.02, atol=1e-6)


# --------------------------------------------------------------------------------------- meshes


@pytest.mark.covering
@pytest.mark.parametrize("old", REMAINDERS)
@pytest.mark.parametrize("weights_at", ["NumPy", "one device", "replicated", "divided"])
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_zero_1_continues_after_loading_and_converting(axes, weights_at, old):
    """Parameters stay in place; remainders go where the old ones were, or where moments are."""
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(axes,))
    replicated, divided = (NamedSharding(mesh, PartitionSpec(*x)) for x in ((), ("data",)))
    weights = 1 + normal(64, 8)
    place = {"NumPy": None, "one device": jax.devices()[1], "divided": divided}
    place = place.get(weights_at, replicated)
    given = weights if place is None else jax.device_put(weights, place)

    def start(remainder):
        optimizer = make(remainder)
        params = jax.device_put(jnp.ones(weights.shape, jnp.bfloat16), replicated)
        shardings = adam_jax.state_shardings(optimizer, params, axis="data")
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        options = {"out_shardings": (replicated, shardings), "donate_argnums": (0, 1)}
        return params, state, shardings, step_of(optimizer, **options)

    def check(params, state, shardings):
        for x, place in zip(
            jax.tree.leaves((params, state)),
            jax.tree.leaves((replicated, shardings)),
            strict=True,
        ):
            assert x.sharding.is_equivalent_to(place, x.ndim)

    params, state, shardings, step = start(old)
    params, state = load_master_params(given, params, state)
    check(params, state, shardings)
    read = untyped(master_params(params, state))
    assert read.sharding.is_equivalent_to(replicated, 2)
    bits = {"none": 8, "int8": 16}.get(old, 24)
    np.testing.assert_allclose(read, weights, rtol=2.0**-bits, atol=1e-7)
    params, state = step(params, state, params + 0)
    assert untyped(averaged_params(params, state)).sharding.is_equivalent_to(replicated, 2)
    for new in REMAINDERS:
        *_, shardings, step = start(new)
        moved = convert_remainder(params, state, new)
        check(*moved, shardings)
        step(*moved, params + 0)
