"""What every optimizer must keep, whichever row of the table it is."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from optimizers import ROWS

import adam_jax
from adam_jax import _storage

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_row_with_peer = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.peer], ids=lambda row: row.name
)

# The dtypes that each of JAX's two modes has.
NARROW = ["float16", "bfloat16", "float32", "complex64"]
WIDE = ["float64", "complex128"]
each_dtype = pytest.mark.parametrize(
    ("dtype", "x64"),
    [(d, False) for d in NARROW] + [(d, True) for d in NARROW + WIDE],
    indirect=["x64"],
)

# How far an update may be from the reference, relative to the leaf's largest: the rounding of the
# update to its own dtype (half an ulp: 2^-11, 2^-8), and the arithmetic's (a few ulps).
TOLERANCE = {
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float32": 2e-6,
    "complex64": 2e-6,
    "float64": 1e-14,
    "complex128": 1e-14,
}


@pytest.fixture(autouse=True)
def small_leaves_in_int8(monkeypatch):
    """The contracts hold for leaves of any size, and small ones are quicker to test."""
    monkeypatch.setattr(_storage, "SMALLEST_INT8_LEAF", 1)
    monkeypatch.setattr(_storage, "SHORTEST_INT8_ROW", 1)


def random(shape, dtype, seed):
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return jnp.asarray(x, dtype)


def params_of(dtype="float32"):
    """Parameters of many shapes: matrix, stack, scalar, one element, no element, None, nothing."""
    shapes = {"kernel": (3, 4), "stack": (2, 2, 3), "scalar": (), "one": (1,), "zero_size": (0, 5)}
    leaves = {name: random(shape, dtype, 0) for name, shape in shapes.items()}
    return leaves | {"none": None, "empty": {}}


def gradients_of(params, steps=None, seed=1):
    """Gradients shaped like the parameters, with an axis of time in front if `steps` is given."""
    time = () if steps is None else (steps,)
    return jax.tree.map(lambda p: random((*time, *p.shape), p.dtype, seed), params)


def run(optimizer, params, gradients):
    """A whole run in one scan: the updates, stacked along time, and the last state."""

    @jax.jit
    def scan(params, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), updates

        (_, state), updates = jax.lax.scan(step, (params, optimizer.init(params)), gradients)
        return updates, state

    return scan(params, gradients)


def assert_close(actual, desired, rtol):
    """Trees equal up to `rtol` times the largest entry of each leaf."""

    def check(a, d):
        dtype = np.complex128 if np.iscomplexobj(d) else np.float64
        a, d = np.asarray(a, dtype), np.asarray(d, dtype)
        np.testing.assert_allclose(a, d, rtol=0, atol=rtol * np.max(np.abs(d), initial=0.0))

    jax.tree.map(check, actual, desired)


def moments_of(state):
    """The trees of the state by their names, as far as the optimizer has them."""
    names = ("mu", "nu", "nu_max", "average")
    found = {name: optax.tree.get_all_with_path(state, name) for name in names}
    trees = {name: tree[0][1] for name, tree in found.items() if tree}
    if isinstance(trees.get("nu"), adam_jax.Int8Moment):
        trees["nu"], trees["scales"] = trees["nu"]
    return trees


def stored_dtypes(row, name, wide):
    """The dtypes of a moment of `params_of`, some of whose leaves are never worth codes."""
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
    """Whether the row refuses these parameters, as it should: no complex mu but in float32."""
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
    for scale in jax.tree.leaves(moments.pop("scales", {})):
        assert scale.dtype == jnp.float32
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
        # A decaying weight carries its own rounding, an ulp of 1 a step, into the updates.
        assert_close(updates, desired, 10 * tolerance)


@each_row
@each_dtype
def test_numbers_shapes_and_dtypes_of_a_run(row, dtype, x64):
    """All in one test, since what takes long is to compile a run."""
    params = params_of(dtype)
    if refused(row, params):
        return
    gradients = gradients_of(params, 20)
    optimizer = row.make()
    first = optimizer.init(params)
    # lax.scan accepts a carry only if a step returns exactly the types that it was given.
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
        # A compiler may contract a product and a sum into one rounding, or not.
        chex.assert_trees_all_close(eager_updates, jit_updates, rtol=1e-6, atol=1e-9)
        chex.assert_trees_all_close(eager_state, state, rtol=1e-6, atol=1e-9)


@each_row
def test_numpy_gradients_and_python_scalars(row):
    optimizer = row.make()
    params = {"array": np.array([1.0, 2.0], np.float32), "scalar": 3.0}
    gradients = {"array": np.array([0.5, -0.5], np.float32), "scalar": 0.25}
    state = optimizer.init(params)
    updates, _ = optimizer.update(gradients, state, params)
    desired = jax.tree.map(lambda g, p: row.updates(np.array([g]), p)[0], gradients, params)
    assert_close(updates, desired, max(1e-6, row.storage_error))


@each_row
def test_vmap_over_hyperparameters(row):
    params = params_of()
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
        alone, _ = run(row.make(**{k: float(x[i]) for k, x in settings.items()}), params, gradients)
        # b2 = 0.999 as a float32 tracer has lost 1e-5 of 1 - b2: half of that is in the update.
        tolerance = max(2e-5, row.storage_error)
        assert_close(jax.tree.map(lambda u, i=i: u[i], together), alone, tolerance)


@each_row
@pytest.mark.usefixtures("standard_promotion")
def test_inject_hyperparams_with_bfloat16_parameters(row):
    params = params_of("bfloat16")
    gradients = gradients_of(params, 20)
    # Rounded to bfloat16, b2 = 0.999 is 1: with that, optax divides 0 by 0.
    rounded = optax.inject_hyperparams(row.factory)(**row.settings)
    exact = optax.inject_hyperparams(row.factory, hyperparam_dtype=jnp.float32)(**row.settings)
    desired, _ = run(row.make(), params, gradients)
    for optimizer, tolerance in [(exact, 2.0**-7), (rounded, 0.02)]:
        updates, _ = run(optimizer, params, gradients)
        chex.assert_tree_all_finite(updates)
        chex.assert_trees_all_equal_dtypes(updates, desired)
        assert_close(updates, desired, max(tolerance, row.storage_error))


@each_row
def test_injected_hyperparameters_can_be_changed_without_compiling_again(row):
    params = params_of()
    gradients = gradients_of(params)
    optimizer = optax.inject_hyperparams(row.factory)(**row.settings)
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
def test_masked(row):
    params = {"trained": random((3, 4), "float32", 0), "frozen": random((5,), "float32", 1)}
    gradients = gradients_of(params)
    optimizer = optax.masked(row.make(), {"trained": True, "frozen": False})
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    chex.assert_trees_all_equal(updates["frozen"], gradients["frozen"])
    alone = row.make()
    desired, _ = alone.update(
        {"t": gradients["trained"]}, alone.init({"t": params["trained"]}), {"t": params["trained"]}
    )
    chex.assert_trees_all_equal(updates["trained"], desired["t"])


@each_row
def test_multi_transform(row):
    params = {"a": random((3, 4), "float32", 0), "b": random((5,), "float32", 1)}
    gradients = gradients_of(params, 3)
    optimizer = optax.multi_transform(
        {"fast": row.make(b1=0.0), "slow": row.make()}, {"a": "fast", "b": "slow"}
    )
    updates, _ = run(optimizer, params, gradients)
    for leaf, alone in [("a", row.make(b1=0.0)), ("b", row.make())]:
        desired, _ = run(alone, {leaf: params[leaf]}, {leaf: gradients[leaf]})
        chex.assert_trees_all_close(updates[leaf], desired[leaf], rtol=1e-6, atol=1e-9)


@each_row
@pytest.mark.usefixtures("standard_promotion")
def test_multi_steps(row):
    params = params_of()
    gradients = gradients_of(params, 6)
    every_second = optax.MultiSteps(row.make(), every_k_schedule=2).gradient_transformation()
    updates, _ = run(every_second, params, gradients)
    means = jax.tree.map(lambda g: (g[0::2] + g[1::2]) / 2, gradients)
    desired, _ = run(row.make(), params, means)
    assert not any(jnp.any(u[0::2]) for u in jax.tree.leaves(updates))
    tolerance = max(2e-6, row.storage_error)
    assert_close(jax.tree.map(lambda u: u[1::2], updates), desired, tolerance)


@each_row
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_apply_if_finite(row, bad):
    params = params_of()
    gradients = gradients_of(params, 5)
    poisoned = gradients | {"kernel": gradients["kernel"].at[2, 0, 0].set(bad)}
    updates, _ = run(optax.apply_if_finite(row.make(), 3), params, poisoned)
    without = jax.tree.map(lambda g: jnp.delete(g, 2, axis=0), gradients)
    desired, _ = run(row.make(), params, without)
    assert not any(jnp.any(u[2]) for u in jax.tree.leaves(updates))
    rest = jax.tree.map(lambda u: jnp.delete(u, 2, axis=0), updates)
    chex.assert_trees_all_close(rest, desired, rtol=1e-6, atol=1e-9)


@each_row
def test_a_nan_gradient_is_not_hidden(row):
    """Only the coordinate that it belongs to suffers (in int8 its row), and there it shows."""
    # Long rows, because XLA for CPU finds the maximum of those with vectors, and loses NaN.
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
def test_flatten(row):
    params = {"a": random((3, 4), "float32", 0), "b": random((5,), "float32", 1)}
    gradients = gradients_of(params, 3)
    updates, _ = run(optax.flatten(row.make()), params, gradients)
    desired, _ = run(row.make(), params, gradients)
    # Flattened, a leaf's elements have other coordinates, and round with other random numbers.
    assert_close(updates, desired, max(2e-6, row.storage_error))


@each_row
def test_chain_with_clipping(row):
    params = params_of()
    gradients = gradients_of(params, 3)
    updates, _ = run(optax.chain(optax.clip(0.1), row.make()), params, gradients)
    clipped = jax.tree.map(lambda g: jnp.clip(g, -0.1, 0.1), gradients)
    desired, _ = run(row.make(), params, clipped)
    chex.assert_trees_all_close(updates, desired, rtol=1e-6, atol=1e-9)


@each_row
def test_extra_args_are_ignored(row):
    params = params_of()
    gradients = gradients_of(params)
    optimizer = row.make()
    state = optimizer.init(params)
    plain = optimizer.update(gradients, state, params)
    extra = optimizer.update(gradients, state, params, value=1.0, grad_fn=None)
    chex.assert_trees_all_equal(plain, extra)


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
        if name != "average":  # a frozen parameter goes on being averaged
            chex.assert_trees_all_equal(moment["kernel"], moments_of(state)[name]["kernel"])
    chex.assert_trees_all_equal_structs(state, after)


@each_row
def test_zero_gradients_make_no_step(row):
    params = jax.tree.map(jnp.zeros_like, params_of())
    zeros = jax.tree.map(lambda p: jnp.zeros((5, *p.shape)), params)
    for settings in ({}, {"eps": 0.0}):
        updates, _ = run(row.make(**settings), params, zeros)
        chex.assert_trees_all_equal(updates, zeros)


@each_row
def test_without_eps_zero_and_tiny_gradients_give_finite_steps_and_derivatives(row):
    """The square of 1e-30 is 0 in float32: a denominator of 0 under a numerator that is not."""
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
    moderate = gradients[jnp.array([0, 0, 0, 4, 4])]  # of 1 / 1e-30 the square is infinite
    assert jnp.isfinite(jax.jacrev(last)(moderate)).all()


@each_row
def test_learning_rate_as_number_schedule_array_tracer_and_tree(row):
    params = {"a": random((3, 4), "float32", 0), "b": {"c": random((5,), "float32", 1)}}
    gradients = gradients_of(params, 4)

    def updates(learning_rate):
        return run(row.make(learning_rate=learning_rate), params, gradients)[0]

    plain = updates(0.02)
    rates = [jnp.float32(0.02), np.float32(0.02), lambda count: 0.02, {"a": 0.02, "b": 0.02}]
    rates += [{"a": lambda count: 0.02, "b": {"c": jnp.float32(0.02)}}]
    for rate in rates:
        chex.assert_trees_all_close(updates(rate), plain, rtol=1e-6)
    chex.assert_trees_all_close(jax.jit(updates)(jnp.float32(0.02)), plain, rtol=1e-6)
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
def test_gradients_through_ten_steps(row, x64):
    """Derivatives of a run: finite where a gradient is 0, and right where it is not."""
    dtype = jnp.float64 if x64 else jnp.float32
    g = np.array([0.0, 1.0, -0.3, 0.02])

    def final(scale):
        growth = jnp.linspace(1, 2, 10, dtype=dtype)
        gradients = jnp.outer(growth, jnp.asarray(g, dtype) * scale)
        updates, _ = run(row.make(eps=1e-2), jnp.ones(4, dtype), gradients)
        return updates.sum(axis=0)

    scale = jnp.ones(4, dtype)
    derivative = jax.jacrev(final)(scale)
    assert jnp.isfinite(derivative).all()
    chex.assert_trees_all_close(derivative, jax.jacfwd(final)(scale), rtol=1e-4, atol=1e-6)
    if x64 and row.differentiable:
        step = 1e-6
        for i in range(4):
            up, down = (final(scale.at[i].add(s)) for s in (step, -step))
            difference = (up - down) / (2 * step)
            np.testing.assert_allclose(derivative[:, i], difference, rtol=1e-6, atol=1e-9)


@each_row
def test_derivatives_by_hyperparameters(row, x64):
    if not x64:
        return
    gradients = jnp.asarray(random((10, 4), "float64", 3))

    def final(b1, b2):
        updates, _ = run(row.make(b1=b1, b2=b2), jnp.ones(4), gradients)
        return updates.sum()

    for b1, b2 in [(0.9, 0.999), (0.3, 0.4)] if row.differentiable else []:
        derivatives = jax.grad(final, argnums=(0, 1))(b1, b2)
        step = 1e-6
        differences = (
            (final(b1 + step, b2) - final(b1 - step, b2)) / (2 * step),
            (final(b1, b2 + step) - final(b1, b2 - step)) / (2 * step),
        )
        np.testing.assert_allclose(derivatives, differences, rtol=2e-5, atol=1e-9)
    assert np.isfinite(jax.grad(final, argnums=(0, 1))(0.0, 0.5)).all()


@each_row_with_peer
def test_the_state_is_optax_state(row):
    params = params_of()
    ours, theirs = row.make().init(params), row.make_peer().init(params)
    chex.assert_trees_all_equal_structs(ours, theirs)
    chex.assert_trees_all_equal(ours, theirs)


@each_row_with_peer
@pytest.mark.usefixtures("standard_promotion")
def test_a_run_of_optax_continues_here_and_back(row):
    params = {"a": random((3, 4), "float32", 0), "b": random((5,), "float32", 1)}
    gradients = gradients_of(params, 12)
    ours, theirs = row.make(), row.make_peer()
    desired, _ = run(theirs, params, gradients)
    for first, then in [(theirs, ours), (ours, theirs)]:
        state, p, updates = first.init(params), params, []
        for i in range(12):
            optimizer = first if i < 6 else then
            u, state = optimizer.update(jax.tree.map(lambda g, i=i: g[i], gradients), state, p)
            p = optax.apply_updates(p, u)
            updates.append(u)
        stacked = jax.tree.map(lambda *u: jnp.stack(u), *updates)
        # 1e-5 is what optax itself loses in its bias correction, see test_numerics.
        assert_close(stacked, desired, 3e-5)


@each_row
def test_optax_tree_functions_find_their_way(row):
    params = params_of()
    optimizer = row.make()
    state = optimizer.init(params)
    chex.assert_trees_all_equal(optax.tree.get(state, "mu"), moments_of(state)["mu"])
    ones = optax.tree.map_params(optimizer, jnp.ones_like, state)
    assert all(jnp.all(x == 1) for x in jax.tree.leaves(moments_of(ones)))
    assert optax.tree.get_all_with_path(ones, "count")[0][1] == 0


@each_row
def test_donated_step(row):
    params = params_of()
    gradients = gradients_of(params)
    optimizer = row.make()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    desired, _ = run(optimizer, params, jax.tree.map(lambda g: g[None], gradients))
    before = jax.tree.map(jnp.copy, params)
    kernel, mu = params["kernel"], moments_of(state)["mu"]["kernel"]
    params, _ = step(params, state)
    assert kernel.is_deleted()
    assert mu.is_deleted()
    expected = jax.tree.map(lambda p, u: p + u[0], before, desired)
    # Relative to the leaf, since a step may cancel a parameter.
    assert_close(params, expected, 1e-6)


@each_row
def test_shard_map(row):
    params = params_of()
    gradients = gradients_of(params)
    optimizer = row.make()
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    everywhere = PartitionSpec()
    update = jax.shard_map(
        optimizer.update, mesh=mesh, in_specs=(everywhere,) * 3, out_specs=everywhere
    )
    state = optimizer.init(params)
    sharded = jax.jit(update)(gradients, state, params)
    chex.assert_trees_all_close(
        sharded, optimizer.update(gradients, state, params), rtol=1e-6, atol=1e-9
    )


@each_row
def test_inside_cond_and_checkpoint(row):
    params = params_of()
    gradients = gradients_of(params)
    optimizer = row.make()
    state = optimizer.init(params)
    desired = optimizer.update(gradients, state, params)

    # As arguments: of constants XLA makes the first codes itself, and adds what is constant first.
    @jax.jit
    def maybe(yes, *args):
        def unchanged(gradients, state, params):
            return jax.tree.map(jnp.zeros_like, gradients), state

        return jax.lax.cond(yes, jax.checkpoint(optimizer.update), unchanged, *args)

    args = gradients, state, params
    chex.assert_trees_all_close(maybe(True, *args), desired, rtol=1e-6, atol=1e-9)
    chex.assert_trees_all_equal(maybe(False, *args)[1], state)


@each_row
def test_eval_shape(row):
    params = params_of("bfloat16")
    optimizer = row.make()
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(optimizer.init, params), optimizer.init(params)
    )


@pytest.mark.usefixtures("standard_promotion")
@each_row
def test_export(row):
    """A step serialized, for platforms that need not be here, and run again.

    As a function of leaves: JAX serializes trees only of types that are registered for it, and
    optax's states are not.
    """
    optimizer = row.make()
    params = {"kernel": jnp.ones((64, 128), jnp.bfloat16), "bias": jnp.ones(128, jnp.bfloat16)}
    gradients = jax.tree.map(lambda p: p / 3, params)
    leaves, tree = jax.tree.flatten((params, optimizer.init(params), gradients))

    @jax.jit
    def step(*leaves):
        params, state, gradients = tree.unflatten(leaves)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.leaves((optax.apply_updates(params, updates), state))

    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*leaves)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda", "tpu")
    for x, y in zip(again.call(*leaves), step(*leaves), strict=True):
        np.testing.assert_array_equal(x, y)
