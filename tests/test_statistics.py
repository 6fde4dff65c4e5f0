"""Statistics of a step agree with NumPy's on the same arrays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import NamedSharding, PartitionSpec
from optimizers import each_row
from trees import random_tree, untyped

import adam_jax

ALWAYS = {"update_rms", "param_rms", "update_to_param"}
OF_MOMENTS = {"signal_to_noise", "near_bound", "nu_at_smallest"}


def names(statistics):
    """Returns the names of the statistics, over all leaves or over one of them."""
    return {key.partition("/")[0] for key in statistics}


def rms(*arrays):
    values = np.concatenate([np.ravel(np.asarray(x, np.complex128)) for x in arrays])
    return np.sqrt(np.mean(np.abs(values) ** 2)) if values.size else 0.0


def run(optimizer, params, gradients, **kwargs):
    """Returns every step's statistics and updates, from one jitted scan over the gradients."""

    @jax.jit
    def scan(params, gradients):
        def step(carry, g):
            params, old = carry
            updates, state = optimizer.update(g, old, params)
            statistics = adam_jax.step_statistics(updates, state, params, old_state=old, **kwargs)
            return (optax.apply_updates(params, updates), state), (statistics, updates)

        return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[1]

    return scan(params, gradients)


@pytest.mark.covering
@each_row
def test_statistics_agree_with_numpy_for_every_optimizer(
    row, small_leaves_in_int8, standard_promotion
):
    leaves = {
        "float16": ((8, 40), jnp.float16),
        "bfloat16": ((8, 40), jnp.bfloat16),
        "float32": ((8, 40), jnp.float32),
        "complex64": ((8, 40), jnp.complex64),
        "scalar": ((), jnp.float32),
        "zero_size": ((0, 5), jnp.float32),
    }
    if row.mu_format not in (None, "float32"):
        del leaves["complex64"]  # refused
    params = {name: random_tree({"": shape}, dtype)[""] for name, (shape, dtype) in leaves.items()}
    gradients = {
        name: random_tree({"": (5, *shape)}, dtype, seed=1)[""]
        for name, (shape, dtype) in leaves.items()
    }
    infinity_norm = "adamax" in row.name
    statistics, updates = run(row.make(), params, gradients, infinity_norm=infinity_norm)

    assert names(statistics) == ALWAYS | OF_MOMENTS
    chex.assert_shape(list(statistics.values()), (5,))
    chex.assert_type(list(statistics.values()), jnp.float32)
    chex.assert_tree_all_finite(statistics)
    # XLA may omit the rounding of an update to its dtype and go on in float32.
    half_ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
    # The ratio is 1 for equal gradients. Float32's rounding or storage may change it by this.
    atol = max(row.storage_error, 2e-6)
    for chosen in (*([name] for name in leaves), list(leaves)):
        suffix = f"/{chosen[0]}" if len(chosen) == 1 else ""
        ratios = [
            reference.trajectory(gradients[n], eps=0.0, infinity_norm=infinity_norm) for n in chosen
        ]
        for t in range(5):
            of_step = rms(*(updates[name][t] for name in chosen))
            rtol = half_ulp.get(chosen[0], 1e-5) if len(chosen) == 1 else 2.0**-8
            np.testing.assert_allclose(statistics["update_rms" + suffix][t], of_step, rtol=rtol)
            ratio = rms(*(x[t] for x in ratios))
            np.testing.assert_allclose(statistics["signal_to_noise" + suffix][t], ratio, atol=atol)
    np.testing.assert_allclose(statistics["param_rms"][0], rms(*params.values()), rtol=1e-5)
    np.testing.assert_allclose(
        statistics["update_to_param"], statistics["update_rms"] / statistics["param_rms"], rtol=1e-5
    )


def test_jit_and_eager_agree():
    optimizer = adam_jax.adam(1e-3, mu_dtype="int8", nu_dtype="int8")
    params = random_tree({"kernel": (64, 64), "bias": (64,)})
    updates, state = optimizer.update(params, optimizer.init(params), params)
    eager = adam_jax.step_statistics(updates, state, params)
    chex.assert_trees_all_close(
        jax.jit(adam_jax.step_statistics)(updates, state, params), eager, rtol=1e-6
    )


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.5, 0.9), (0.9, 0.81)])
def test_the_bound_is_reached_and_not_exceeded(b1, b2):
    """By Cauchy-Schwarz, gradients that grow by b2 / b1 a step reach the bound."""
    steps = 60
    optimizer = adam_jax.scale_by_adam(b1, b2, eps=0.0)
    growing = (b1 / b2) ** np.arange(steps - 1.0, -1, -1)
    gradients = jnp.asarray(np.stack([growing, np.ones(steps)], axis=1), jnp.float32)
    statistics, _ = run(optimizer, jnp.ones(2), gradients, b1=b1, b2=b2)

    t = np.arange(1.0, steps + 1)
    sums = np.cumsum((b1**2 / b2) ** np.arange(steps))
    bound = (1 - b1) * np.sqrt(sums / (1 - b2)) * np.sqrt(1 - b2**t) / (1 - b1**t)
    ratio = np.sqrt(2 * statistics["signal_to_noise"] ** 2 - 1)  # of the first coordinate
    np.testing.assert_allclose(ratio, bound, rtol=2e-4)
    # The constant gradient's ratio is 1, which counts as near while the bound is below 2.
    np.testing.assert_array_equal(statistics["near_bound"], np.where(bound < 2, 1.0, 0.5))


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.5, 0.9)])
def test_adamax_reaches_its_own_bound(b1, b2):
    steps = 60
    optimizer = adam_jax.scale_by_adamax(b1, b2, eps=0.0)
    shrinking = jnp.asarray(b2 ** np.arange(steps), jnp.float32)
    statistics, _ = run(optimizer, jnp.ones(()), shrinking, b1=b1, b2=b2, infinity_norm=True)
    t = np.arange(1.0, steps + 1)
    bound = (1 - b1) * np.cumsum((b1 / b2) ** np.arange(steps)) / (1 - b1**t)
    np.testing.assert_allclose(statistics["signal_to_noise"], bound, rtol=1e-5)
    assert list(statistics) == sorted(["near_bound", "nu_at_smallest", "signal_to_noise", *ALWAYS])
    np.testing.assert_array_equal(statistics["near_bound"], np.ones(steps))


@pytest.mark.parametrize("b2", [0.0, 0.9])
def test_betas_of_zero_give_finite_statistics(b2):
    optimizer = adam_jax.scale_by_adam(0.0, b2)
    statistics, _ = run(optimizer, jnp.ones(3), jnp.ones((4, 3)), b1=0.0, b2=b2)
    np.testing.assert_allclose(statistics["signal_to_noise"], np.ones(4), rtol=1e-5)
    chex.assert_tree_all_finite(statistics)


@pytest.mark.parametrize(
    ("mu_dtype", "nu_dtype"),
    [(None, "int8"), ("int8", "int8"), ("int8", "bfloat16"), (None, None)],
)
def test_coordinates_with_the_smallest_nu_are_counted(mu_dtype, nu_dtype):
    """A quarter of the coordinates have no gradient, one in 64 has a billionth of the others'."""
    optimizer = adam_jax.adam(1e-3, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    gradients = jnp.ones((64, 64)).at[:, :16].set(0).at[:, 16].set(1e-9)
    params = jnp.ones((64, 64))
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    statistics = adam_jax.step_statistics(updates, state, params)
    # A billionth, squared, is 2^-60 of the row's largest, and codes go down to 2^-79 at least.
    # The smallest two are so close to 0 that some zeros are rounded up to the second.
    assert 0.24 < statistics["nu_at_smallest"] <= 0.25


@pytest.mark.slow
@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("remainder", ["none", "int8", "int16", "float32"])
def test_statistics_use_the_float32_weights(remainder, dtype, standard_promotion):
    inner = adam_jax.adamw(1e-4, mu_dtype="int8", nu_dtype="int8")
    optimizer = untyped(adam_jax.master_weights(inner, remainder))
    weights = random_tree({"kernel": (64, 64), "bias": (64,)})
    old_params = optax.tree.cast(weights, dtype)
    old_params, old = adam_jax.load_master_params(weights, old_params, optimizer.init(old_params))
    updates, state = optimizer.update(old_params, old, old_params)
    params = untyped(optax.apply_updates(old_params, updates))
    statistics = adam_jax.step_statistics(updates, state, old_params, old_state=old)

    before = untyped(adam_jax.master_params(old_params, old))
    after = untyped(adam_jax.master_params(params, state))
    steps = [np.asarray(after[k] - before[k]) for k in params]
    np.testing.assert_allclose(statistics["update_rms"], rms(*steps), rtol=1e-6)
    np.testing.assert_allclose(statistics["param_rms"], rms(*before.values()), rtol=1e-6)
    stored = adam_jax.step_statistics(updates, state, old_params)
    np.testing.assert_allclose(stored["update_rms"], rms(*updates.values()), rtol=1e-6)
    if remainder == "none":
        assert "remainder_use" not in names(statistics)
        return
    # A step is 1e-4 and an ulp 0.001 to 0.008: few stored parameters move, and those far.
    assert stored["update_rms"] > 1.5 * statistics["update_rms"]
    ulps = {
        k: 2.0 ** (np.floor(np.log2(np.abs(np.float64(params[k])))) - jnp.finfo(dtype).nmant)
        for k in params
    }
    left = [(np.float64(after[k]) - np.float64(params[k])) / ulps[k] for k in params]
    # Below a power of two ulps are half as long, which concerns a few elements in 10,000.
    np.testing.assert_allclose(statistics["remainder_use"], rms(*left) * 12**0.5, rtol=0.01)


def test_new_remainders_are_not_in_use(standard_promotion):
    optimizer = adam_jax.master_weights(adam_jax.adam(0.0), "int8")
    params = random_tree({"kernel": (64, 64)}, jnp.bfloat16)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert adam_jax.step_statistics(updates, state, params)["remainder_use"] == 0


def test_remainders_of_half_an_ulp_are_in_use(standard_promotion):
    """They use all bits and no more, though uniform remainders are smaller on average."""
    optimizer = adam_jax.master_weights(adam_jax.adam(0.0), "int16")
    weights = jnp.full(64, 1 + 2**-8 - 2**-20)
    params = weights.astype(jnp.bfloat16)
    params, state = adam_jax.load_master_params(weights, params, optimizer.init(params))
    updates, state = optimizer.update(params, state, params)
    assert adam_jax.step_statistics(updates, state, params)["remainder_use"] == 1


@pytest.mark.parametrize(
    ("wrapper", "gradient"),
    [
        (lambda inner: optax.MultiSteps(inner, 4), 1.0),
        (lambda inner: optax.apply_if_finite(inner, 5), np.nan),
    ],
)
def test_statistics_are_finite_before_the_first_step(wrapper, gradient, standard_promotion):
    params = {"w": jnp.ones(8), "bias": jnp.zeros(8)}
    optimizer = wrapper(adam_jax.adam(1e-3))
    gradients = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    statistics = adam_jax.step_statistics(updates, state, params)
    assert all(np.isfinite(x) for x in statistics.values())
    assert statistics["signal_to_noise"] == statistics["near_bound"] == 0


def test_leaves_without_moments_or_updates_are_left_out():
    """Leaves are masked, frozen or empty, and two optimizers run side by side."""
    params = random_tree({"slow": (4, 4), "fast": (4, 4), "plain": (3,), "frozen": (3,)})
    optimizer = optax.multi_transform(
        {
            "slow": adam_jax.adam(1e-3),
            "fast": adam_jax.amsgrad(1e-1),
            "sgd": optax.sgd(1.0),
        },
        {"slow": "slow", "fast": "fast", "plain": "sgd", "frozen": "slow"},
    )
    gradients = untyped(params | {"frozen": None})
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    statistics = adam_jax.step_statistics(updates, state, params)
    leaves = {key.partition("/")[2] for key in statistics}
    assert leaves == {"", "slow", "fast", "plain"}
    assert {k for k in statistics if k.endswith("plain")} == {f"{name}/plain" for name in ALWAYS}
    np.testing.assert_allclose(statistics["update_rms/slow"], 1e-3, rtol=1e-4)
    np.testing.assert_allclose(statistics["update_rms/fast"], 1e-1, rtol=1e-4)
    np.testing.assert_allclose(statistics["signal_to_noise"], 1, rtol=1e-4)  # of slow and fast


def test_a_parameter_of_zeros_has_finite_statistics():
    optimizer = adam_jax.adam(1e-3)
    params = {"moves": jnp.zeros(3), "rests": jnp.zeros(3)}
    gradients = {"moves": jnp.ones(3), "rests": jnp.zeros(3)}
    updates, state = optimizer.update(gradients, optimizer.init(params))
    statistics = adam_jax.step_statistics(updates, state, params)
    assert statistics["update_to_param/moves"] == statistics["update_to_param"] == 0
    assert statistics["update_to_param/rests"] == 0
    assert statistics["signal_to_noise/rests"] == 0
    assert statistics["near_bound/rests"] == 0


def test_a_single_leaf_has_only_overall_statistics():
    optimizer = adam_jax.adam(1e-3)
    params = jnp.ones(3)
    updates, state = optimizer.update(params, optimizer.init(params))
    assert set(adam_jax.step_statistics(updates, state, params)) == ALWAYS | OF_MOMENTS


def test_vmap_over_settings_works():
    params = random_tree({"kernel": (4, 4)})

    def statistics(b1, b2):
        optimizer = adam_jax.adam(1e-3, b1, b2)
        updates, state = optimizer.update(params, optimizer.init(params))
        return adam_jax.step_statistics(updates, state, params, b1=b1, b2=b2)["signal_to_noise"]

    ratios = jax.vmap(statistics)(jnp.array([0.0, 0.9, 0.99]), jnp.array([0.9, 0.999, 0.5]))
    np.testing.assert_allclose(ratios, np.ones(3), rtol=1e-5)


def test_eight_devices_give_the_same_statistics():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("data",), axis_types=auto, devices=jax.devices("cpu"))
    optimizer = adam_jax.adamw(1e-3, mu_dtype="int8", nu_dtype="int8")
    params = random_tree({"kernel": (64, 128)})
    alone = run(optimizer, params, jax.tree.map(lambda p: p[None], params))[0]
    sharded = jax.device_put(params, NamedSharding(mesh, PartitionSpec("data")))
    together = run(optimizer, sharded, jax.tree.map(lambda p: p[None], sharded))[0]
    chex.assert_trees_all_close(together, alone, rtol=1e-6)


def test_errors_name_what_is_wrong():
    optimizer = adam_jax.adam(1e-3)
    params = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
    updates, state = optimizer.update(params, optimizer.init(params))
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\), got 1.5"):
        adam_jax.step_statistics(updates, state, params, b2=1.5)
    with pytest.raises(ValueError, match="found no state of scale_by_adam"):
        adam_jax.step_statistics(updates, optax.sgd(1e-3).init(params), params)
    with pytest.raises(ValueError, match=r"\['bias'\] is missing in params"):
        adam_jax.step_statistics(updates, state, {"kernel": params["kernel"]})
