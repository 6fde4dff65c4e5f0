"""Trees and runs that the contracts share."""

import jax
import jax.numpy as jnp
import optax
from trees import random, scan

import adam_jax


def params_of(dtype="float32"):
    """Returns parameters of many shapes: matrix, stack, scalar, one or no element, None, empty."""
    shapes = {"kernel": (3, 4), "stack": (2, 2, 3), "scalar": (), "one": (1,), "zero_size": (0, 5)}
    leaves = {name: random(shape, dtype, 0) for name, shape in shapes.items()}
    return leaves | {"none": None, "empty": {}}


def few_params_of(dtype="float32"):
    """Returns the same without two ordinary leaves, which cost most to compile."""
    return {name: x for name, x in params_of(dtype).items() if name not in ("stack", "one")}


def gradients_of(params, steps=None, seed=1):
    """Returns gradients like the parameters, with a leading time axis if `steps` is given."""
    time = () if steps is None else (steps,)
    return jax.tree.map(lambda p: random((*time, *p.shape), p.dtype, seed), params)


def run_eagerly(optimizer, params, gradients):
    """Does the same step by step. All runs of an optimizer share its compiled programs."""
    state, updates = optimizer.init(params), []
    for i in range(len(jax.tree.leaves(gradients)[0])):
        u, state = optimizer.update(jax.tree.map(lambda g, i=i: g[i], gradients), state, params)
        params = optax.apply_updates(params, u)
        updates.append(u)
    return jax.tree.map(lambda *u: jnp.stack(u), *updates), state


def run(optimizer, params, gradients):
    """Runs all steps in one scan. Returns the updates, stacked along time, and the last state."""
    _, state, updates = scan(optimizer, params, gradients)
    return updates, state


def moments_of(state):
    """Returns those trees of the state that the optimizer has, by name."""
    names = ("mu", "nu", "nu_max", "average")
    found = {name: optax.tree.get_all_with_path(state, name) for name in names}
    trees = {name: tree[0][1] for name, tree in found.items() if tree}
    if isinstance(trees.get("nu"), adam_jax.Int8Moment):
        trees["nu"], trees["scales"], trees["units"] = trees["nu"]
    return trees
