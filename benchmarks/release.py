"""Gradient release compared with the plain step: bytes per parameter, matrix products, time.

    uv run benchmarks/release.py
    uv run --group compilers benchmarks/release.py --target v5e
    uv run --group compilers benchmarks/release.py --target h100
    uv run --group compilers benchmarks/release.py --target v5e --fit

What is compiled are whole training steps of models whose layers are stacked and scanned, with
`jax.checkpoint` around each layer: forward pass, backward pass, update; parameters and state are
donated. "Square" has one matrix of 4096 x 4096 in each layer, "mlp" two of 1536 x 6144, "gpt" is a
transformer's block with attention, 1024 wide. The columns:

- peak: arguments + temporaries, by the compiler's account (on a TPU, in HBM). Outputs are written
  over the arguments;
- temporaries: the same without arguments, and times the number of layers: bytes for each parameter
  of one layer. Activations are among them, for few tokens;
- products: matrix products in the program; those in loops count once;
- trace, compile: seconds, from cold caches.

Without --target, models are smaller and steps run: the time of each is printed as a ratio to that
of the plain step, the median over alternating runs. --fit compiles a GPT for one v5e, which has 16
GB: with the plain step the compiler runs out of memory.
"""

import functools
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from targets import HERE, compile_for, parse_target
from tqdm import tqdm

import adam_jax

RATE = 1e-3
INT8 = adam_jax.adamw(RATE, mu_dtype="int8", nu_dtype="int8")
OPTIMIZERS = {
    "float32": (adam_jax.adamw(RATE), jnp.float32),
    "7 bytes": (adam_jax.master_weights(INT8, "int8"), jnp.bfloat16),
}
Shapes = dict[str, tuple[int, ...]]


class Model(NamedTuple):
    """A stack of equal layers."""

    shapes: Shapes  # of one layer
    batch: tuple[int, ...]
    block: Callable[[jax.Array, dict[str, jax.Array]], jax.Array]

    def loss(self, params: Any, x: jax.Array, scan: Any = jax.lax.scan) -> jax.Array:
        """The mean square of what comes out of the last layer."""

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            return self.block(x, p), None

        x, _ = scan(layer, x, params)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def params(self, layers: int, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of the stacked parameters."""
        return {
            name: jax.ShapeDtypeStruct((layers, *shape), dtype)
            for name, shape in self.shapes.items()
        }


def square(width: int, tokens: int = 8) -> Model:
    """One square matrix in each layer."""
    return Model({"w": (width, width)}, (tokens, width), lambda x, p: x + jnp.tanh(x @ p["w"]))


def mlp(width: int, tokens: int = 8) -> Model:
    """Two matrices in each layer, one wide and one high."""
    shapes = {"a": (width, 4 * width), "b": (4 * width, width)}
    return Model(shapes, (tokens, width), lambda x, p: x + jax.nn.gelu(x @ p["a"]) @ p["b"])


def gpt(width: int, heads: int, tokens: int = 128) -> Model:
    """Attention and two dense layers, each after a norm."""
    shapes = {
        "norm_1": (width,),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "norm_2": (width,),
        "a": (width, 4 * width),
        "b": (4 * width, width),
    }

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
        return wide.astype(x.dtype) * scale[None, None]

    def block(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
        batch, length, _ = x.shape
        qkv = (norm(x, p["norm_1"]) @ p["qkv"]).reshape(batch, length, 3, heads, -1)
        scores = jnp.einsum("bqhw,bkhw->bhqk", qkv[:, :, 0], qkv[:, :, 1]).astype(jnp.float32)
        past = jnp.tril(jnp.ones((length, length), dtype=bool))[None, None]
        weights = jax.nn.softmax(jnp.where(past, scores * (heads / width) ** 0.5, -jnp.inf))
        found = jnp.einsum("bhqk,bkhw->bqhw", weights.astype(x.dtype), qkv[:, :, 2])
        x = x + found.reshape(batch, length, width) @ p["out"]
        return x + jax.nn.gelu(norm(x, p["norm_2"]) @ p["a"]) @ p["b"]

    return Model(shapes, (1, tokens, width), block)


MODELS = {"square": square(4096), "mlp": mlp(1536), "gpt": gpt(1024, 16)}
SMALL = {"square": square(768, 64), "mlp": mlp(384, 64), "gpt": gpt(256, 4)}


def plain_step(loss: Any, optimizer: optax.GradientTransformation) -> Any:
    """The step with all gradients at once, to compare with."""

    def step(params: Any, state: Any, *args: Any) -> tuple[Any, Any, Any]:
        value, gradients = jax.value_and_grad(loss)(params, *args)
        updates, state = optimizer.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    return step


def both_steps(loss: Any, optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """Both steps, jitted; parameters and state are updated in place."""
    released = adam_jax.value_and_update(loss, optimizer, layers=True)
    steps = {"plain": plain_step(loss, optimizer), "released": released}
    return {name: jax.jit(step, donate_argnums=(0, 1)) for name, step in steps.items()}


def products(compiled: Any) -> int:
    """The number of matrix products in a program."""
    names = (" dot(", " convolution(", "__cublas$gemm", "__cublas$lt$matmul")
    return sum(any(name in line for name in names) for line in compiled.as_text().splitlines())


def account(target: str, model: Model, layers: int, setting: str) -> dict[str, dict[str, str]]:
    """The table's cells for both steps."""
    optimizer, dtype = OPTIMIZERS[setting]
    params = model.params(layers, dtype)
    state = jax.eval_shape(optimizer.init, params)
    batch = jax.ShapeDtypeStruct(model.batch, dtype)
    size = sum(x.size for x in jax.tree.leaves(params))
    cells, compiled = {}, {}
    for name, step in both_steps(model.loss, optimizer).items():
        jax.clear_caches()
        began = time.perf_counter()
        step.trace(params, state, batch)
        traced = time.perf_counter()
        program = compile_for(target, step, params, state, batch)
        compiled[name] = program
        memory = program.memory_analysis()
        assert memory is not None, "this backend does not count memory"
        temporaries = memory.temp_size_in_bytes / size
        cells[name] = {
            "peak": f"{memory.argument_size_in_bytes / size + temporaries:.2f}",
            "temporaries": f"{temporaries:.3f}",
            "times layers": f"{temporaries * layers:.2f}",
            "products": str(products(program)),
            "trace": f"{traced - began:.2f}",
            "compile": f"{time.perf_counter() - traced:.1f}",
        }
    if target == HERE:
        zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)  # noqa: E731
        seconds = times(compiled, zeros(params), zeros(state), zeros(batch))
        for name, cell in cells.items():
            cell["time"] = f"{seconds[name] / seconds['plain']:.2f}"
    return cells


def times(compiled: dict[str, Any], params: Any, state: Any, batch: Any) -> dict[str, float]:
    """The median seconds of each step, in alternation."""
    copies = {name: jax.tree.map(jnp.copy, (params, state)) for name in compiled}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(11):
        for name, step in compiled.items():
            began = time.perf_counter()
            _, *carry = jax.block_until_ready(step(*copies[name], batch))
            seconds[name].append(time.perf_counter() - began)
            copies[name] = tuple(carry)
    return {name: statistics.median(x[1:]) for name, x in seconds.items()}


def fit() -> None:
    """Compiles a GPT in 7 bytes for one v5e, and prints whether it fits into 16 GB."""
    optimizer, dtype = OPTIMIZERS["7 bytes"]
    model, layers = gpt(2560, 20, tokens=1024), 32
    params = model.params(layers, dtype)
    state = jax.eval_shape(optimizer.init, params)
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"{size / 1e9:.2f}e9 parameters in {layers} layers, batches of 1024 tokens, one v5e\n")
    for name, step in both_steps(model.loss, optimizer).items():
        try:
            batch = jax.ShapeDtypeStruct(model.batch, dtype)
            memory = compile_for("v5e", step, params, state, batch).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            message = str(error).split(". ")[:2]
            print(f"{name}: does not fit. {'. '.join(message)}.")
        else:
            assert memory is not None
            total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            print(f"{name}: fits, {total / 2**30:.2f} GiB, {total / size:.2f} bytes per parameter")


def main() -> None:
    """Prints a table in markdown; progress goes to stderr."""
    parser = ArgumentParser(description="Compares gradient release with the plain step.")
    parser.add_argument("--fit", action="store_true", help="only a model that fits, or does not")
    parser.add_argument("--small", action="store_true", help="small models, to see that this runs")
    options = parse_target(parser)
    if options.fit:
        fit()
        return
    small = options.small or options.target == HERE
    cases = [
        (name, model, layers, setting)
        for name, model in (SMALL if small else MODELS).items()
        for layers in ([4] if options.small else [16, 32])
        for setting in OPTIMIZERS
    ]
    header = True
    for name, model, layers, setting in tqdm(cases):
        for kind, cells in account(options.target, model, layers, setting).items():
            if header:
                print(f"| | {' | '.join(cells)} |\n|---{'|---' * len(cells)}|")
                header = False
            row = f"{name}, {layers} layers, {setting}, {kind}"
            print(f"| {row} | {' | '.join(cells.values())} |", flush=True)


if __name__ == "__main__":
    main()
