"""What gradient accumulation needs on the device, by the compiler's account, in several ways.

    uv run --group compilers benchmarks/accumulation.py --target v5e
    uv run --group compilers benchmarks/accumulation.py --target h100

A stack of 16 layers is scanned, with `jax.checkpoint` around each layer, and trained with weights,
gradients and state in 7 bytes per parameter. A program makes a step of 8 microbatches. With
`optax.MultiSteps` it is called with each microbatch. Parameters and state are donated.
The columns, in bytes per parameter:

- arguments: parameters and state, with the sums that `optax.MultiSteps` keeps there;
- temporaries: all else, gradients and activations included;
- peak: both. Results are written over the arguments.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from release import MODELS, OPTIMIZERS
from targets import compile_for, parse_target
from tqdm import tqdm

import adam_jax

MODEL = MODELS["mlp"]
NUMBER = 8  # of microbatches
LAYERS = 16
OPTIMIZER, DTYPE = OPTIMIZERS["7 bytes"]


def accumulated(buffer: str, layers: bool) -> Callable[..., Any]:
    """Returns the gradients of ours."""
    differentiated = adam_jax.accumulated_value_and_grad(MODEL.loss, layers=layers, buffer=buffer)
    return lambda params, x: differentiated(params, x, step=jnp.int32(0))


def with_microbatch(dtype: Any) -> Callable[..., Any]:
    """Returns the gradients of `optax.microbatch`, which adds up what it is given."""

    def differentiated(params: Any, x: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(MODEL.loss)(params, x[0])
        return value, optax.tree.cast(gradients, dtype)

    mean = optax.microbatching.AccumulationType.MEAN
    return optax.microbatch(differentiated, argnums=1, microbatch_size=1, accumulator=mean)


def of_one(params: Any, x: jax.Array) -> Any:
    """Returns the gradients of one microbatch."""
    return jax.value_and_grad(MODEL.loss)(params, x[0])


def of_gradients(optimizer: optax.GradientTransformation, differentiated: Any) -> Any:
    """Returns a step from a function that returns the loss and all gradients."""

    def step(params: Any, state: Any, microbatches: jax.Array) -> tuple[Any, Any, Any]:
        value, gradients = differentiated(params, microbatches)
        updates, state = optimizer.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    return step


def released(optimizer: optax.GradientTransformation) -> Any:
    """Returns a step with gradient release, called with each microbatch."""
    step = adam_jax.value_and_update(MODEL.loss, optimizer, layers=True)
    return lambda params, state, x: step(params, state, x[0])


def ways() -> dict[str, tuple[optax.GradientTransformation, Any]]:
    """Returns the optimizer and the step of each way."""
    int8 = adam_jax.adamw(1e-3, mu_dtype="int8", nu_dtype="int8")
    inside = adam_jax.master_weights(
        optax.MultiSteps(int8, NUMBER).gradient_transformation(), "int8"
    )
    around = optax.MultiSteps(OPTIMIZER, NUMBER).gradient_transformation()
    gradients = {"one batch, no accumulation": of_one}
    for layers in (True, False):
        for buffer in ("bfloat16", "float32"):
            name = f"accumulated_value_and_grad, {'layers=True, ' if layers else ''}{buffer}"
            gradients[name] = accumulated(buffer, layers)
    for dtype in ("bfloat16", "float32"):
        gradients[f"optax.microbatch, {dtype}"] = with_microbatch(dtype)
    found: dict[str, tuple[optax.GradientTransformation, Any]] = {
        name: (OPTIMIZER, of_gradients(OPTIMIZER, f)) for name, f in gradients.items()
    }
    return found | {
        "optax.MultiSteps around master_weights, bfloat16": (around, of_gradients(around, of_one)),
        "optax.MultiSteps inside master_weights, float32": (inside, of_gradients(inside, of_one)),
        "the same with value_and_update": (inside, released(inside)),
    }


def account(target: str, optimizer: optax.GradientTransformation, step: Any) -> list[str]:
    """Returns the cells of a row of the table."""
    params = MODEL.params(LAYERS, DTYPE)
    state = jax.eval_shape(optimizer.init, params)
    batch = jax.ShapeDtypeStruct((NUMBER, *MODEL.batch), DTYPE)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    memory = compile_for(target, jitted, params, state, batch).memory_analysis()
    size = sum(x.size for x in jax.tree.leaves(params))
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return [f"{x / size:.2f}" for x in (arguments, temporaries, arguments + temporaries)]


def main() -> None:
    """Prints the table in markdown; progress goes to stderr."""
    parser = ArgumentParser(description="Compares ways to accumulate gradients.")
    options = parse_target(parser)
    print(f"| {options.target} | arguments | temporaries | peak |\n|---|---:|---:|---:|")
    for name, way in tqdm(ways().items(), leave=False):
        print(f"| {name} | {' | '.join(account(options.target, *way))} |", flush=True)


if __name__ == "__main__":
    main()
