"""Compiles Adam's step of Llama 3.1 405B for a whole TPU pod.

    uv run --group compilers benchmarks scale
    uv run --group compilers benchmarks scale --topology v5e:16x16

Only the TPU's compiler is needed. No array is made. The program is the end of a training step:
gradients go in, AdamW with a schedule updates them, and the result is added to the parameters.
Parameters and state are donated. v5p:16x16x16 is the largest slice of a pod that divides the
model's dimensions.

The mesh has axes "data" and "model". Weights are divided over both, one dimension each (FSDP and
tensor parallelism). With ZeRO-1 they are divided over "model" alone, and their state and gradients
over "data" as well; gradients come as a reduce-scatter leaves them. `adam_jax.state_shardings`
places the state. "Scanned" layers are stacked: a leaf has a weight of all of them. In "unrolled"
ones, each layer's weights are leaves of their own. The columns, of one chip:

- arguments, aliased, temporaries: the compiler's account of the program, gradients included.
  Aliased are the outputs that are written over donated arguments;
- peak: arguments + outputs - aliased + temporaries;
- bytes per parameter: arguments of all chips, over the number of parameters;
- moved: the bytes that no step can do without. A chip reads its part of parameters, gradients and
  state, and writes parameters and state. A program with temporaries moves more;
- ms: the time to move them at the speed of the chip's memory that Google's documentation states
  (v5p 2765 GB/s, v5e 819 GB/s). Neither arithmetic nor collectives are in it;
- collectives: the number of each kind in the program, and the size of their results;
- trace, lower, compile: seconds on this machine, from cold caches.
"""

import collections
import datetime
import importlib.metadata
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from command import only_compile, parser
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from settings import Setting, settings
from tables import head, line, megabytes
from targets import compile_cold, count, memory, nbytes, placed, refusal, tpu
from timing import machine
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
# The result, and the kind. An asynchronous collective has its result at its "-done".
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
        """Returns all weights."""
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
        """Returns a matrix that maps from the model's width."""
        return Weight((self.width, size), ("data", "model"))

    def out_of(self, size: int) -> Weight:
        """Returns a matrix that maps to the model's width."""
        return Weight((size, self.width), ("model", "data"))


def compared() -> dict[str, Setting]:
    """Returns the settings, with Llama's schedule and weight decay."""
    schedule = optax.warmup_cosine_decay_schedule(0, 8e-5, 8_000, 1_200_000, 8e-7)
    found = settings("adamw", schedule, weight_decay=0.1)
    return {name: found[name] for name in ("optax.adamw", "float32", "bfloat16 moments", "7 bytes")}


class Step(NamedTuple):
    """The end of a training step, and its arguments: shapes with shardings."""

    function: Any  # jitted
    params: Any
    state: Any
    gradients: Any

    @property
    def moved(self) -> int:
        """Returns the bytes that each chip has to read and to write."""
        # If parameters are divided less than gradients, a chip reads only the gradients' part.
        return 2 * nbytes((self.gradients, self.state)) + nbytes(self.params)


def step(weights: list[Weight], setting: Setting, mesh: Mesh, zero: bool) -> Step:
    """Returns the step of one setting."""
    undivided = {"data"} if zero else set()
    axes = [[None if axis in undivided else axis for axis in weight.axes] for weight in weights]
    shardings = [NamedSharding(mesh, PartitionSpec(*names)) for names in axes]
    arrays = [jax.ShapeDtypeStruct(weight.shape, setting.dtype) for weight in weights]
    params = placed(arrays, shardings)
    state_shardings = adam_jax.state_shardings(setting, params, axis="data" if zero else None)
    return Step(
        jax.jit(setting.step, donate_argnums=(0, 1), out_shardings=(shardings, state_shardings)),
        params,
        placed(jax.eval_shape(setting.init, params), state_shardings),
        placed(arrays, optax.tree.get(state_shardings, "mu")),
    )


def cells(step: Step, topology: str, chips: int) -> list[str]:
    """Returns the cells of a step's row."""
    try:
        compiled, seconds = compile_cold(topology, *step)
    except jax.errors.JaxRuntimeError as error:  # more than the chips' memory can hold
        return [refusal(error), *[""] * (len(COLUMNS) - 1)]
    found = memory(compiled)
    return [
        *map(megabytes, (found.arguments, found.aliased, found.temporaries, found.peak)),
        f"{found.arguments * chips / count(step.params):.2f}",
        megabytes(step.moved),
        f"{1e3 * step.moved / BANDWIDTH[topology.partition(':')[0]]:.3f}",
        collectives(compiled.as_text()),
        *(f"{time:.2f}" for time in seconds),
    ]


def collectives(text: str) -> str:
    """Lists the collectives in a compiled program's text."""
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
    """Compiles every setting and prints a table for each layout, row by row."""
    options = parser("scale", __doc__)
    pods = list(MESHES)
    options.add_argument("--topology", choices=pods, default=pods[0], help="default: %(default)s")
    options = options.parse_args()
    only_compile()
    topology, model = options.topology, Llama()
    data, tensor = MESHES[topology]
    if options.small:
        topology, model, data, tensor = "v5e:2x2", Llama(2, 512, 256, 1024, 2048), 2, 2
    mesh = Mesh(np.array(tpu(topology)).reshape(data, tensor), ("data", "model"))
    print(f"{datetime.date.today()}, {machine()}, libtpu {importlib.metadata.version('libtpu')}\n")
    print(f"{model}, on {mesh.size} chips ({topology}), {data} along data, {tensor} along model.")
    progress = tqdm(total=len(LAYOUTS) * len(compared()))
    for layout, (scanned, zero, most) in LAYOUTS.items():
        layers = min(model.layers, most)
        weights = model._replace(layers=layers).weights(scanned)
        parameters = sum(math.prod(weight.shape) for weight in weights)
        print(f"\n{layers} layers, {parameters / 1e9:.2f} billion parameters:\n")
        print(head(layout, COLUMNS), flush=True)
        for name, setting in compared().items():
            found = cells(step(weights, setting, mesh, zero), topology, mesh.size)
            print(line(name, found), flush=True)
            progress.update()
    progress.close()
