"""Programs compiled for a TPU and a GPU compute the same numbers as this CPU.

NumPy runs the compiled programs operation by operation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program
from steps import TARGETS
from targets import compile_for

import adam_jax

SHAPES = ((64, 256), (256,))

pytestmark = pytest.mark.usefixtures("standard_promotion")


def random(like, seed):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in like]


@pytest.mark.parametrize("target", TARGETS)
def test_the_program_agrees_with_the_cpu(target, setting):
    params = random(setting.params(SHAPES), 0)
    state = setting.optimizer().init(params)
    step = setting.step()
    params, state = step(params, state, random(params, 1))  # state is then no longer zero
    gradients = random(params, 2)
    program = Program(compile_for(target, step, params, state, gradients).as_text())
    results = program.run(*map(np.asarray, jax.tree.leaves((params, state, gradients))))
    desired = step(params, state, gradients)
    ours = jax.tree.unflatten(jax.tree.structure(desired), map(jnp.asarray, results))
    for x, y in zip(decoded(*ours), decoded(*desired), strict=True):
        # A moment or weight close to the middle of two codes may go either way.
        assert disagreements(x, y) <= 1e-3 * x.size + 1


def decoded(params, state):
    """Returns the numbers that parameters and state stand for, as NumPy arrays."""
    if isinstance(state, adam_jax.MasterWeightsState):
        params = adam_jax.master_params(params, state)
        state = state.inner_state
    state = adam_jax.convert_state(state, mu_dtype="float32", nu_dtype="float32")
    return jax.tree.map(np.asarray, jax.tree.leaves((params, state)))


def disagreements(x, y):
    """Counts the elements that differ by more than rounding at the end of a step explains.

    XLA contracts products and sums on a CPU, so float32 arithmetic differs in its last bits; and it
    may add an update to a bfloat16 parameter before it is rounded to bfloat16.
    """
    assert x.dtype == y.dtype
    tolerance = 2**-6 if x.dtype == jnp.bfloat16 else 2**-16
    x, y = x.astype(np.float64), y.astype(np.float64)
    return np.sum(np.abs(x - y) > tolerance * np.sqrt(np.mean(y * y)))


def naive_remainder(x):
    """Returns the part that a cast to bfloat16 loses; XLA for GPU removes the casts."""
    return x - x.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize(("target", "lost"), [("v5e", False), ("h100", True)])
def test_a_remainder_that_the_compiler_removes_is_found(target, lost):
    """XLA for GPU removes a remainder that is written in this way."""
    x = jnp.linspace(1.0, 2.0, 1000)
    program = Program(compile_for(target, jax.jit(naive_remainder), x).as_text())
    (found,) = program.run(np.asarray(x))
    wrong = disagreements(found, np.asarray(jax.jit(naive_remainder)(x)))
    assert wrong > 900 if lost else wrong == 0
