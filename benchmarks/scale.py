"""Adam's step on all parameters of Llama 3.1 405B, compiled for a TPU pod that need not be here.

    uv run --with "jax[tpu]" benchmarks/scale.py
    uv run --with "jax[tpu]" benchmarks/scale.py --topology v5e:16x16

Only the TPU's compiler is needed. No array is made; what is compiled is the end of a training step:
gradients go in, Adam with decoupled decay and a schedule updates them and the result is added to
the parameters; parameters and state are donated. v5p:16x16x16 is the largest slice of a pod by
which the model's dimensions can be divided.

The mesh has axes "data" and "model". Weights are divided over both, one dimension each (FSDP and
tensor parallelism). With ZeRO-1 they are divided over "model" alone, and their state and gradients
over "data" as well; gradients come as a reduce-scatter has left them. The state lies where
`adam_jax.state_shardings` says. "Scanned" layers are stacked, so that a leaf has a weight of all of
them; "unrolled", each layer's weights are leaves of their own. The columns, of one chip:

- arguments, aliased, temporaries: the compiler's account of the program, gradients included.
  Aliased are the outputs that are written over donated arguments;
- peak: arguments + outputs - aliased + temporaries;
- bytes per parameter: arguments of all chips, over the number of parameters;
- moved: what no step can do without: the chip's part of parameters, gradients and state in,
  parameters and state out. A program with temporaries moves more;
- ms: what is moved, at the speed of the chip's memory that Google's documentation states (v5p 2765
  GB/s, v5e 819 GB/s). Neither arithmetic nor collectives are in it;
- collectives: how many of each kind are in the program, and the size of what comes out of them;
- trace, lower, compile: seconds on this machine, from cold caches.
"""

import argparse
import collections
import datetime
import functools
import importlib.metadata
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from settings import with_optax
from speed import machine
from targets import tpu
from tqdm import tqdm

import adam_jax

MESHES = {"v5p:16x16x16": (128, 32), "v5e:16x16": (8, 32)}  # chips along "data" and "model"
BANDWIDTH = {"v5p": 2765e9, "v5e": 819e9}  # of a chip's memory, in bytes per second
LAYOUTS = {  # is it scanned, is it ZeRO-1, and how many layers at most
    "scanned": (True, False, 126),
    "scanned, ZeRO-1": (True, True, 126),
    "unrolled": (False, False, 16),
}
COLUMNS = [
    *("arguments, MB", "aliased, MB", "temporaries, MB", "peak, MB", "bytes per parameter"),
    *("moved, MB", "ms", "collectives", "trace, s", "lower, s", "compile, s"),
]
# The result, and the kind. An asynchronous one has its result where it is done.
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)(?:-done)?\("
)
ARRAY = re.compile(r"[a-z]+(\d+)\[([\d,]*)\]")  # the bits of its dtype, and its shape


class Weight(NamedTuple):
    """A weight's shape, and the axis of the mesh that divides each dimension."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


class Llama(NamedTuple):
    """A model's dimensions: by default, those of Llama 3.1 405B."""

    layers: int = 126
    width: int = 16384  # that of 128 heads as well
    key_value: int = 1024  # 8 heads
    mlp: int = 53248
    vocabulary: int = 128256

    def weights(self, scanned: bool) -> list[Weight]:
        """All of them."""
        norm = Weight((self.width,), ("data",))
        attention = [self.into(self.width), *[self.into(self.key_value)] * 2]
        attention.append(self.out_of(self.width))
        mlp = [self.into(self.mlp), self.into(self.mlp), self.out_of(self.mlp)]
        layer = [norm, *attention, norm, *mlp]
        if scanned:
            layers = [Weight((self.layers, *shape), (None, *axes)) for shape, axes in layer]
        else:
            layers = layer * self.layers
        return [self.out_of(self.vocabulary), *layers, norm, self.into(self.vocabulary)]

    def into(self, size: int) -> Weight:
        """The matrix of a layer from the model's width."""
        return Weight((self.width, size), ("data", "model"))

    def out_of(self, size: int) -> Weight:
        """The matrix of a layer to the model's width."""
        return Weight((size, self.width), ("model", "data"))


def settings() -> dict[str, tuple[optax.GradientTransformation, type]]:
    """By name: the optimizer, and the dtype of both parameters and gradients."""
    schedule = optax.warmup_cosine_decay_schedule(0, 8e-5, 8_000, 1_200_000, 8e-7)  # Llama's
    adamw = functools.partial(adam_jax.adamw, schedule, weight_decay=0.1)
    int8 = adamw(mu_dtype="int8", nu_dtype="int8")
    return {
        "optax.adamw": (optax.adamw(schedule, weight_decay=0.1), jnp.float32),
        "adamw, float32 moments": (adamw(), jnp.float32),
        "adamw, bfloat16 moments": (adamw(mu_dtype="bfloat16", nu_dtype="bfloat16"), jnp.float32),
        "bfloat16 parameters, int8 remainder, int8 moments": (
            adam_jax.master_weights(int8, "int8"),
            jnp.bfloat16,
        ),
    }


class Step(NamedTuple):
    """A training step's end, and what goes into it: shapes, and where they lie."""

    function: Any  # jitted
    params: Any
    state: Any
    gradients: Any

    @property
    def moved(self) -> int:
        """The bytes that each chip has to read and to write."""
        # Where parameters are not divided as gradients are, a chip reads only so much of them.
        return 2 * held((self.gradients, self.state)) + held(self.params)


def step(
    weights: list[Weight],
    optimizer: optax.GradientTransformation,
    dtype: type,
    mesh: Mesh,
    zero: bool,
) -> Step:
    """The step of one setting."""
    undivided = {"data"} if zero else set()
    axes = [[None if axis in undivided else axis for axis in weight.axes] for weight in weights]
    shardings = [NamedSharding(mesh, PartitionSpec(*names)) for names in axes]
    arrays = [jax.ShapeDtypeStruct(weight.shape, dtype) for weight in weights]
    params = placed(arrays, shardings)
    state_shardings = adam_jax.state_shardings(optimizer, params, axis="data" if zero else None)
    return Step(
        jax.jit(
            with_optax(optimizer, dtype).step,
            donate_argnums=(0, 1),
            out_shardings=(shardings, state_shardings),
        ),
        params,
        placed(jax.eval_shape(optimizer.init, params), state_shardings),
        placed(arrays, optax.tree.get(state_shardings, "mu")),
    )


def placed(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree, each with where it lies."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def held(tree: Any) -> int:
    """The bytes of a chip's part of a tree."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def cells(step: Step, chips: int, bandwidth: float) -> list[str]:
    """The table's row for a step, but for its name."""
    jax.clear_caches()
    traced, trace = timed(step.function.trace, step.params, step.state, step.gradients)
    lowered, lower = timed(functools.partial(traced.lower, lowering_platforms=("tpu",)))
    compiled, compile = timed(lowered.compile)
    memory = compiled.memory_analysis()
    arguments, aliased = memory.argument_size_in_bytes, memory.alias_size_in_bytes
    peak = arguments + memory.output_size_in_bytes - aliased + memory.temp_size_in_bytes
    parameters = sum(leaf.size for leaf in step.params)
    return [
        *map(megabytes, (arguments, aliased, memory.temp_size_in_bytes, peak)),
        f"{arguments * chips / parameters:.2f}",
        megabytes(step.moved),
        f"{1e3 * step.moved / bandwidth:.3g}",
        collectives(compiled.as_text()),
        *(f"{seconds:.2f}" for seconds in (trace, lower, compile)),
    ]


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What the function returns, and the seconds that it takes."""
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def megabytes(size: int) -> str:
    """A size of a table."""
    return f"{size / 1e6:,.1f}"


def collectives(text: str) -> str:
    """The collectives in a compiled program's text."""
    sizes = collections.defaultdict(list)
    for result, kind in COLLECTIVE.findall(text):
        arrays = [
            int(bits) // 8 * math.prod(int(size) for size in shape.split(",") if size)
            for bits, shape in ARRAY.findall(result)
        ]
        sizes[kind].append(sum(arrays))
    found = [f"{len(x)} {kind}, {megabytes(sum(x))} MB" for kind, x in sorted(sizes.items())]
    return "; ".join(found) or "none"


def main() -> None:
    """Compiles every setting and prints tables in markdown; progress goes to stderr."""
    parser = argparse.ArgumentParser(
        description="Compiles Adam's step of Llama 3.1 405B for a TPU pod and prints markdown "
        "tables of what it takes."
    )
    pods = list(MESHES)
    parser.add_argument("--topology", choices=pods, default=pods[0], help="default: %(default)s")
    parser.add_argument(
        "--small",
        action="store_true",
        help="a small model on four chips: shows within seconds that all of this runs",
    )
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # or JAX would look for the device itself
    topology, model = options.topology, Llama()
    data, tensor = MESHES[topology]
    if options.small:
        topology, model, data, tensor = "v5e:2x2", Llama(2, 512, 256, 1024, 2048), 2, 2
    mesh = Mesh(np.array(tpu(topology)).reshape(data, tensor), ("data", "model"))
    print(f"{datetime.date.today()}, {machine()}, libtpu {importlib.metadata.version('libtpu')}\n")
    print(f"{model}, on {mesh.size} chips ({topology}), {data} along data, {tensor} along model.")
    progress = tqdm(total=len(LAYOUTS) * len(settings()))
    for layout, (scanned, zero, most) in LAYOUTS.items():
        layers = min(model.layers, most)
        weights = model._replace(layers=layers).weights(scanned)
        parameters = sum(math.prod(weight.shape) for weight in weights)
        print(f"\n{layers} layers, {parameters / 1e9:.2f} billion parameters:\n")
        print(f"| {layout} | {' | '.join(COLUMNS)} |")
        print("|---" * (1 + len(COLUMNS)) + "|", flush=True)
        for name, (optimizer, dtype) in settings().items():
            one = step(weights, optimizer, dtype, mesh, zero)
            try:
                found = cells(one, mesh.size, BANDWIDTH[topology.partition(":")[0]])
            except jax.errors.JaxRuntimeError as error:  # more than the chips' memory can hold
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                found = [str(error).splitlines()[0], *[""] * (len(COLUMNS) - 1)]
            print(f"| {name} | {' | '.join(found)} |", flush=True)
            progress.update()
    progress.close()


if __name__ == "__main__":
    main()
