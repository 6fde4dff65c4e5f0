"""Compares gradient release with the plain step: memory, matrix products, time.

    uv run benchmarks release
    uv run --group compilers benchmarks release --target v5e
    uv run --group compilers benchmarks release --target h100
    uv run --group compilers benchmarks release --target v5e --fit

Compiles whole training steps of models whose layers are stacked and scanned, with `jax.checkpoint`
around each layer: forward pass, backward pass, update. Parameters and state are donated. "Square"
has one matrix of 4096 x 4096 in each layer, "mlp" two of 1536 x 6144, "gpt" is a transformer's
block with attention, 1024 wide. Batches have few tokens. The columns:

- peak: arguments + outputs - aliased + temporaries, in bytes per parameter, by the compiler's
  account (on a TPU, in HBM);
- temporaries: the same without arguments; and in bytes for each parameter of one layer. Activations
  are among them;
- products: matrix products in the program; those in loops count once;
- trace, compile: seconds, from cold caches; "compile" includes lowering.

Without --target, models are smaller and steps run: the last column has the time of each, over that
of the plain step of the same setting. --fit compiles a GPT for one v5e, which has 16 GB: with the
plain step, the compiler runs out of memory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from command import parse_target, parser
from settings import RELEASED, Setting, settings, with_optax
from tables import head, line
from targets import HERE, compile_cold, compile_for, count, memory, refusal
from timing import stepping, times
from tqdm import tqdm

Shapes = dict[str, tuple[int, ...]]


class Model(NamedTuple):
    """A stack of equal layers."""

    shapes: Shapes  # of one layer
    batch: tuple[int, ...]
    block: Callable[[jax.Array, dict[str, jax.Array]], jax.Array]

    def loss(self, params: Any, x: jax.Array, scan: Any = jax.lax.scan) -> jax.Array:
        """Returns the mean square of the last layer's output."""

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            return self.block(x, p), None

        x, _ = scan(layer, x, params)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def params(self, layers: int, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the stacked parameters."""
        return {
            name: jax.ShapeDtypeStruct((layers, *shape), dtype)
            for name, shape in self.shapes.items()
        }


def square(width: int, tokens: int = 8) -> Model:
    """Returns a model with a square matrix in each layer."""
    return Model({"w": (width, width)}, (tokens, width), lambda x, p: x + jnp.tanh(x @ p["w"]))


def mlp(width: int, tokens: int = 8) -> Model:
    """Returns a model with two matrices in each layer, one wide and one high."""
    shapes = {"a": (width, 4 * width), "b": (4 * width, width)}
    return Model(shapes, (tokens, width), lambda x, p: x + jax.nn.gelu(x @ p["a"]) @ p["b"])


def gpt(width: int, heads: int, tokens: int = 128) -> Model:
    """Returns a model of attention and two dense layers, each after a norm."""
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


def both_steps(loss: Any, optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """Returns the plain and the releasing step, jitted; they update their arguments in place."""
    plain = with_optax(optimizer)
    ways = {"plain": plain, "released": plain._replace(released=True)}
    return {
        name: jax.jit(setting.train_step(loss), donate_argnums=(0, 1))
        for name, setting in ways.items()
    }


def products(compiled: Any) -> int:
    """Counts the matrix products in a program."""
    names = (" dot(", " convolution(", "__cublas$gemm", "__cublas$lt$matmul")
    return sum(any(name in line for name in names) for line in compiled.as_text().splitlines())


def arguments(model: Model, layers: int, setting: Setting) -> tuple[Any, Any, Any]:
    """Returns the shapes and dtypes of parameters, state and a batch."""
    params = model.params(layers, setting.dtype)
    state = jax.eval_shape(setting.init, params)
    return params, state, jax.ShapeDtypeStruct(model.batch, setting.dtype)


def account(target: str, model: Model, layers: int, setting: Setting) -> dict[str, dict[str, str]]:
    """Returns the table's cells for the plain step and the releasing one."""
    args = arguments(model, layers, setting)
    params = args[0]
    cells, compiled = {}, {}
    for name, step in both_steps(model.loss, setting.optimizer).items():
        compiled[name], seconds = compile_cold(target, step, *args)
        found = memory(compiled[name]).per(count(params))
        cells[name] = {
            "peak": f"{found.peak:.2f}",
            "temporaries": f"{found.temporaries:.3f}",
            "temporaries, of one layer": f"{found.temporaries * layers:.2f}",
            "products": str(products(compiled[name])),
            "trace, s": f"{seconds.trace:.2f}",
            "compile, s": f"{seconds.lower + seconds.compile:.1f}",
        }
    if target == HERE:
        zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)  # noqa: E731
        runs = {}
        for name, step in compiled.items():
            *carry, batch = zeros(args)
            runs[name] = stepping(lambda *carry, f=step, x=batch: f(*carry, x), carry)
        taken = times(runs, 10, 0)
        for name, cell in cells.items():
            cell["time / plain"] = f"{taken[name] / taken['plain']:.2f}"
    return cells


def fit() -> None:
    """Compiles a GPT in 7 and 5 bytes for one v5e, and prints whether it fits into 16 GB."""
    setting = settings("adamw")["7 bytes"]
    model, layers = gpt(2560, 20, tokens=1024), 32
    args = arguments(model, layers, setting)
    size = count(args[0])
    print(f"{size / 1e9:.2f}e9 parameters in {layers} layers, batches of 1024 tokens, one v5e\n")
    steps = both_steps(model.loss, setting.optimizer).values()
    for name, step in zip(["7 bytes", "5 bytes"], steps, strict=True):
        try:
            peak = memory(compile_for("v5e", step, *args)).peak
        except jax.errors.JaxRuntimeError as error:
            print(f"{name}: does not fit. {refusal(error)}")
        else:
            print(f"{name}: fits, {peak / 2**30:.2f} GiB, {peak / size:.2f} bytes per parameter")


def main() -> None:
    """Prints a table row by row."""
    options = parser("release", __doc__)
    options.add_argument("--fit", action="store_true", help="only a model that fits, or does not")
    options = parse_target(options)
    if options.fit:
        fit()
        return
    small = options.small or options.target == HERE
    cases = [
        (name, model, layers, setting)
        for name, model in (SMALL if small else MODELS).items()
        for layers in ([4] if options.small else [16, 32])
        for setting in RELEASED
    ]
    header = True
    for name, model, layers, plain in tqdm(cases):
        both = account(options.target, model, layers, settings("adamw")[plain])
        for setting, cells in zip((plain, RELEASED[plain]), both.values(), strict=True):
            if header:
                print(head("memory in bytes per parameter", cells))
                header = False
            print(line(f"{name}, {layers} layers, {setting}", cells.values()), flush=True)
