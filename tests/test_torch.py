"""A training run that torch began continues here, on torch's trajectory, and back in torch.

golden/torch_training.npz, written by the script in that folder, records torch's run: 20 steps
before we continue, and 20 more to compare with. torch_round_trip.py runs torch itself.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adam_jax

HALF, STEPS, BATCH = 20, 40, 32
NAMES = ["adam", "adamw", "nadam", "adamax", "amsgrad"]
each_optimizer = pytest.mark.parametrize("name", NAMES)

# Between double precision here and in torch: 20 steps of a few hundred ulps (2^-53) each, because
# sums of products have another order, times the network's response. Measured: 2e-15.
TOLERANCE = 1e-12


class Network(nnx.Module):
    """torch's network written in Flax: channels come last, and kernels are transposed."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        double = {"param_dtype": jnp.float64, "rngs": rngs}
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, padding="VALID", **double)
        self.dense = nnx.Linear(4 * 3 * 3, 10, **double)

    def __call__(self, images):
        x = nnx.tanh(self.conv(images[..., None]))
        return self.dense(x.reshape(len(x), -1))


def to_params(torch):
    """Returns torch's weights in Flax's layout."""
    dense = torch["3.weight"].reshape(10, 4, 3, 3)  # its inputs are channels, rows and columns
    return {
        "conv": {"kernel": torch["0.weight"].transpose(2, 3, 1, 0), "bias": torch["0.bias"]},
        "dense": {"kernel": dense.transpose(2, 3, 1, 0).reshape(-1, 10), "bias": torch["3.bias"]},
    }


@functools.cache
def golden():
    with np.load(Path(__file__).parent / "golden" / "torch_training.npz") as file:
        return dict(file)


def recorded(name, step):
    """Returns torch's state_dict, and its weights in the order of torch's optimizer."""
    arrays = golden()
    groups = json.loads(str(arrays[f"{name}/groups"]))
    state = {}
    for path, array in arrays.items():
        if path.startswith(f"{name}/{step}/state/"):
            key, field = path.split("/")[3:]
            state.setdefault(int(key), {})[field] = array
    weights = {path: arrays[f"{name}/{step}/weights/{path}"] for path in arrays[f"{name}/order"]}
    return {"state": state, "param_groups": groups}, weights


def optimizer_like(name, groups):
    """Returns our optimizer with the hyperparameters of torch's groups."""

    def make(group, **more):
        (b1, b2), factory = group["betas"], getattr(adam_jax, name)
        return factory(group["lr"], b1, b2, group["eps"], **more)

    if name == "adam":  # two groups that differ in the betas too
        labels = {"conv": "first", "dense": "last"}
        optimizers = zip(["first", "last"], map(make, groups), strict=True)
        return optax.multi_transform(dict(optimizers), labels)
    if name == "adamw":  # two groups, one of which does not decay
        decays = {layer: {"kernel": True, "bias": False} for layer in ("conv", "dense")}
        return make(groups[0], weight_decay=groups[0]["weight_decay"], mask=decays)
    return make(groups[0])


def continued(name, torch_state, weights):
    """Returns parameters, state and losses of the second half, in Flax with our optimizer."""
    graph, _ = nnx.split(Network())
    optimizer = optimizer_like(name, torch_state["param_groups"])
    params = to_params({path: jnp.asarray(x) for path, x in weights.items()})
    state = adam_jax.from_torch(torch_state, weights, to_params, optimizer.init(params))
    images = jnp.asarray(golden()["images"] / (16 * 255))
    labels = jnp.asarray(golden()["labels"].astype(np.int32))

    def loss_of(params, start):
        logits = nnx.merge(graph, params)(jax.lax.dynamic_slice_in_dim(images, start, BATCH))
        targets = jax.lax.dynamic_slice_in_dim(labels, start, BATCH)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(carry, start):
        params, state = carry
        loss, gradients = jax.value_and_grad(loss_of)(params, start)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    starts = jnp.arange(HALF, STEPS) * BATCH % len(images)
    (params, state), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, starts))(
        (params, state)
    )
    return params, state, losses


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("x64", [True], indirect=True, ids=["x64"])
@each_optimizer
def test_a_torch_run_continues_here_and_back(name, x64):
    torch_state, weights = recorded(name, HALF)
    params, state, losses = continued(name, torch_state, weights)
    desired_state, desired_weights = recorded(name, STEPS)
    np.testing.assert_allclose(losses, golden()[f"{name}/losses"][HALF:], rtol=TOLERANCE)
    like = {path: jnp.asarray(x) for path, x in weights.items()}
    (returned,) = jax.linear_transpose(to_params, like)(params)
    for path, desired in desired_weights.items():
        np.testing.assert_allclose(returned[path], desired, rtol=TOLERANCE, atol=TOLERANCE)
    actual = adam_jax.to_torch(state, torch_state, weights, to_params)
    assert actual["param_groups"] == desired_state["param_groups"]
    assert actual["state"].keys() == desired_state["state"].keys()
    for key, desired in desired_state["state"].items():
        assert actual["state"][key].keys() == desired.keys()
        for field, array in desired.items():
            x = actual["state"][key][field]
            assert (x.shape, x.dtype) == (array.shape, array.dtype), field
            atol = TOLERANCE * np.abs(array).max()
            np.testing.assert_allclose(x, array, rtol=0, atol=atol, err_msg=field)


# ------------------------------------------------------------------ forms of a state

ROWS, COLUMNS = 64, 96  # enough for int8
GROUP = {"betas": (0.9, 0.999), "weight_decay": 0.0, "amsgrad": False}


def transposed(torch):
    return {"body": {"kernel": torch["weight"].T}, "bias": torch["bias"]}


def small_torch(step=7, **group):
    """Returns the state_dict and the weights of a dense layer that torch has trained."""
    rng = np.random.default_rng(0)
    weights = {"weight": np.zeros((ROWS, COLUMNS), np.float32), "bias": np.zeros(ROWS, np.float32)}
    state = {
        i: {
            "step": step,
            "exp_avg": rng.normal(0, 0.1, x.shape).astype(np.float32),
            "exp_avg_sq": (0.02 * rng.chisquare(1, x.shape)).astype(np.float32),
        }
        for i, x in enumerate(weights.values())
    }
    return {"state": state, "param_groups": [{"params": [0, 1], **GROUP, **group}]}, weights


def moved(optimizer, torch_state, weights, to_params=transposed, dtype=jnp.float32):
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), jax.eval_shape(to_params, weights))
    return adam_jax.from_torch(torch_state, weights, to_params, optimizer.init(params))


@pytest.mark.parametrize(
    "step", [7, 7.0, np.float32(7), np.array(7.0), jnp.asarray(7)], ids=lambda step: str(type(step))
)
def test_steps_may_have_any_numeric_type(step):
    state = moved(adam_jax.adam(1e-3), *small_torch(step))
    assert state[0].count.dtype == jnp.int32
    assert state[0].count == 7


@pytest.mark.parametrize("keys", ["numbers", "numbers and names", "names"])
def test_names_and_order_of_groups_are_respected(keys):
    (torch_state, weights), names = small_torch(), ["bias", "weight"]
    weight, bias = torch_state["state"].values()
    groups = [{**GROUP, "params": [0]}, {**GROUP, "params": [1]}]  # biases first
    state = {0: bias, 1: weight}
    if keys == "numbers":
        weights = {name: weights[name] for name in names}
    elif keys == "numbers and names":
        for group, name in zip(groups, names, strict=True):
            group["param_names"] = [name]
    else:
        state = dict(zip(names, state.values(), strict=True))
        for group, name in zip(groups, names, strict=True):
            group["params"] = [name]
    torch_state = {"state": state, "param_groups": groups}
    ours = moved(adam_jax.adamw(1e-3), torch_state, weights)
    np.testing.assert_array_equal(ours[0].mu["body"]["kernel"], weight["exp_avg"].T)
    np.testing.assert_array_equal(ours[0].nu["bias"], bias["exp_avg_sq"])
    back = adam_jax.to_torch(ours, torch_state, weights, transposed)
    assert back["state"].keys() == state.keys()
    for key, entry in state.items():
        for field, x in entry.items():
            np.testing.assert_array_equal(back["state"][key][field], x)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_a_state_converts_into_every_storage_format(format):
    torch_state, weights = small_torch()
    optimizer = adam_jax.master_weights(
        adam_jax.adamw(optax.linear_schedule(1e-3, 0.0, 100), mu_dtype=format, nu_dtype=format),
        "int16",
    )
    state = moved(optimizer, torch_state, weights, dtype=jnp.bfloat16)
    like = moved(adam_jax.adam(1e-3), torch_state, weights)
    # Equals the conversion of a float32 state, whose numbers test_storage.py checks.
    desired = adam_jax.convert_state(like[0], format, format)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state[0], desired)
    assert state.inner_state[-1].count == 7  # the schedule's
    assert state.count == 0  # counts draws, not steps
    back = adam_jax.to_torch(state, torch_state, weights, transposed)
    numbers = adam_jax.convert_state(desired)
    for field, tree in (("exp_avg", numbers.mu), ("exp_avg_sq", numbers.nu)):
        np.testing.assert_array_equal(back["state"][0][field], tree["body"]["kernel"].T)


def test_schedules_continue_at_the_count():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    injected = optax.inject_hyperparams(adam_jax.adamw)(schedule, weight_decay=schedule)
    plain = adam_jax.adamw(schedule, weight_decay=schedule)
    torch_state, weights = small_torch()
    params = jax.tree.map(jnp.ones_like, transposed(weights))
    updates = []
    for optimizer in (plain, injected):
        state = moved(optimizer, torch_state, weights)
        updates.append(optimizer.update(params, state, params)[0])
    rate = jnp.asarray(schedule(7))
    m, v = (torch_state["state"][1][field] for field in ("exp_avg", "exp_avg_sq"))
    unit = 1 / (1 - 0.9**8) / np.sqrt((0.999 * v + 0.001) / (1 - 0.999**8))
    desired = -rate * ((0.9 * m + 0.1) * unit + rate)
    largest = rate * ((0.9 * np.abs(m) + 0.1) * unit + rate)  # of the terms of the sum
    # inject_hyperparams holds b2 in float32, so 1 - b2 has a relative error of 1.3e-5.
    for update in updates:
        np.testing.assert_array_less(np.abs(update["bias"] - desired), 1.3e-5 * largest)


def test_a_parameter_without_a_step_has_zero_moments():
    torch_state, weights = small_torch()
    del torch_state["state"][1]
    state = moved(adam_jax.adam(1e-3), torch_state, weights)
    assert state[0].count == 7
    assert not np.any(state[0].mu["bias"])
    optimizer = optax.masked(adam_jax.adam(1e-3), {"body": True, "bias": False})
    back = adam_jax.to_torch(
        moved(optimizer, torch_state, weights), torch_state, weights, transposed
    )
    assert back["state"].keys() == {0}
    np.testing.assert_array_equal(back["state"][0]["exp_avg"], torch_state["state"][0]["exp_avg"])


def test_different_counts_need_separate_optimizers():
    torch_state, weights = small_torch()
    torch_state["state"][1]["step"] = 5
    with pytest.raises(ValueError, match=r"5 steps at \['bias'\] and 7 steps at .*multi_transform"):
        moved(adam_jax.adam(1e-3), torch_state, weights)
    optimizer = optax.multi_transform(
        {"a": adam_jax.adam(1e-3), "b": adam_jax.adam(1e-2)}, {"body": "a", "bias": "b"}
    )
    state = moved(optimizer, torch_state, weights)
    assert [state.inner_states[x].inner_state[0].count for x in "ab"] == [7, 5]
    back = adam_jax.to_torch(state, torch_state, weights, transposed)
    for key, entry in torch_state["state"].items():
        for field, x in entry.items():
            np.testing.assert_array_equal(back["state"][key][field], x)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)
def test_moments_and_counts_do_not_pass_through_the_weights_dtype(dtype):
    """`to_params` casts the weights. float16 would make nu 0, and bfloat16 would round 100,001."""
    torch_state, weights = small_torch(100_001)
    for entry in torch_state["state"].values():
        entry["exp_avg_sq"] *= np.float32(1e-9)

    def to_params(torch):
        return jax.tree.map(lambda x: x.astype(dtype), transposed(torch))

    optimizer = adam_jax.adam(optax.constant_schedule(1e-3))
    state = moved(optimizer, torch_state, weights, to_params, dtype)
    assert state[0].count == state[1].count == 100_001
    m, v = (torch_state["state"][0][field] for field in ("exp_avg", "exp_avg_sq"))
    np.testing.assert_array_equal(state[0].mu["body"]["kernel"], m.T)
    np.testing.assert_array_equal(state[0].nu["body"]["kernel"], v.T)
    back = adam_jax.to_torch(state, torch_state, weights, to_params)
    for key, entry in torch_state["state"].items():
        for field, x in entry.items():
            np.testing.assert_array_equal(back["state"][key][field], x)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("format", [None, "bfloat16"])
def test_the_maximum_of_amsgrad_is_converted(format):
    """torch's step after the conversion is as long as our step before it."""
    rng = np.random.default_rng(0)
    gradients = {"w": jnp.asarray(rng.standard_normal((30, 64)), jnp.float32)}
    torch_state = {"state": {}, "param_groups": [{**GROUP, "params": [0], "amsgrad": True}]}
    weights = {"w": np.zeros(64, np.float32)}

    def largest_error(optimizer, **options):
        updates, state = {}, optimizer.init({"w": jnp.zeros(64)})
        for i in range(30):
            updates, state = optimizer.update(jax.tree.map(lambda g, i=i: g[i], gradients), state)
        entry = adam_jax.to_torch(state, torch_state, weights, dict, **options)["state"][0]
        root = np.sqrt(entry["max_exp_avg_sq"] / (1 - 0.999**30))
        steps = -entry["exp_avg"] / (1 - 0.9**30) / (root + 1e-8)
        return np.max(np.abs(steps / updates["w"] - 1))

    tolerance = 1e-4 if format is None else 2.0**-6
    formats: Any = {"mu_dtype": format, "nu_dtype": format}
    raw = adam_jax.amsgrad(1.0, **formats)
    corrected = adam_jax.amsgrad(1.0, maximum="corrected", **formats)
    assert largest_error(raw) < tolerance
    assert largest_error(raw, maximum="raw") < tolerance
    assert largest_error(corrected, maximum="corrected") < tolerance
    for ambiguous in [corrected] + [optax.amsgrad(1.0)] * (format is None):
        with pytest.raises(ValueError, match=r"the one that the optimizer uses.*maximum='raw'"):
            largest_error(ambiguous)
    with pytest.raises(ValueError, match="maximum must be one of"):
        largest_error(raw, maximum="true")


def test_the_product_of_nadam_s_warm_up_is_restored():
    # torch multiplies the factors b1 (1 - 0.96^(t momentum_decay) / 2), step by step.
    group = {"params": [0, 1], "betas": (0.9, 0.999), "momentum_decay": 0.004}
    torch_state, weights = small_torch()
    torch_state["param_groups"] = [group]
    state = moved(adam_jax.nadam(1e-3), torch_state, weights)
    back = adam_jax.to_torch(state, torch_state, weights, transposed)
    product = 1.0
    for t in range(1, 8):
        product *= 0.9 * (1 - 0.5 * 0.96 ** (t * 0.004))
    np.testing.assert_allclose(back["state"][0]["mu_product"], product, rtol=1e-7)


# ------------------------------------------------------------------ mismatches


def wrong_order(torch_state, weights):
    return torch_state, {name: weights[name] for name in ("bias", "weight")}


def one_more(torch_state, weights):
    return torch_state, {**weights, "head": np.zeros(3)}


def no_step(torch_state, weights):
    return {**torch_state, "state": {}}, weights


def complex_moments(torch_state, weights):
    torch_state["state"][1]["exp_avg"] = 1j * torch_state["state"][1]["exp_avg"]
    return torch_state, weights


def half_a_state(torch_state, weights):
    del torch_state["state"][1]["exp_avg_sq"]
    return torch_state, weights


def of_sgd(torch_state, weights):
    return {**torch_state, "param_groups": [{"params": [0, 1], "momentum": 0.9}]}, weights


def of_amsgrad(torch_state, weights):
    return {**torch_state, "param_groups": [{"params": [0, 1], **GROUP, "amsgrad": True}]}, weights


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (wrong_order, ValueError, r"exp_avg of 'bias' has shape \(64, 96\).*order"),
        (
            one_more,
            ValueError,
            r"has 2 parameters \(0, 1\), but torch_params has 3 \(weight, bias, head\)",
        ),
        (no_step, ValueError, "no step"),
        (complex_moments, TypeError, "'bias' is complex"),
        (half_a_state, ValueError, "no exp_avg_sq for 'bias', but step, exp_avg"),
        (of_sgd, ValueError, "torch's Adam, AdamW, NAdam or Adamax, but .* params, momentum"),
        (of_amsgrad, ValueError, "max_exp_avg_sq for 'weight'.*Only AMSGrad can continue AMSGrad"),
    ],
)
def test_mismatches_are_named(broken, error, message):
    with pytest.raises(error, match=message):
        moved(adam_jax.adam(1e-3), *broken(*small_torch()))


def test_a_forgotten_transpose_is_named():
    torch_state, weights = small_torch()
    state = adam_jax.adam(1e-3).init(transposed(weights))
    wrong = lambda torch: {"body": {"kernel": torch["weight"]}, "bias": torch["bias"]}  # noqa: E731
    with pytest.raises(
        ValueError, match=r"\['body'\]\['kernel'\] the shape \(64, 96\).*transpose it"
    ):
        adam_jax.from_torch(torch_state, weights, wrong, state)
    with pytest.raises(ValueError, match="tree like the parameters"):
        adam_jax.from_torch(torch_state, weights, lambda torch: {"body": torch["weight"]}, state)


def test_there_is_no_way_back_if_an_element_is_left_out_or_used_twice():
    torch_state, weights = small_torch()

    def cut(torch):
        return {"body": {"kernel": torch["weight"].T[:, 1:]}, "bias": torch["bias"]}

    def tied(torch):
        return {**transposed(torch), "tied": torch["bias"]}

    for to_params, name in ((cut, "weight"), (tied, "bias")):
        state = moved(adam_jax.adam(1e-3), torch_state, weights, to_params)  # the way here works
        with pytest.raises(ValueError, match=f"each element of '{name}' once"):
            adam_jax.to_torch(state, torch_state, weights, to_params)


def test_arithmetic_in_to_params_is_refused():
    torch_state, weights = small_torch()
    half = lambda torch: jax.tree.map(lambda x: x / 2, transposed(torch))  # noqa: E731
    with pytest.raises(ValueError, match="to_params does arithmetic"):
        moved(adam_jax.adam(1e-3), torch_state, weights, half)


def test_states_of_other_algorithms_are_refused():
    with pytest.raises(ValueError, match="found no state of scale_by_adam"):
        moved(optax.sgd(1e-3), *small_torch())
    torch_state, weights = small_torch()
    state = adam_jax.amsgrad(1e-3).init(transposed(weights))
    with pytest.raises(ValueError, match="Only AMSGrad can continue AMSGrad"):
        adam_jax.to_torch(state, torch_state, weights, transposed)
