"""Bytes per parameter of training GPT-2 with Adam in each setting, as the compiler counts them.

    python benchmarks/bytes.py

What is compiled, for the backend that JAX finds here, is the end of a training step: gradients go
in, the optimizer updates them and the result is added to the parameters; parameters and state are
donated. No array is made. The columns:

- weight, gradient: what a parameter and its gradient take;
- state: what `init` returns;
- arguments, outputs, aliased, temporaries: the compiler's account of the program. Aliased are the
  outputs that are written over donated arguments;
- peak: arguments + outputs - aliased + temporaries.

Backends differ in the temporaries: XLA splits a step into more passes on a CPU than on a GPU or
TPU. FlashOptim is measured where its package, `flashoptim-jax`, is installed; on a CPU that is its
version without kernels.
"""

# pyright: basic

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from speed import RATE, Shapes, gpt2
from tqdm import tqdm

import adam_jax


class Setting(NamedTuple):
    """A way to train: the optimizer, and the dtype of both parameters and gradients."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], Any]  # (params, state, gradients) -> new params and state
    dtype: type


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
        from flashoptim_jax import flash_adamw  # pyright: ignore[reportMissingImports]

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


def account(setting: Setting, shapes: Shapes) -> dict[str, float]:
    """The table's numbers for one setting."""
    params = [jax.ShapeDtypeStruct(shape, setting.dtype) for shape in shapes]
    state = jax.eval_shape(setting.init, params)
    step = jax.jit(setting.step, donate_argnums=(0, 1))
    memory = step.lower(params, state, params).compile().memory_analysis()
    assert memory is not None, "this backend does not count memory"
    counts = {
        "weight": size(params),
        "gradient": size(params),
        "state": size(state),
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    live = counts["arguments"] + counts["outputs"] - counts["aliased"]
    counts["peak"] = live + counts["temporaries"]
    elements = sum(leaf.size for leaf in params)
    return {column: count / elements for column, count in counts.items()}


def size(tree: Any) -> int:
    """The bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Compiles every setting and prints a table in markdown; progress goes to stderr."""
    parser = argparse.ArgumentParser(
        description="Prints the bytes per parameter of Adam's settings as a markdown table."
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="a small GPT-2 without layers: shows within seconds that all of this runs",
    )
    options = parser.parse_args()
    shapes = gpt2(256, 512, 128, 0) if options.small else gpt2(768, 50257, 1024, 12)
    rows = {name: account(setting, shapes) for name, setting in tqdm(settings().items())}
    columns = next(iter(rows.values()))
    print(f"GPT-2, {len(shapes)} leaves, compiled for {jax.devices()[0].device_kind}.\n")
    print(f"| bytes per parameter | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |")


if __name__ == "__main__":
    main()
