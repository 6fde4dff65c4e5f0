"""What the benchmarks compare: ways to train, and the shapes of a model's parameters."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adam_jax

RATE = 1e-3
Shapes = list[tuple[int, ...]]


def gpt2(width: int, vocabulary: int, context: int, layers: int) -> Shapes:
    """GPT-2's parameters: 148 leaves and 124M elements in its smallest published size."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [
        (vocabulary, width),
        (context, width),
        *(norm + attention + norm + mlp) * layers,
        *norm,
    ]


class Setting(NamedTuple):
    """A way to train: the optimizer, and the dtype of both parameters and gradients."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], Any]  # (params, state, gradients) -> new params and state
    dtype: type

    def jitted(self) -> Any:
        """The step, compiled; parameters and state are updated in place."""
        return jax.jit(self.step, donate_argnums=(0, 1))


def settings() -> dict[str, Setting]:
    """All settings by name."""
    float32, bfloat16 = jnp.float32, jnp.bfloat16
    found = {"optax.adam": with_optax(optax.adam(RATE), float32)}
    for moments in ("float32", "bfloat16", "int8"):
        found[f"adam, {moments} moments"] = with_optax(ours(moments), float32)
    found["optax.adam, bfloat16 parameters"] = with_optax(optax.adam(RATE), bfloat16)
    for moments in ("float32", "int8"):
        for remainder in ("none", "int8", "int16", "float32"):
            name = f"bfloat16 parameters, {remainder} remainder, {moments} moments"
            optimizer = adam_jax.master_weights(ours(moments), remainder)
            found[name] = with_optax(optimizer, bfloat16)
    if importlib.util.find_spec("flashoptim_jax"):
        from flashoptim_jax import flash_adamw

        fused = jax.default_backend() == "gpu"
        for bits, name in (
            (None, "FlashOptim"),
            (24, "FlashOptim, bfloat16 parameters, int8 remainder"),
            (32, "FlashOptim, bfloat16 parameters, int16 remainder"),
        ):
            flash = flash_adamw(RATE, weight_decay=0.0, master_weight_bits=bits, fused=fused)
            found[name] = Setting(flash.init, flash.step, bfloat16 if bits else float32)
    return found


def ours(moments: str) -> optax.GradientTransformation:
    """Adam with both moments in one format."""
    return adam_jax.adam(RATE, mu_dtype=moments, nu_dtype=moments)


def with_optax(optimizer: optax.GradientTransformation, dtype: type) -> Setting:
    """A setting from an optax optimizer."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return Setting(optimizer.init, step, dtype)
