"""Counts the arithmetic of a step for each element, in the compiled program.

    uv run benchmarks arithmetic
    uv run --group compilers benchmarks arithmetic --target h100
    uv run --group compilers benchmarks arithmetic --sass

The first two count operations in XLA's optimized program, in all of its passes over arrays of the
leaf's own shape. An operation that a backend computes twice counts twice.

With --sass, counts the machine instructions that an H100 executes in all kernels of a step. Kernels
for rows and scalars count too, and come to almost nothing. This needs NVIDIA's compilers but no
GPU; `sass.py` describes how it counts. The kinds of instructions:

    float       additions and multiplications of floating-point numbers
    integer     integer arithmetic, shifts and logic; the compiler also moves values with these
    comparison  comparisons, selects, minima and maxima
    conversion  conversions between formats, and rounding to integers
    special     approximate reciprocals, square roots, exponentials and so on
    memory      loads and stores, of constants and shared memory too
    other       moves, shuffles, barriers, exits

At 12 bytes per parameter an H200 (4.8 TB/s, 132 multiprocessors of 128 lanes, 1.75 GHz) has time
for some 75 instructions for each element before arithmetic, and no longer memory, sets the pace;
for half as many if they are integer operations, comparisons and conversions, and for 10 of its
special-function units (a square root, a division or an exponential is one or more). A TPU v5e is
much alike.
"""

import argparse
import collections
import re

import jax
import sass
from command import parse_target, parser
from settings import Setting, settings
from tables import table
from targets import compile_for
from tqdm import tqdm

SHAPE = (4096, 4096)
SASS = "h100, machine instructions"  # what --sass compiles for, instead of a --target
KINDS = {
    "special": {"divide", "sqrt", "rsqrt", "exponential", "log", "power", "cbrt"},
    "multiply, add": {"add", "subtract", "multiply", "negate"},
    "other": {
        *("abs", "and", "clamp", "compare", "floor", "is-finite", "maximum", "minimum", "not"),
        *("or", "select", "shift-left", "shift-right-arithmetic", "shift-right-logical", "sign"),
        *("xor", "convert"),
    },
}
INSTRUCTION = re.compile(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")


def count(setting: Setting, target: str) -> collections.Counter[str]:
    """Counts the operations for each element, or with SASS the instructions, by kind."""
    leaf = jax.ShapeDtypeStruct(SHAPE, setting.dtype)
    state = jax.eval_shape(setting.init, [leaf])
    arguments = setting.jitted(), [leaf], state, [leaf]
    if target == SASS:
        kinds = sass.by_kind(sass.count(*arguments))
        return collections.Counter({kind: kinds[kind] / leaf.size for kind in kinds})
    return operations(compile_for(target, *arguments).as_text())


def operations(text: str) -> collections.Counter[str]:
    """Counts operations of each kind, floating-point numbers and integers separately."""
    counts: collections.Counter[str] = collections.Counter()
    for dtype, shape, operation in INSTRUCTION.findall(text):
        if shape != ",".join(map(str, SHAPE)):
            continue
        for kind, operations in KINDS.items():
            if operation in operations:
                integer = dtype[0] in "su" and kind != "other"  # a division, by a constant
                counts["integer multiply, add" if integer else kind] += 1
    return counts


def main() -> None:
    """Compiles every setting and prints a table."""
    arguments = parser("arithmetic", __doc__)
    arguments.add_argument(
        "--sass",
        dest="target",
        action="store_const",
        const=SASS,
        default=argparse.SUPPRESS,
        help="count machine instructions of an H100",
    )
    options = parse_target(arguments)
    if options.target == SASS:
        title, columns = "instructions of an H100 per element", [*sass.KINDS, "other"]
    else:
        title = f"operations per element, compiled for {options.target}"
        columns = ["special", "multiply, add", "integer multiply, add", "other"]
    rows = {}
    for name, setting in tqdm([*settings().items()][: 2 if options.small else None]):
        counts = count(setting, options.target)
        numbers = [counts[column] for column in columns]
        rows[name] = [f"{x:.{int(options.target == SASS)}f}" for x in (*numbers, sum(numbers))]
    print(table(title, [*columns, "in all"], rows))
