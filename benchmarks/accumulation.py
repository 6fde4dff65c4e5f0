"""Memory of gradient accumulation on the device, by the compiler's account, in several ways.

    uv run --group compilers benchmarks accumulation --target v5e
    uv run --group compilers benchmarks accumulation --target h100

The model is a stack of 16 layers, scanned, with `jax.checkpoint` around each layer, and trained in
7 bytes per parameter. A program makes a step of 8 microbatches; with `optax.MultiSteps` it is
called with each microbatch. Parameters and state are donated. The columns, in bytes per parameter:

- arguments: parameters and state, with the sums that `optax.MultiSteps` keeps there;
- temporaries: everything else, gradients and activations included;
- peak: both together. Results are written over the arguments.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from command import parse_target, parser
from release import MODELS, arguments
from settings import RATE, Setting, settings, with_optax
from tables import head, line
from targets import Memory, compile_for, count, memory
from tqdm import tqdm

import adam_jax

MODEL = MODELS["mlp"]
NUMBER = 8  # of microbatches


def accumulated(buffer: str, layers: bool) -> Callable[..., Any]:
    """Returns the function of `accumulated_value_and_grad`."""
    differentiated = adam_jax.accumulated_value_and_grad(MODEL.loss, layers=layers, buffer=buffer)
    return lambda params, x: differentiated(params, x, step=jnp.int32(0))


def with_microbatch(dtype: Any) -> Callable[..., Any]:
    """Returns the function of `optax.microbatch`, which adds in the gradients' dtype."""

    def differentiated(params: Any, x: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(MODEL.loss)(params, x[0])
        return value, optax.tree.cast(gradients, dtype)

    mean = optax.microbatching.AccumulationType.MEAN
    return optax.microbatch(differentiated, argnums=1, microbatch_size=1, accumulator=mean)


def loss_of_one(params: Any, x: jax.Array, scan: Any = jax.lax.scan) -> jax.Array:
    """Returns the loss of one microbatch."""
    return MODEL.loss(params, x[0], scan)


def ways() -> dict[str, tuple[Setting, Any]]:
    """Returns the setting and the step of each way."""
    seven = settings("adamw")["7 bytes"]
    gradients = {"one batch, no accumulation": jax.value_and_grad(loss_of_one)}
    for layers in (True, False):
        for buffer in ("bfloat16", "float32"):
            name = f"accumulated_value_and_grad, {'layers=True, ' if layers else ''}{buffer}"
            gradients[name] = accumulated(buffer, layers)
    for dtype in ("bfloat16", "float32"):
        gradients[f"optax.microbatch, {dtype}"] = with_microbatch(dtype)
    found = {name: (seven, seven.step_with(f)) for name, f in gradients.items()}

    def multi_steps(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.MultiSteps(optimizer, NUMBER).gradient_transformation()

    int8 = adam_jax.adamw(RATE, mu_dtype="int8", nu_dtype="int8")
    around = with_optax(multi_steps(seven.optimizer), seven.dtype)
    inside = with_optax(adam_jax.master_weights(multi_steps(int8), "int8"), seven.dtype)
    for name, setting in {
        "optax.MultiSteps around master_weights, bfloat16": around,
        "optax.MultiSteps inside master_weights, float32": inside,
        "the same with value_and_update": inside._replace(released=True),
    }.items():
        found[name] = setting, setting.train_step(loss_of_one)
    return found


def account(target: str, setting: Setting, step: Any, layers: int = 16) -> Memory:
    """Returns the memory of a step in bytes per parameter."""
    params, state, batch = arguments(MODEL, layers, setting)
    batch = jax.ShapeDtypeStruct((NUMBER, *batch.shape), batch.dtype)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return memory(compile_for(target, jitted, params, state, batch)).per(count(params))


def main() -> None:
    """Prints a table row by row."""
    options = parse_target(parser("accumulation", __doc__))
    print(head(f"bytes per parameter, {options.target}", ["arguments", "temporaries", "peak"]))
    for name, way in tqdm(ways().items(), leave=False):
        found = account(options.target, *way, layers=2 if options.small else 16)
        sizes = found.arguments, found.temporaries, found.peak
        print(line(name, [f"{x:.2f}" for x in sizes]), flush=True)
