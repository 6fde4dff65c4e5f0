"""Lists the steps to compile for other devices, and finds faults in the programs."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import optax
from covering import cover
from hlo import Program
from optimizers import ROWS, Row

import adam_jax

TARGETS = ("v5e", "h100")
SCHEDULE = optax.cosine_decay_schedule(1e-3, 10_000)
FORMATS = (None, "bfloat16", "int8")
# The dtype of parameters and gradients, and the remainder, if they are in `master_weights`.
WEIGHTS = (
    ("float32", None),
    ("bfloat16", None),
    *(("bfloat16", remainder) for remainder in ("none", "int8", "int16", "float32")),
)
# A square aligned matrix, an embedding of odd size, a stack of layers, a convolution.
SHAPES = ((4096, 4096), (50257, 768), (12, 768, 3072), (3, 3, 512, 512))
LARGE = 100_000  # elements; biases and norms are smaller and not checked


@dataclasses.dataclass(frozen=True)
class Setting:
    row: Row
    mu_format: str | None
    nu_format: str | None
    weights: tuple[str, str | None]
    shape: tuple[int, ...]

    def __str__(self):
        dtype, remainder = self.weights
        formats = f"{self.mu_format or 'float32'}-{self.nu_format or 'float32'}"
        weights = f"{dtype}+{remainder}" if remainder else dtype
        return "-".join([self.row.name, formats, weights, "x".join(map(str, self.shape))])

    def optimizer(self):
        inner = self.row.make(
            learning_rate=SCHEDULE, mu_dtype=self.mu_format, nu_dtype=self.nu_format
        )
        _, remainder = self.weights
        return inner if remainder is None else adam_jax.master_weights(inner, remainder)

    def step(self):
        """Returns the end of a step: from gradients to new parameters and state, in place."""
        optimizer = self.optimizer()

        def step(params, state, gradients):
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        # With unused arguments too, the program's parameters are all leaves, in order.
        return jax.jit(step, donate_argnums=(0, 1), keep_unused=True)

    def params(self, shapes=None):
        dtype, _ = self.weights
        return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes or [self.shape]]


def grid():
    """Returns every optimizer x each format it accepts x every kind of weights x every shape."""
    settings = []
    rows = [row for row in ROWS if (row.mu_format, row.nu_format) == (None, None)]
    for row, mu, nu in itertools.product(rows, FORMATS, FORMATS):
        formats = {"mu_dtype": mu, "nu_dtype": nu}
        try:
            row.make(**formats)
        except ValueError:  # refused: tests/test_storage.py tests refusals
            continue
        if all(format is None or row.takes(name) for name, format in formats.items()):
            settings += [
                Setting(row, mu, nu, weights, shape)
                for weights, shape in itertools.product(WEIGHTS, SHAPES)
            ]
    return settings


def covering(settings):
    """Selects few: all optimizers, and each pair of algorithm, formats, weights and shape."""

    def pairs(setting):
        formats = setting.mu_format, setting.nu_format
        parts = setting.row.algorithm, formats, setting.weights, setting.shape
        return {setting.row.name, *itertools.combinations(parts, 2)}

    return cover(settings, pairs)


def faults(compiled, params, state, gradients_read_twice):
    """Returns the faults of a compiled step, in words.

    `gradients_read_twice` lists the leaves whose gradients may be read once more, for the largest
    of each row. An array is taken for the leaf that has its size.
    """
    program = Program(compiled.as_text())
    return [
        *_not_in_place(program, params, state),
        *_temporaries(compiled, params),
        *_unwanted(program),
        *_passes(program, params, gradients_read_twice),
    ]


def _not_in_place(program, params, state):
    parameters = program.entry.parameters
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path((params, state))):
        if leaf.ndim == 0:  # only 4 bytes
            continue
        over = program.aliased.get(i)
        if over is None or parameters[over].arrays[0].shape != leaf.shape:
            yield f"{jax.tree_util.keystr(path)} is not updated in place"


def _temporaries(compiled, params):
    elements = sum(leaf.size for leaf in jax.tree.leaves(params))
    temporaries = compiled.memory_analysis().temp_size_in_bytes / elements
    if temporaries > 0.05:
        yield f"{temporaries:.3f} bytes of temporaries per parameter"


def _unwanted(program):
    if "f64[" in program.text:
        yield "float64"
    for operation in ("infeed", "outfeed", "send", "recv", "while", "conditional"):
        if operation in program.operations():
            yield operation


def _passes(program, params, gradients_read_twice):
    """Yields passes over large leaves beyond the one that updates each of them."""
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    counts = collections.Counter(size for size in sizes if size >= LARGE)
    again = collections.Counter(leaf.size for leaf in gradients_read_twice)
    entry = program.entry.instructions
    for size, count in counts.items():
        writes, reads = [], []
        for x in entry.values():
            if x.operation in ("parameter", "tuple", "get-tuple-element", "bitcast") or _moves(x):
                continue
            if any(array.size == size for array in x.arrays):
                writes.append(x)
            elif any(array.size == size for name in x.operands for array in entry[name].arrays):
                reads.append(x)
        # There are fewer where the compiler has fused leaves of one shape.
        if len(writes) > count or any(x.operation != "fusion" for x in writes):
            yield f"{len(writes)} passes over {count} leaves of {size}: {_names(writes)}"
        if len(reads) > again[size]:
            yield f"{len(reads)} more that read {again[size]} leaves of {size}: {_names(reads)}"


def _moves(x):
    """Returns whether an operation only moves an array into a TPU's vector memory, or out of it.

    A fusion works in that memory and reads nothing that was moved there before. The compiler
    marks arrays there with S(1); a copy within the main memory would be a pass.
    """
    if (
        x.operation.endswith("-done")
        or x.attribute("custom_call_target", '"(.*?)"') == "ConcatBitcast"
    ):
        return True
    if x.operation in ("copy-start", "slice-start"):
        first, second, *_ = x.arrays
        return ("S(1)" in first.layout) != ("S(1)" in second.layout)
    return False


def _names(instructions):
    return ", ".join(f"{x.operation} {x.name}" for x in instructions)
