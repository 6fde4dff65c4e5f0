"""The settings that the benchmarks compare, each with its one name, and GPT-2's shapes.

`settings("adam")` and `settings("adamw")` have the same names. The bytes per parameter are those of
weight, gradient, moments and remainder:

    optax.adam                16  float32 (or optax.adamw)
    float32                   16  as optax, by adam_jax
    bfloat16 moments          12  mu and nu in bfloat16
    int8 moments              10  mu and nu in int8
    optax.adam, all bfloat16   8  weights, gradients and moments in bfloat16
    7 bytes                    7  bfloat16 weights + int8 remainder, int8 moments
    float32, released         12  gradient release: no gradients of all layers at once
    5 bytes                    5  7 bytes with gradient release

Other settings are named by their formats: "bfloat16 weights + int16 remainder, int8 moments".
FlashOptim's are there if `flashoptim-jax` is installed: "FlashOptim, int8 moments" has float32
weights, "FlashOptim, 7 bytes" bfloat16 weights and an int8 remainder.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adam_jax

RATE = 1e-3
MOMENTS = {"float32": "float32", "bfloat16 moments": "bfloat16", "int8 moments": "int8"}
REMAINDERS = {
    "none": "bfloat16 weights + no remainder",
    **{x: f"bfloat16 weights + {x} remainder" for x in ("int8", "int16", "float32")},
}
# By the bits of FlashOptim's weights with their remainder.
FLASH = {
    None: "FlashOptim, int8 moments",
    24: "FlashOptim, 7 bytes",
    32: "FlashOptim, bfloat16 weights + int16 remainder, int8 moments",
}
RELEASED = {"float32": "float32, released", "7 bytes": "5 bytes"}
Shapes = list[tuple[int, ...]]


class Setting(NamedTuple):
    """An optimizer, and the dtype of both weights and gradients."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], Any]  # (params, state, gradients) -> new params and state
    dtype: Any
    optimizer: Any = None  # as optax has them; FlashOptim's is none
    released: bool = False

    def jitted(self) -> Any:
        """Returns the step, jitted; it updates parameters and state in place."""
        return jax.jit(self.step, donate_argnums=(0, 1))

    def train_step(self, loss: Any, layers: Any = True) -> Callable[..., Any]:
        """Returns a step from parameters, state and a batch to loss, parameters and state."""
        if self.released:
            return adam_jax.value_and_update(loss, self.optimizer, layers=layers)
        return self.step_with(jax.value_and_grad(loss))

    def step_with(self, differentiated: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the same for a function that returns loss and gradients."""

        def step(params: Any, state: Any, *args: Any) -> tuple[Any, Any, Any]:
            value, gradients = differentiated(params, *args)
            return value, *self.step(params, state, gradients)

        return step


def settings(
    algorithm: str = "adam", rate: Any = RATE, fused: bool | None = None, **options: Any
) -> dict[str, Setting]:
    """Returns all settings of "adam" or "adamw" by name, except those with gradient release.

    `fused` chooses FlashOptim's kernels, which are for GPUs.
    """
    ours = functools.partial(getattr(adam_jax, algorithm), rate, **options)
    theirs = getattr(optax, algorithm)(rate, **options)
    found = {f"optax.{algorithm}": with_optax(theirs)}
    for name, moments in MOMENTS.items():
        found[name] = with_optax(ours(mu_dtype=moments, nu_dtype=moments))
    found[f"optax.{algorithm}, all bfloat16"] = with_optax(theirs, jnp.bfloat16)
    for moments, (remainder, weights) in itertools.product(("float32", "int8"), REMAINDERS.items()):
        inner = ours(mu_dtype=moments, nu_dtype=moments)
        seven = (remainder, moments) == ("int8", "int8")
        name = "7 bytes" if seven else f"{weights}, {moments} moments"
        found[name] = with_optax(adam_jax.master_weights(inner, remainder), jnp.bfloat16)
    if importlib.util.find_spec("flashoptim_jax"):
        from flashoptim_jax import flash_adamw

        if algorithm == "adam":
            options = options | {"weight_decay": 0.0}
        fused = jax.default_backend() == "gpu" if fused is None else fused
        for bits, name in FLASH.items():
            flash = flash_adamw(rate, master_weight_bits=bits, fused=fused, **options)
            found[name] = Setting(flash.init, flash.step, jnp.bfloat16 if bits else jnp.float32)
    return found


def with_release(found: dict[str, Setting]) -> dict[str, Setting]:
    """Returns settings followed by those with gradient release."""
    return found | {name: found[plain]._replace(released=True) for plain, name in RELEASED.items()}


def with_optax(optimizer: optax.GradientTransformation, dtype: Any = jnp.float32) -> Setting:
    """Returns a setting with an optimizer of optax's kind."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return Setting(optimizer.init, step, dtype, optimizer)


def gpt2(width: int, vocabulary: int, context: int, layers: int) -> Shapes:
    """Returns GPT-2's shapes: 148 leaves, 124M elements in its smallest published size."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [
        (vocabulary, width),
        (context, width),
        *(norm + attention + norm + mlp) * layers,
        *norm,
    ]
