"""Prints what grows in ten thousand eager steps, for every optimizer and format.

    uv run tests/endurance/leaks.py

Each step has a new learning rate. `test_leaks.py` checks a few optimizers.
"""

import gc
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# pytest finds modules in this folder by itself, a script does not.
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from optimizers import ROWS

import adam_jax


class Growth(NamedTuple):
    compiled: int  # entries in the caches of our jitted functions
    arrays: int  # alive
    blocks: int  # of memory, as Python allocates it: one or more for each object
    peak: int  # bytes, of the whole process


def jitted_functions():
    """Returns all jitted functions of the package."""
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "adam_jax"]
    values = [x for m in modules for x in vars(m).values()]
    classes = [x for x in values if isinstance(x, type) and x.__module__.startswith("adam_jax")]
    values += [x for c in classes for x in vars(c).values()]
    return {id(x): x for x in values if hasattr(x, "_cache_size")}.values()


def measured():
    gc.collect()
    return Growth(
        sum(f._cache_size() for f in jitted_functions()),
        len(jax.live_arrays()),
        sys.getallocatedblocks(),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def growth(optimizer_at, dtype, steps, warm_up=1000):
    """Returns the growth over `steps` steps after the warm-up, with `optimizer_at(step)` in each.

    Python and JAX allocate nearly all memory of their own in the first thousand steps: 10,000 more
    leave 150 blocks, and the next 10,000 leave six.
    """
    params = {"w": jnp.ones((64, 64), dtype)}
    gradients = {"w": jnp.full((64, 64), 0.1, dtype)}
    state, before = optimizer_at(0).init(params), measured()
    for step in range(warm_up + steps):
        if step == warm_up:
            before = measured()
        updates, state = optimizer_at(step).update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    after = measured()
    return Growth(*(a - b for a, b in zip(after, before, strict=True)))


def schedule(step):
    return 0.01 / (1 + step)


def always(optimizer):
    return lambda step: optimizer


def cases():
    """Yields names, each with the optimizer at each step and the parameters' dtype."""
    for row in ROWS:
        yield row.name, (always(row.make(learning_rate=schedule)), "float32")
    seven_bytes = adam_jax.adamw(schedule, mu_dtype="int8", nu_dtype="int8")
    yield "seven bytes", (always(adam_jax.master_weights(seven_bytes, "int8")), "bfloat16")
    yield "injected", (always(optax.inject_hyperparams(adam_jax.adamw)(schedule)), "float32")
    yield "a new one at each step", (lambda step: adam_jax.adamw(schedule(step)), "float32")


CASES = dict(cases())


def main():
    steps = 10_000
    print(f"| {steps:,} steps | compiled | arrays | blocks of Python | bytes of the process |")
    print("|---|---|---|---|---|")
    for name, case in CASES.items():
        figures = " | ".join(f"{x:,}" for x in growth(*case, steps))
        print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
