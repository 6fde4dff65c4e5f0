"""Trees and runs that the contracts share."""

import jax
import jax.numpy as jnp
import optax
from trees import random, scan

import adam_jax


def params_of(dtype="float32"):
    """Parameters of many shapes: matrix, stack, scalar, one element, no element, None, nothing."""
    shapes = {"kernel": (3, 4), "stack": (2, 2, 3), "scalar": (), "one": (1,), "zero_size": (0, 5)}
    leaves = {name: random(shape, dtype, 0) for name, shape in shapes.items()}
    return leaves | {"none": None, "empty": {}}


def few_params_of(dtype="float32"):
    """The same without two ordinary leaves, which cost most to compile."""
    return {name: x for name, x in params_of(dtype).items() if name not in ("stack", "one")}


def gradients_of(params, steps=None, seed=1):
    """Gradients shaped like the parameters, with an axis of time in front if `steps` is given."""
    time = () if steps is None else (steps,)
    return jax.tree.map(lambda p: random((*time, *p.shape), p.dtype, seed), params)


def run_eagerly(optimizer, params, gradients):
    """The same step by step. What is compiled for a leaf serves all runs of an optimizer."""
    state, updates = optimizer.init(params), []
    for i in range(len(jax.tree.leaves(gradients)[0])):
        u, state = optimizer.update(jax.tree.map(lambda g, i=i: g[i], gradients), state, params)
        params = optax.apply_updates(params, u)
        updates.append(u)
    return jax.tree.map(lambda *u: jnp.stack(u), *updates), state


def run(optimizer, params, gradients):
    """A whole run in one scan: the updates, stacked along time, and the last state."""
    _, state, updates = scan(optimizer, params, gradients)
    return updates, state


def moments_of(state):
    """The trees of the state by their names, as far as the optimizer has them."""
    names = ("mu", "nu", "nu_max", "average")
    found = {name: optax.tree.get_all_with_path(state, name) for name in names}
    trees = {name: tree[0][1] for name, tree in found.items() if tree}
    if isinstance(trees.get("nu"), adam_jax.Int8Moment):
        trees["nu"], trees["scales"], trees["units"] = trees["nu"]
    return trees
