"""Numbers and steps that the tests of 16-bit weights share."""

import functools
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from adam_jax import load_master_params, master_weights

LOW = {"bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}
FRACTION_BITS = {"bfloat16": 7, "float16": 10}
SMALLEST_EXPONENT = {"bfloat16": -126, "float16": -14}
REMAINDERS = ["none", "int8", "int16", "float32"]
KEPT = {"none": 0, "int8": 8, "int16": 16, "float32": 16}
each_dtype = pytest.mark.parametrize("dtype", LOW)
each_remainder = pytest.mark.parametrize("remainder", REMAINDERS)


def bits_of(x):
    """Returns the bit patterns of numbers, with one pattern for all NaNs."""
    x = np.asarray(x)
    words = x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).astype(np.int64)
    infinity = int(np.array(np.inf, x.dtype).view(f"u{x.dtype.itemsize}"))
    is_nan = words % 2 ** (8 * x.dtype.itemsize - 1) > infinity
    return np.where(is_nan, infinity + 1, words)


def all_numbers(dtype):
    return np.arange(2**16, dtype=np.uint16).view(LOW[dtype])


def ulp(x, dtype):
    """Returns the distance between `dtype`'s numbers in the binade of x, in float64."""
    _, exponent = np.frexp(np.asarray(x, np.float64))
    exponent = np.maximum(exponent - 1, SMALLEST_EXPONENT[dtype])
    return 2.0 ** (exponent - FRACTION_BITS[dtype])


def largest(dtype):
    return float(jnp.finfo(dtype).max)


def log_uniform(n, low, high, seed=0):
    rng = np.random.default_rng(seed)
    x = np.exp2(rng.uniform(low, high, n)) * rng.choice([-1.0, 1.0], n)
    return x.astype(np.float32)


@functools.cache
def given_steps(remainder) -> tuple[Any, Any]:
    """Returns an optimizer whose updates are its gradients, and one step of it."""
    optimizer = master_weights(optax.identity(), remainder)

    @jax.jit
    def step(params, state, steps):
        updates, state = optimizer.update(steps, state, params)
        return optax.apply_updates(params, updates), state, updates

    return optimizer, step


def start(optimizer, master, dtype) -> tuple[Any, Any]:
    """Returns parameters and a state whose weights are as close to `master` as possible."""
    params = jax.tree.map(lambda w: jnp.zeros_like(w, dtype), master)
    return load_master_params(master, params, optimizer.init(params))


WIDTH = 32
any_words = hnp.arrays(np.uint32, WIDTH, elements=st.integers(0, 2**32 - 1))
many_examples = settings(max_examples=40, deadline=None, derandomize=True)
