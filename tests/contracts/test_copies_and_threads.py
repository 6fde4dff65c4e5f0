"""Copies of optimizers and states, in this process and others, and steps in many threads."""

import copy
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import chex
import cloudpickle
import jax
import numpy as np
import optax
import pytest
from optimizers import ROWS, STORED_ROWS, each
from trees import random_tree

import adam_jax

SHAPES = {"kernel": (64, 64), "bias": (64,)}
(SEVEN_BYTES,) = (row for row in STORED_ROWS if row.name == "master_weights-int8-int8")
each_optimizer = each([*ROWS, SEVEN_BYTES])


def run(update, params, state, seed, steps=5) -> tuple[Any, Any]:
    # JAX's standard promotion adds float32 to bfloat16. Each thread has its own setting.
    with jax.numpy_dtype_promotion("standard"):
        for step in range(steps):
            updates, state = update(random_tree(SHAPES, seed=[seed, step]), state, params)
            params = optax.apply_updates(params, updates)
    return params, state


def start(optimizer, dtype, seed=0):
    params = random_tree(SHAPES, dtype, seed)
    return params, optimizer.init(params)


def at_once(functions):
    """Runs each function in a thread, all starting at the same time, and returns the results."""
    barrier = threading.Barrier(len(functions))

    def wait_and_run(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as threads:
        return list(threads.map(wait_and_run, functions))


# Threads


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("same", [False, True], ids=["different", "the same"])
def test_threads_give_the_same_results(jit, same):
    """Eight threads start with nothing compiled, so all trace and compile at once."""
    rows = [SEVEN_BYTES] * 8 if same else [*ROWS[-7:], SEVEN_BYTES]
    chosen = [(row.make(), row.param_dtype) for row in rows]
    updates = [jax.jit(optimizer.update) if jit else optimizer.update for optimizer, _ in chosen]
    if same:
        updates = updates[:1] * 8

    def runs():
        return [
            lambda u=u, c=c, seed=seed: run(u, *start(*c, seed=seed), seed)
            for seed, (u, c) in enumerate(zip(updates, chosen, strict=True))
        ]

    jax.clear_caches()
    together = at_once(runs())
    alone = [one() for one in runs()]
    chex.assert_trees_all_equal(together, alone)
    assert len({np.asarray(params["bias"]).tobytes() for params, _ in alone}) == 8


# Copies


@pytest.mark.covering
@each_optimizer
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copied_state_makes_the_same_steps(row, copied):
    optimizer, dtype = row.make(), row.param_dtype
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
def test_a_copied_optimizer_makes_the_same_steps(row):
    optimizer, dtype = row.make(), row.param_dtype
    assert copy.deepcopy(optimizer) == optimizer  # its functions are copied by reference
    pickled = cloudpickle.dumps(optimizer)
    assert b"ArrayMeta" not in pickled  # annotations must not bring a copy of the class jax.Array
    copied = cloudpickle.loads(pickled)
    assert copied != optimizer
    chex.assert_trees_all_equal(
        run(copied.update, *start(copied, dtype), 0, steps=2),
        run(optimizer.update, *start(optimizer, dtype), 0, steps=2),
    )


def test_pickle_refuses_our_optimizers_as_it_does_optax_s():
    for optimizer in (adam_jax.adam(1e-3), optax.adam(1e-3)):
        with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
            pickle.dumps(optimizer)


THERE = """
import sys, pickle
optimizer, params, state, gradients = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps(optimizer.update(gradients, state, params)))
"""


@pytest.mark.slow
@each([row for row in ROWS if row.name == "adamw"] + [SEVEN_BYTES])
def test_another_process_takes_the_same_step(row):
    optimizer, dtype = row.make(), row.param_dtype
    params, state = run(optimizer.update, *start(optimizer, dtype), 0, steps=2)
    gradients = random_tree(SHAPES, dtype, 1)
    sent = cloudpickle.dumps((optimizer, params, state, gradients))
    command = [sys.executable, "-c", THERE]
    there = subprocess.run(command, input=sent, stdout=subprocess.PIPE, check=True, timeout=120)
    here = optimizer.update(gradients, state, params)
    chex.assert_trees_all_equal(pickle.loads(there.stdout), here)
