"""How the moments are stored: bfloat16 and int8, their properties and what they are bound to."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from trees import untyped

import adam_jax
from adam_jax import _int8, _storage
from adam_jax._storage import Draw, Int8Moment


def gradients_of(model, steps, shape, rng):
    """Gradients that are hard on a codec, one of them per step."""
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


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def in_float32(state):
    """mu and nu of a state as float32, whatever they are stored in."""
    return adam_jax.convert_state(state)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@each_format
def test_encode_tells_what_load_will_read(formats, compiled):
    """To the bit: on a GPU a step goes on from the first, on a CPU and a TPU from the second."""
    moments = [
        _storage.Moment(_storage.storage_format("", name), real)
        for name, real in zip(formats, (False, True), strict=True)
    ]
    rng = np.random.default_rng(0)
    m, v = jnp.asarray(np.exp(5 * rng.standard_normal((2, *SHAPE))), jnp.float32)
    m = m * jnp.asarray(rng.choice([-1, 0, 1], SHAPE), jnp.float32)
    like = untyped(tuple(_storage.zeros(moment, m) for moment in moments))
    scale = v.max(axis=-1, keepdims=True) if formats[1] == "int8" else None
    draw = Draw(np.uint32(3), jnp.int32(17))

    def both(m, v, scale):
        encoded, values = _storage.encode((m, v), like, scale, draw)
        return values, _storage.load(_storage.unpack(encoded, like, scale), jnp.float32, draw.step)

    values, read = (jax.jit(both) if compiled else both)(m, v, scale)
    chex.assert_trees_all_equal(values, read)


@pytest.mark.slow
@pytest.mark.covering
@pytest.mark.parametrize("model", MODELS)
@each_format
def test_invariants_on_hard_gradients(model, formats):
    """At every step: nu <= the scale, nu = 0 only where v is, |m| within its bound, no NaN."""
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
            scale = state.nu.scales if isinstance(state.nu, Int8Moment) else stored.nu
            seen = {
                "finite": jnp.isfinite(u).all() & jnp.isfinite(stored.mu).all(),
                # A nu that equals its scale but for rounding may get the next code.
                "nu <= scale": jnp.all(stored.nu <= scale * (1 + 11 / _int8.ALONE.nu)),
                "nu > 0": jnp.all((stored.nu > 0) | (state32.nu < 1e-37)),
                "scale >= largest v": jnp.all(scale >= 0.5 * state32.nu),
                "largest step": jnp.abs(u).max(),
                "float32's largest step": jnp.abs(v).max(),
            }
            return (state, state32), seen

        zeros = jnp.zeros(SHAPE)
        return jax.lax.scan(step, (optimizer.init(zeros), exact.init(zeros)), gradients)

    (state, state32), seen = scan(gradients)
    for name in ("finite", "nu <= scale", "nu > 0", "scale >= largest v"):
        assert seen[name].all(), name
    if formats[0] == "int8":
        assert seen["largest step"].max() < 5.75 * 1.5 * 1.061
    # A step follows from moments that each were at most one code away from the float32 ones.
    assert seen["largest step"].max() < 2 * seen["float32's largest step"].max()
    if model != "stopping":
        ratio = jnp.sqrt(in_float32(state).nu.sum(axis=-1) / state32.nu.sum(axis=-1))
        np.testing.assert_allclose(jnp.median(ratio), 1, atol=0.05)


@pytest.mark.slow
@each_format
def test_no_coordinate_is_stranded(formats):
    """Constant gradients: every direction comes to 1 on average, from a nu once far too large."""
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
    assert jnp.abs(late - 1).max() < 0.15  # every single coordinate, over 15 times nu's memory


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
def test_codes_do_not_see_the_scale_of_gradients(power):
    """All gradients times a power of two: the same codes and the same steps, bit for bit."""
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
    """With b1 = 0.999 and to nearest, it would stay at half of a constant gradient."""
    optimizer = untyped(adam_jax.scale_by_adam(b1=0.999, mu_dtype="bfloat16"))

    @jax.jit
    def run(state):
        step = lambda state, _: optimizer.update(jnp.ones(SHAPE), state)[::-1]  # noqa: E731
        return jax.lax.scan(step, state, length=3000)[0]

    mu = run(optimizer.init(jnp.zeros(SHAPE))).mu.astype(jnp.float32)
    np.testing.assert_allclose(mu.mean(), 1 - 0.999**3000, rtol=0.003)
    assert jnp.abs(mu / mu.mean() - 1).max() < 0.1


def test_bfloat16_nu_does_not_freeze():
    """To nearest it would stick at 0.5, and after a drop of the gradients never come down."""
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
    """A maximum keeps upward rounding errors; bfloat16's are small enough. int8's would not be."""
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
    assert jnp.abs(ratio - 1).max() < 0.15


@pytest.mark.slow
@each_format
def test_shard_map_over_the_rows(formats):
    """The step compiles where leaves vary over a mesh, and gives what it gives without one."""
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
    assert state.nu.scales.shape == ((*shape[:-1], 1) if coded else ())


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


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_a_state_in_another_format_is_refused(format, moment):
    params = {"w": jnp.ones(SHAPE)}
    plain = adam_jax.adam(0.1)
    stored = adam_jax.adam(0.1, **{f"{moment}_dtype": format})
    for optimizer, other in [(plain, stored), (stored, plain)]:
        with pytest.raises(ValueError, match=rf"state\.{moment} is stored in .*convert_state"):
            optimizer.update(params, other.init(params), params)


def test_what_cannot_be_stored_is_refused():
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
def test_a_tree_without_leaves_is_in_every_format(format, params):
    """Such as what a label of optax.multi_transform has that no parameter bears."""
    optimizer = untyped(adam_jax.adam(0.1, mu_dtype=format, nu_dtype=format))
    updates, state = optimizer.update(params, optimizer.init(params))
    assert updates == params
    assert state[0].count == 1


def test_random_words_differ_between_the_moments():
    mu_words, nu_words = Draw(np.uint32(0), jnp.int32(1)).words((64, 64))
    correlation = np.corrcoef(np.ravel(mu_words) / 2.0**32, np.ravel(nu_words) / 2.0**32)
    assert abs(correlation[0, 1]) < 5 / 64


def test_fits_int8_is_what_the_documentation_says():
    assert _storage.SMALLEST_INT8_LEAF == 4096
    assert _storage.SHORTEST_INT8_ROW == 32


def test_the_initial_state_needs_no_computation():
    """XLA would find the maximum of a leaf of zeros while it compiles, in minutes."""
    optimizer = adam_jax.adam(1e-3, mu_dtype="int8", nu_dtype="int8")
    params = jax.ShapeDtypeStruct((2**14, 2**10), jnp.float32)
    operations = {e.primitive.name for e in jax.make_jaxpr(optimizer.init)(params).eqns}
    assert "broadcast_in_dim" in operations
    assert not any(name.startswith(("reduce", "arg")) for name in operations)
