"""Threads, ten thousand eager steps, and copies of optimizers and states.

What grows in the steps of every optimizer and format: `uv run tests/leaks.py`.
"""

import copy
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from leaks import CASES, growth
from optimizers import ROWS

import adam_jax
from adam_jax import _adam, _transformation

SHAPES = {"kernel": (64, 64), "bias": (64,)}
OPTIMIZERS = {row.name: (row.make(), "float32") for row in ROWS}
OPTIMIZERS["seven bytes"] = (
    adam_jax.master_weights(adam_jax.adamw(1e-2, mu_dtype="int8", nu_dtype="int8"), "int8"),
    "bfloat16",
)
each_optimizer = pytest.mark.parametrize(
    ("optimizer", "dtype"), OPTIMIZERS.values(), ids=OPTIMIZERS
)


def random(dtype, seed):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(s), dtype) for k, s in SHAPES.items()}


def run(update, params, state, seed, steps=5):
    # What adds float32 to bfloat16 is JAX's standard promotion, which is a thread's own setting.
    with jax.numpy_dtype_promotion("standard"):
        for step in range(steps):
            updates, state = update(random("float32", [seed, step]), state, params)
            params = optax.apply_updates(params, updates)
    return params, state


def start(optimizer, dtype, seed=0):
    params = random(dtype, seed)
    return params, optimizer.init(params)


def at_once(functions):
    """The results of functions that threads begin to run at the same time."""
    barrier = threading.Barrier(len(functions))

    def wait_and_run(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as threads:
        return list(threads.map(wait_and_run, functions))


# Threads


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("same", [False, True], ids=["different", "the same"])
def test_threads_step_optimizers(jit, same):
    """Eight of them; nothing is compiled yet, so that all trace and compile at once."""
    chosen = [OPTIMIZERS["seven bytes"]] * 8 if same else list(OPTIMIZERS.values())[-8:]
    updates = [jax.jit(optimizer.update) if jit else optimizer.update for optimizer, _ in chosen]
    if same:
        updates = updates[:1] * 8

    def runs():
        return [
            lambda u=u, c=c, seed=seed: run(u, *start(*c, seed), seed)
            for seed, (u, c) in enumerate(zip(updates, chosen, strict=True))
        ]

    jax.clear_caches()
    together = at_once(runs())
    alone = [one() for one in runs()]
    chex.assert_trees_all_equal(together, alone)
    assert len({np.asarray(params["bias"]).tobytes() for params, _ in alone}) == 8


# Ten thousand eager steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "seven bytes", "a new one at each step"])
def test_nothing_grows_in_10_000_eager_steps(name):
    with jax.numpy_dtype_promotion("standard"):
        grown = growth(*CASES[name], 10_000)
    assert grown.compiled == 0
    assert grown.arrays == 0
    assert grown.blocks < 1000  # an object a step would be 10,000


def test_what_grows_is_seen():
    """States that are kept are arrays and objects; a closure that is new compiles anew."""
    adam, kept = adam_jax.adam(1e-2), []

    def keeping(gradients, state, params):
        kept.append(state)
        return adam.update(gradients, state, params)

    grown = growth(lambda _: adam._replace(update=keeping), "float32", 1000, warm_up=1)
    assert grown.arrays >= 3 * 1000
    assert grown.blocks > 1000
    algorithm = _adam._algorithm(0.9, 0.999, 1e-8, 0.0, None, None, nesterov=False)

    def with_a_closure(_):
        return _transformation.scale_by(algorithm._replace(direction=lambda g, moments, s: g))

    assert growth(with_a_closure, "float32", 5, warm_up=1).compiled == 5


# Copies


@each_optimizer
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_state_steps_on_alike(optimizer, dtype, copied):
    params, state = run(optimizer.update, *start(optimizer, dtype), 0, steps=2)
    again = copied(state)
    chex.assert_trees_all_equal_structs(again, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(again, state)
    chex.assert_trees_all_equal(again, state)
    chex.assert_trees_all_equal(
        run(optimizer.update, params, again, 1, steps=1),
        run(optimizer.update, params, state, 1, steps=1),
    )


@each_optimizer
def test_a_copy_of_an_optimizer_steps_alike(optimizer, dtype):
    assert copy.deepcopy(optimizer) == optimizer  # as functions are, of which it consists
    pickled = cloudpickle.dumps(optimizer)
    assert b"ArrayMeta" not in pickled  # no copy of the class jax.Array, of its annotations
    copied = cloudpickle.loads(pickled)
    assert copied != optimizer
    chex.assert_trees_all_equal(
        run(copied.update, *start(copied, dtype), 0, steps=2),
        run(optimizer.update, *start(optimizer, dtype), 0, steps=2),
    )


def test_pickle_refuses_optimizers_of_optax_too():
    for optimizer in (adam_jax.adam(1e-3), optax.adam(1e-3)):
        with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
            pickle.dumps(optimizer)


THERE = """
import sys, pickle
optimizer, params, state, gradients = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps(optimizer.update(gradients, state, params)))
"""


@pytest.mark.parametrize("name", ["adamw", "seven bytes"])
def test_another_process_takes_the_same_step(name):
    optimizer, dtype = OPTIMIZERS[name]
    params, state = run(optimizer.update, *start(optimizer, dtype), 0, steps=2)
    gradients = random(dtype, 1)
    sent = cloudpickle.dumps((optimizer, params, state, gradients))
    command = [sys.executable, "-c", THERE]
    there = subprocess.run(command, input=sent, stdout=subprocess.PIPE, check=True, timeout=120)
    here = optimizer.update(gradients, state, params)
    chex.assert_trees_all_equal(pickle.loads(there.stdout), here)
