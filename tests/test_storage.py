"""How moments are stored in bfloat16 and int8: their properties and error bounds."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from trees import assert_same_bits, directions, normal, random_tree, untyped

import adam_jax
from adam_jax import _storage


def gradients_of(model, steps, shape, rng):
    """Returns gradients that are hard to encode, one for each step."""
    normal = rng.standard_normal((steps, *shape))
    scales = np.exp(rng.standard_normal(shape))
    return {
        "normal": normal,
        "log-normal scales": scales * normal,
        "shrinking": scales * normal * 10.0 ** -np.linspace(0, 12, steps)[:, None, None],
        "growing": scales * normal * 10.0 ** np.linspace(-12, 12, steps)[:, None, None],
        "sparse": normal * (rng.random((steps, *shape)) < 0.05),
        "stopping": normal * (np.arange(steps) < steps // 4)[:, None, None],
        "one spike": np.where(np.arange(steps)[:, None, None] == steps // 2, 1e15, normal),
        "constant": np.broadcast_to(scales, (steps, *shape)),
    }[model]


MODELS = ["normal", "log-normal scales", "shrinking", "growing", "sparse", "stopping"]
MODELS += ["one spike", "constant"]
FORMATS = [("int8", "int8"), ("float32", "int8"), ("int8", "float32"), ("int8", "bfloat16")]
FORMATS += [("bfloat16", "bfloat16")]
each_format = pytest.mark.parametrize("formats", FORMATS, ids="-".join)
SHAPE = (32, 128)
# The distance from the scale's code to the next one, in parts of the scale: the root grows by
# 1/252, and its rough logarithm, which is linear, by nine times as much.
NEXT = 9 / 252


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def in_float32(state):
    """Returns mu and nu of a state in float32, from any storage format."""
    return adam_jax.convert_state(state)


@pytest.mark.slow
@pytest.mark.covering
@pytest.mark.parametrize("model", MODELS)
@each_format
def test_invariants_hold_on_hard_gradients(model, formats):
    """At each step nu <= scale, nu = 0 only where exact nu is, mu is bounded, nothing is NaN."""
    rng = np.random.default_rng(len(model))
    gradients = jnp.asarray(gradients_of(model, 300, SHAPE, rng), jnp.float32)
    stored = adam_jax.scale_by_adam(eps=1e-30, mu_dtype=formats[0], nu_dtype=formats[1])
    optimizer, exact = untyped((stored, adam_jax.scale_by_adam(eps=1e-30)))

    @jax.jit
    def scan(gradients):
        def step(states, g):
            u, state = optimizer.update(g, states[0])
            v, state32 = exact.update(g, states[1])
            stored = in_float32(state)
            coded = formats[1] == "int8"
            scale = state.nu.scales if coded else stored.nu
            seen = {
                "finite": jnp.isfinite(u).all() & jnp.isfinite(stored.mu).all(),
                # A nu that equals its scale up to rounding may get the next code.
                "nu <= scale": jnp.all(stored.nu <= scale * (1 + NEXT)),
                "nu > 0": jnp.all((stored.nu > 0) | (state32.nu < 1e-37)),
                "scale >= largest nu": jnp.all(scale >= 0.5 * state32.nu),
                "largest step": jnp.abs(u).max(),
                "float32's largest step": jnp.abs(v).max(),
            }
            return (state, state32), seen

        zeros = jnp.zeros(SHAPE)
        return jax.lax.scan(step, (optimizer.init(zeros), exact.init(zeros)), gradients)

    (state, state32), seen = scan(gradients)
    for name in ("finite", "nu <= scale", "nu > 0", "scale >= largest nu"):
        assert seen[name].all(), name
    if formats[0] == "int8":
        # 7.75 q, where q is at most unit sqrt(nu), and the unit includes the bias corrections.
        assert seen["largest step"].max() <= 7.75 * 8.4 * np.sqrt(0.1 / 1.9) * (1 + 1e-5)
    # A step uses moments that are each at most one code away from the float32 ones.
    assert seen["largest step"].max() < 2 * seen["float32's largest step"].max()
    if model != "stopping":
        ratio = jnp.sqrt(in_float32(state).nu.sum(axis=-1) / state32.nu.sum(axis=-1))
        np.testing.assert_allclose(jnp.median(ratio), 1, atol=0.05)


@pytest.mark.slow
@each_format
def test_no_coordinate_is_stranded(formats):
    """Under constant gradients each direction averages 1, even after nu was far too large."""
    optimizer = untyped(
        adam_jax.scale_by_adam(eps=1e-30, b2=0.99, mu_dtype=formats[0], nu_dtype=formats[1])
    )
    scales = jnp.exp(jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32))

    @jax.jit
    def run(state):
        def step(state, t):
            return optimizer.update(scales * jnp.where(t < 100, 10.0, 1.0), state)[::-1]

        return jax.lax.scan(step, state, jnp.arange(3000))

    _, updates = run(optimizer.init(scales))
    late = updates[-1500:].mean(axis=0)
    np.testing.assert_allclose(late.mean(), 1, atol=0.02)
    assert jnp.abs(late - 1).max() < 0.15  # each coordinate, over 15 times nu's memory


@pytest.mark.slow
@each_format
def test_moments_decay_to_zero_when_gradients_stop(formats):
    optimizer = untyped(adam_jax.scale_by_adam(eps=1e-8, mu_dtype=formats[0], nu_dtype=formats[1]))

    @jax.jit
    def run(state):
        def step(state, t):
            g = jnp.where(t < 50, jnp.ones(SHAPE), 0.0)
            u, state = optimizer.update(g, state)
            return state, jnp.abs(u).max()

        return jax.lax.scan(step, state, jnp.arange(1500))

    state, steps = run(optimizer.init(jnp.zeros(SHAPE)))
    assert steps[50] > 0.5
    assert steps[-1] < 1e-4
    nu = in_float32(state).nu
    np.testing.assert_allclose(nu.mean(), (1 - 0.999**50) * 0.999**1450, rtol=0.05)


@pytest.mark.parametrize("power", [-20, 10])
def test_codes_do_not_depend_on_the_scale_of_gradients(power):
    """Gradients times a power of two give bit-identical codes and steps."""
    optimizer = untyped(adam_jax.scale_by_adam(eps=0.0, mu_dtype="int8", nu_dtype="int8"))
    gradients = np.random.default_rng(1).standard_normal((20, *SHAPE)).astype(np.float32)

    @jax.jit
    def run(gradients):
        step = lambda state, g: optimizer.update(g, state)[::-1]  # noqa: E731
        return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)

    state, updates = run(jnp.asarray(gradients))
    scaled, scaled_updates = run(jnp.asarray(gradients * np.float32(2.0**power)))
    np.testing.assert_array_equal(state.mu, scaled.mu)
    np.testing.assert_array_equal(state.nu.codes, scaled.nu.codes)
    np.testing.assert_array_equal(updates, scaled_updates)


def test_bfloat16_mu_does_not_stick():
    """Rounded to nearest at b1 = 0.999, it would stop at half of a constant gradient."""
    optimizer = untyped(adam_jax.scale_by_adam(b1=0.999, mu_dtype="bfloat16"))

    @jax.jit
    def run(state):
        step = lambda state, _: optimizer.update(jnp.ones(SHAPE), state)[::-1]  # noqa: E731
        return jax.lax.scan(step, state, length=3000)[0]

    mu = run(optimizer.init(jnp.zeros(SHAPE))).mu.astype(jnp.float32)
    np.testing.assert_allclose(mu.mean(), 1 - 0.999**3000, rtol=0.003)
    assert jnp.abs(mu / mu.mean() - 1).max() < 0.1


def test_bfloat16_nu_does_not_freeze():
    """Rounded to nearest, it would stick at 0.5, and never fall after gradients drop."""
    optimizer = untyped(adam_jax.scale_by_adam(mu_dtype="bfloat16", nu_dtype="bfloat16"))

    @jax.jit
    def run(state):
        def step(state, t):
            return optimizer.update(jnp.where(t < 3000, jnp.ones(SHAPE), 0.1), state)[::-1]

        return jax.lax.scan(step, state, jnp.arange(6000))

    state, _ = run(optimizer.init(jnp.zeros(SHAPE)))
    expected = 0.01 + 0.99 * (1 - 0.999**3000) * 0.999**3000
    np.testing.assert_allclose(state.nu.astype(jnp.float32).mean(), expected, rtol=0.01)
    assert state.nu.dtype == state.mu.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("factory", "denominator"),
    [(adam_jax.scale_by_adamax, "nu"), (adam_jax.scale_by_amsgrad, "nu_max")],
    ids=["adamax", "amsgrad"],
)
def test_a_maximum_in_bfloat16_is_hardly_biased(factory, denominator):
    """A maximum keeps upward rounding errors. Those of bfloat16 are small enough, not of int8."""
    optimizer, exact = factory(mu_dtype="bfloat16", nu_dtype="bfloat16"), factory()
    gradients = np.random.default_rng(2).standard_normal((2000, *SHAPE)).astype(np.float32)

    @jax.jit
    def run(gradients):
        def step(states, g):
            return (optimizer.update(g, states[0])[1], exact.update(g, states[1])[1]), None

        zeros = jnp.zeros(SHAPE)
        return jax.lax.scan(step, (optimizer.init(zeros), exact.init(zeros)), gradients)[0]

    stored, desired = (getattr(state, denominator) for state in run(gradients))
    ratio = stored.astype(jnp.float32) / desired
    np.testing.assert_allclose(ratio.mean(), 1, atol=0.01)
    # A rounding is off by ulp / sqrt(6) (root mean square), where an ulp is 2^-7 at most and
    # 2^-7.5 on average, and 1 / (1 - b2^2) = 500 of them add up: 0.05. Among 4096 coordinates,
    # and over time, errors reach 5 times that.
    assert jnp.abs(ratio - 1).max() < 0.25


@pytest.mark.slow
@each_format
def test_shard_map_over_rows_gives_the_same_results(formats):
    """The step compiles where leaves vary over a mesh, with the same results as without one."""
    optimizer = adam_jax.scale_by_adam(mu_dtype=formats[0], nu_dtype=formats[1])
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    gradients = jnp.asarray(np.random.default_rng(5).standard_normal(SHAPE), jnp.float32)
    state = optimizer.init(gradients)
    rows = PartitionSpec("x")
    specs = jax.tree.map(lambda leaf: rows if leaf.ndim else PartitionSpec(), state)
    update = jax.shard_map(
        optimizer.update, mesh=mesh, in_specs=(rows, specs), out_specs=(rows, specs)
    )
    chex.assert_trees_all_equal(
        jax.jit(update)(gradients, state), optimizer.update(gradients, state)
    )


@pytest.mark.parametrize(
    ("shape", "coded"),
    [(shape, True) for shape in [(64, 64), (4096,), (128, 32), (2, 3, 1024)]]
    + [(shape, False) for shape in [(4095,), (1024, 31), (), (63, 64), (0, 64)]],
)
def test_small_leaves_stay_in_float32(shape, coded):
    optimizer = untyped(adam_jax.scale_by_adam(mu_dtype="int8", nu_dtype="int8"))
    state = optimizer.init(jnp.zeros(shape))
    dtypes = (jnp.int8, jnp.uint8) if coded else (jnp.float32, jnp.float32)
    assert (state.mu.dtype, state.nu.codes.dtype) == dtypes
    for rows in (state.nu.scales, state.nu.units):
        assert (rows.shape, rows.dtype) == ((*shape[:-1], 1) if coded else (), jnp.float32)


def test_the_formats_may_be_dtypes():
    params = jnp.zeros(SHAPE)
    for name in ("float32", "bfloat16", "int8"):
        by_name = adam_jax.scale_by_adam(mu_dtype=name, nu_dtype=name).init(params)
        by_dtype = adam_jax.scale_by_adam(mu_dtype=jnp.dtype(name), nu_dtype=getattr(jnp, name))
        assert dtypes(by_dtype.init(params)) == dtypes(by_name)


def test_a_state_in_bfloat16_is_optax_state():
    params = {"w": jnp.zeros(SHAPE), "b": jnp.zeros(3)}
    ours = adam_jax.adam(1e-3, mu_dtype="bfloat16").init(params)
    theirs = optax.adam(1e-3, mu_dtype="bfloat16").init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert dtypes(ours) == dtypes(theirs)


# ------------------------------------------------------------------ edited states

WITH_CODES = [("int8", None), ("int8", "bfloat16"), ("int8", "int8")]
each_with_codes = pytest.mark.parametrize("formats", WITH_CODES, ids=str)
SQUARE = (64, 64)


@functools.cache
def a_run(formats, seed=0, steps=20):
    """Returns an optimizer, its jitted step, the state after some normal gradients, and another."""
    optimizer = untyped(adam_jax.scale_by_adam(mu_dtype=formats[0], nu_dtype=formats[1]))
    gradients = normal(steps + 1, *SQUARE, seed=seed)
    _, state = directions(optimizer, gradients[:-1])
    return optimizer, jax.jit(optimizer.update), state, jnp.asarray(gradients[-1])


@each_with_codes
def test_mu_does_not_depend_on_betas_or_count(formats):
    _, _, state, g = a_run(formats)
    mu = in_float32(state).mu
    for count in (0, 3, 10**6):
        edited = state._replace(count=jnp.int32(count))
        np.testing.assert_array_equal(in_float32(edited).mu, mu)
    other = adam_jax.scale_by_adam(b1=0.5, b2=0.9, mu_dtype=formats[0], nu_dtype=formats[1])
    _, after = jax.jit(other.update)(g, state._replace(count=jnp.int32(3)))
    desired = 0.5 * mu + 0.5 * g
    mu = in_float32(after).mu
    # The only noise is mu's, in 7 or 6 bits; the mean of 4096 reduces it to a 64th.
    error = jnp.linalg.norm(mu - desired) / jnp.linalg.norm(desired)
    assert error < 0.05
    np.testing.assert_allclose(jnp.vdot(mu, desired) / jnp.vdot(desired, desired), 1, atol=0.003)


@each_with_codes
def test_momentum_can_be_reset_to_zero(formats):
    """Resets all momentum, or some columns, as for new rows of an embedding."""
    _, step, state, g = a_run(formats)
    before = in_float32(state)
    for reset in (jnp.ones(64, bool), jnp.arange(64) % 3 == 0):
        edited = state._replace(mu=jnp.where(reset, jnp.int8(0), state.mu))
        after = in_float32(edited)
        np.testing.assert_array_equal(after.mu, jnp.where(reset, 0, before.mu))
        # A code is up to 1/28 of nu; resetting mu clears the lowest of nu's nine bits.
        np.testing.assert_allclose(after.nu, before.nu, rtol=0.04)
        updates, _ = step(g, edited)
        desired, _ = adam_jax.scale_by_adam().update(g, after)
        error = jnp.linalg.norm(updates - desired) / jnp.linalg.norm(desired)
        assert (
            error < 0.08
        )  # the noise of one step: see `test_an_update_stays_within_its_error_bound`


def mean_of(a, b):
    return ((a.astype(jnp.float32) + b.astype(jnp.float32)) / 2).astype(a.dtype)


@pytest.mark.parametrize("formats", [*WITH_CODES, (None, "int8")], ids=str)
def test_averaged_codes_give_nan(formats, request):
    """Codes cannot be averaged, as a mean over replicas or federated averaging would do."""
    if formats[1] != "int8":
        reason = "with nu in a float, two runs at one count have the same units"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    _, step, state, g = a_run(formats)
    _, _, other, _ = a_run(formats, seed=1)
    chex.assert_trees_all_equal(jax.tree.map(mean_of, state, state), state)
    updates, _ = step(g, jax.tree.map(mean_of, state, other))
    # All 64 rows, except that 1 checksum in 4096 matches by chance.
    assert np.sum(np.isnan(updates).all(axis=-1)) >= 63


@pytest.mark.parametrize("formats", [*WITH_CODES, (None, "int8")], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cast_codes_are_refused(formats, dtype):
    optimizer, _, state, g = a_run(formats)
    _, _, other, _ = a_run(formats, seed=1)
    cast = jax.tree.map(lambda x: x.astype(dtype), state)
    averaged = jax.tree.map(lambda x, y: (x.astype(dtype) + y.astype(dtype)) / 2, state, other)
    for edited in (cast, averaged):
        with pytest.raises(ValueError, match=r"is stored in (bfloat16|float32), but this"):
            jax.eval_shape(optimizer.update, g, edited._replace(count=state.count))


# ------------------------------------------------------------------ the error of a step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("betas", "bound"),
    [
        *[((0.9, 0.999), 0.085), ((0.9, 0.98), 0.085), ((0.9, 0.95), 0.085), ((0.8, 0.9), 0.085)],
        *[((0.95, 0.95), 0.1), ((0.95, 0.99), 0.1), ((0.9, 0.9999), 0.1), ((0.98, 0.92), 0.15)],
    ],
)
def test_an_update_stays_within_its_error_bound(betas, bound):
    """Compares the worst of the first 1000 steps on normal gradients with float32.

    docs/formats.md promises these bounds for these decay rates.
    """
    optimizer = untyped(adam_jax.scale_by_adam(*betas, eps=1e-30, mu_dtype="int8", nu_dtype="int8"))
    exact = untyped(adam_jax.scale_by_adam(*betas, eps=1e-30))

    @jax.jit
    def run():
        def step(states, t):
            g = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), SQUARE)
            u, state = optimizer.update(g, states[0])
            desired, state32 = exact.update(g, states[1])
            return (state, state32), jnp.linalg.norm(u - desired) / jnp.linalg.norm(desired)

        zeros = jnp.zeros(SQUARE)
        return jax.lax.scan(step, (optimizer.init(zeros), exact.init(zeros)), jnp.arange(1000))[1]

    assert run().max() <= bound


@jax.jit
def first_step_of_ones(b1, b2):
    """Returns the first direction's mean in int8; decay rates are traced, so this compiles once."""
    optimizer = untyped(adam_jax.scale_by_adam(b1, b2, mu_dtype="int8", nu_dtype="int8"))
    return optimizer.update(jnp.ones(SQUARE), optimizer.init(jnp.ones(SQUARE)))[0].mean()


def test_a_first_step_is_one_with_any_betas():
    betas = [(b1, b2) for b1 in (0, 0.5, 0.9, 0.99) for b2 in (0.99, 0.999, 0.9999, 0.999999)]
    found = jax.lax.map(lambda b: first_step_of_ones(*b), jnp.asarray(betas, jnp.float32))
    np.testing.assert_allclose(found, 1, atol=0.01)


@pytest.mark.slow
def test_a_rare_gradient_is_not_cut_off():
    """A gradient after 20,000 steps without any moves mu as far beyond sqrt(nu) as possible."""

    def last_step(betas, format):
        optimizer = untyped(adam_jax.scale_by_adam(*betas, mu_dtype=format, nu_dtype=format))
        ones = jnp.ones(SQUARE)
        _, state = optimizer.update(ones, optimizer.init(ones))
        silence = lambda state, _: (optimizer.update(0 * ones, state)[1], None)  # noqa: E731
        state, _ = jax.lax.scan(silence, state, length=20_000)
        return optimizer.update(ones, state)[0].mean()

    betas = jnp.asarray([(0.9, 0.999), (0.8, 0.999), (0.5, 0.999), (0, 0.999)], jnp.float32)
    found, desired = (
        jax.jit(lambda betas, format=format: jax.lax.map(lambda b: last_step(b, format), betas))(
            betas
        )
        for format in ("int8", "float32")
    )
    np.testing.assert_allclose(found, desired, rtol=0.02)


# ------------------------------------------------------------------ infinity, NaN, float64


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("nu", [None, "bfloat16", "int8"])
def test_infinity_and_nan_spread_only_as_documented_in_int8(nu, bad):
    """Its coordinate stays NaN, and with codes of nu so does its row."""
    optimizer = untyped(adam_jax.scale_by_adam(mu_dtype="int8", nu_dtype=nu))
    g = jnp.ones(SQUARE).at[3, 5].set(bad)
    poisoned = np.zeros(SQUARE, bool)
    poisoned[3, slice(None) if nu == "int8" else 5] = True
    step = jax.jit(optimizer.update)
    for eager in (False, True):
        updates, state = (optimizer.update if eager else step)(g, optimizer.init(g))
        for _ in range(2):
            np.testing.assert_array_equal(np.isnan(updates), poisoned)
            assert np.isfinite(np.asarray(updates)[~poisoned]).all()
            np.testing.assert_array_equal(np.isnan(in_float32(state).mu), poisoned)
            updates, state = step(jnp.ones(SQUARE), state)


only_x64 = pytest.mark.parametrize("x64", [True], indirect=True)
NARROW = [(None, None), ("int8", None), (None, "float32"), (None, "bfloat16"), ("int8", "bfloat16")]
NARROW += [("int8", "int8"), ("bfloat16", "float32"), (None, "int8")]


@only_x64
@pytest.mark.parametrize("formats", NARROW, ids=str)
def test_float64_gradients_beyond_a_narrow_format_make_no_long_step(formats, x64):
    """No step is longer than 1.2 where the exact one is 1: noise lengthens it up to 1.2."""
    # This would fail for mu in float64 with nu in int8: a scale below 2^-126 is 0, mu is not.

    def longest(g, eps):
        optimizer = untyped(
            adam_jax.scale_by_adam(eps=eps, mu_dtype=formats[0], nu_dtype=formats[1])
        )
        step = lambda state, _: optimizer.update(g, state)[::-1]  # noqa: E731
        return jnp.abs(jax.lax.scan(step, optimizer.init(g), length=30)[1]).max()

    values = [(1e30, 1e-8), (1e25, 1e-8), (1e-18, 0.0), (1e-20, 0.0), (1e-20, 1e-30), (1e-300, 0.0)]
    g, eps = jnp.asarray(values, jnp.float64).T
    found = jax.jit(jax.vmap(lambda g, eps: longest(jnp.full(SQUARE, g), eps)))(g, eps)
    assert np.all(found <= 1.2), dict(zip(values, found.tolist(), strict=True))


@only_x64
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_a_float64_state_converts_to_narrow_formats(format, x64):
    """Where its moments are beyond float32's range, their ratio is preserved."""
    exact = untyped(adam_jax.scale_by_adam())
    narrow = untyped(adam_jax.scale_by_adam(mu_dtype=format, nu_dtype=format))
    rng = np.random.default_rng(0)
    for size in (1e-10, 1.0, 1e15, 1e25, 1e100):
        g = jnp.asarray(size * rng.standard_normal(SQUARE))
        _, state = exact.update(g, exact.init(g))
        converted = adam_jax.convert_state(state, format, format)
        moments = [(x.mu, x.nu) for x in map(adam_jax.convert_state, (state, converted))]
        (m, v), (m_narrow, v_narrow) = np.asarray(moments, np.float64)
        ratio = (m_narrow / np.sqrt(v_narrow)) / (m / np.sqrt(v))
        assert np.isfinite(ratio).all()
        # The errors of one rounding: 6 bits of mu and 9 of nu, or 8 of each, or 24.
        rms = np.sqrt(np.mean(np.square(ratio - 1)))
        assert rms < {"float32": 1e-6, "bfloat16": 0.01, "int8": 0.1}[format], size
        updates, _ = narrow.update(jnp.zeros(SQUARE, jnp.float32), converted)
        desired, _ = exact.update(jnp.zeros(SQUARE), state)
        error = np.linalg.norm(np.float64(updates) - desired) / np.linalg.norm(desired)
        assert error < {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.15}[format], size


# ------------------------------------------------------------------ a format for each leaf

PARAMS = {
    "embed": jnp.zeros((64, 128)),
    "rest": {"kernel": jnp.zeros((128, 64)), "bias": jnp.zeros(64)},
    "scale": jnp.zeros((64, 64)),
}
MU = {"embed": "float32", "rest": "int8", "scale": None}
NU = {"embed": "bfloat16", "rest": {"kernel": "int8", "bias": "bfloat16"}, "scale": jnp.int8}


def test_each_leaf_may_have_its_own_format():
    optimizer = untyped(adam_jax.scale_by_adam(mu_dtype=MU, nu_dtype=NU))
    gradients = [random_tree(jax.tree.map(jnp.shape, flat(PARAMS)), seed=i) for i in range(3)]
    state = optimizer.init(PARAMS)
    assert isinstance(state.nu, adam_jax.Int8Moment)
    names = lambda tree: jax.tree.map(lambda x: x.dtype.name, flat(tree))  # noqa: E731
    mu = {"embed": "float32", "bias": "float32", "kernel": "int8", "scale": "float32"}
    nu = {"embed": "bfloat16", "bias": "bfloat16", "kernel": "uint8", "scale": "uint8"}
    assert names(state.mu) == mu
    assert names(state.nu.codes) == nu
    shapes = {"embed": (), "bias": (), "kernel": (128, 1), "scale": (64, 1)}
    assert jax.tree.map(jnp.shape, flat(state.nu.scales)) == shapes
    assert jax.tree.map(jnp.shape, flat(state.nu.units)) == shapes
    # Each leaf behaves as if all leaves had its formats: its number in the tree is the same.
    found = run_of(optimizer, PARAMS, [nested(g) for g in gradients])
    for name, formats in {
        "embed": ("float32", "bfloat16"),
        "bias": ("int8", "bfloat16"),
        "kernel": ("int8", "int8"),
        "scale": (None, "int8"),
    }.items():
        alone = adam_jax.scale_by_adam(mu_dtype=formats[0], nu_dtype=formats[1])
        desired = run_of(alone, PARAMS, [nested(g) for g in gradients])
        for (u, state), (v, other) in zip(found, desired, strict=True):
            assert_same_bits(flat(u)[name], flat(v)[name])
            assert_same_bits(flat(state.mu)[name], flat(other.mu)[name])
            nu = state.nu.codes, state.nu.scales, state.nu.units
            other_nu = tuple(other.nu) if isinstance(other.nu, tuple) else (other.nu,)
            for x, y in zip(nu, other_nu, strict=False):
                assert_same_bits(flat(x)[name], flat(y)[name])


def flat(tree):
    """Returns a tree like `PARAMS` as a dict of its leaves by name."""
    return {"embed": tree["embed"], **tree["rest"], "scale": tree["scale"]}


def nested(leaves):
    rest = {name: leaves[name] for name in ("kernel", "bias")}
    return {"embed": leaves["embed"], "rest": rest, "scale": leaves["scale"]}


def run_of(optimizer, params, gradients):
    state, step, outcome = optimizer.init(params), jax.jit(optimizer.update), []
    for g in gradients:
        updates, state = step(g, state)
        outcome.append((updates, state))
    return outcome


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_a_state_in_another_format_is_refused(format, moment):
    # This would fail for mu in int8 if the message named nu and advised a wrong nu_dtype.
    params = {"w": jnp.ones(SHAPE)}
    plain = adam_jax.adam(0.1)
    stored = adam_jax.adam(0.1, **{f"{moment}_dtype": format})
    for optimizer, other in [(plain, stored), (stored, plain)]:
        with pytest.raises(
            ValueError, match=rf"state\.{moment}(\['w'\])? is stored in .*convert_state"
        ):
            optimizer.update(params, other.init(params), params)


def test_a_leaf_in_another_format_is_refused_by_its_path():
    def optimizer(mu, nu):
        return adam_jax.adam(0.1, mu_dtype=mu, nu_dtype=nu)

    def message(moment, found, expected):
        return (
            rf"state\.{moment}\['rest'\]\['kernel'\] is stored in {found}, but this optimizer "
            rf"stores it in {expected}\..*convert_state"
        )

    state = optimizer(MU, NU).init(PARAMS)
    others = {
        "mu": MU | {"rest": {"kernel": "bfloat16", "bias": "int8"}},
        "nu": NU | {"rest": "bfloat16"},
    }
    for moment, found in [("mu", "int8"), ("nu", "int8")]:
        other = optimizer(**{"mu": MU, "nu": NU} | {moment: others[moment]})
        with pytest.raises(ValueError, match=message(moment, found, "bfloat16")):
            other.update(PARAMS, state, PARAMS)
        with pytest.raises(ValueError, match=message(moment, "bfloat16", found)):
            optimizer(MU, NU).update(PARAMS, other.init(PARAMS), PARAMS)


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
def test_unknown_formats_are_refused(name):
    for format in ("int4", "float16", jnp.float16, {"embed": "int8", "rest": "fp8"}, 3):
        with pytest.raises(ValueError, match=rf"{name} must be None or one of 'float32', 'bfloat"):
            untyped(adam_jax.adam)(0.1, **{name: format})
        with pytest.raises(ValueError, match=rf"{name} must be None or one of"):
            adam_jax.convert_state(adam_jax.adam(0.1).init(PARAMS), **{name: format})
    for prefix in ({"embed": "int8"}, MU | {"more": "int8"}, ["int8"] * 3, {**MU, "embed": MU}):
        optimizer = untyped(adam_jax.adam)(0.1, **{name: prefix})
        with pytest.raises(ValueError, match=rf"{name} must be one value or a tree prefix"):
            optimizer.init(PARAMS)
        with pytest.raises(ValueError, match=rf"{name} must be one value or a tree prefix"):
            adam_jax.convert_state(adam_jax.adam(0.1).init(PARAMS), **{name: prefix})
        with pytest.raises(
            ValueError, match=r"_dtype must be one value or a tree prefix|is stored"
        ):
            optimizer.update(PARAMS, adam_jax.adam(0.1).init(PARAMS), PARAMS)


def test_moments_that_a_format_cannot_store_are_refused():
    for factory in (adam_jax.adamax, adam_jax.adamaxw, adam_jax.amsgrad):
        with pytest.raises(ValueError, match=r"nu_dtype can't be 'int8' here: .* is a maximum"):
            factory(0.1, nu_dtype="int8")
    with pytest.raises(ValueError, match=r"mu_dtype can't be 'int8' here: .* AdaMax does not have"):
        adam_jax.scale_by_adamax(mu_dtype="int8")
    for format in ("bfloat16", "int8"):
        with pytest.raises(TypeError, match=r"parameter \['w'\] has dtype complex64, and mu_dtype"):
            adam_jax.adam(0.1, mu_dtype=format).init({"w": jnp.ones(SHAPE, jnp.complex64)})


@pytest.mark.parametrize("params", [{}, {"a": None}], ids=["no leaf", "none"])
@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_a_tree_without_leaves_fits_every_format(format, params):
    """optax.multi_transform makes such a tree for a label that no parameter has."""
    optimizer = untyped(adam_jax.adam(0.1, mu_dtype=format, nu_dtype=format))
    updates, state = optimizer.update(params, optimizer.init(params))
    assert updates == params
    assert state[0].count == 1


def test_the_smallest_int8_leaf_is_as_documented():
    assert _storage.SMALLEST_INT8_LEAF == 4096
    assert _storage.SHORTEST_INT8_ROW == 32


def test_the_initial_state_needs_no_computation():
    """XLA would compute the maximum of a leaf of zeros while compiling, for minutes."""
    optimizer = adam_jax.adam(1e-3, mu_dtype="int8", nu_dtype="int8")
    params = jax.ShapeDtypeStruct((2**14, 2**10), jnp.float32)
    operations = {e.primitive.name for e in jax.make_jaxpr(optimizer.init)(params).eqns}
    assert "broadcast_in_dim" in operations
    assert not any(name.startswith(("reduce", "arg")) for name in operations)
