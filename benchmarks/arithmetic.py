"""The arithmetic of a step for each element, counted in the compiled program.

    python benchmarks/arithmetic.py
    python benchmarks/arithmetic.py --target h100

Counted are the instructions on arrays of the leaf's own shape, in all of the compiled passes, so
that what a backend computes twice counts twice. At 12 bytes per parameter an H200 (4.8 TB/s, 132
multiprocessors of 128 lanes, 1.75 GHz) has time for some 75 instructions for each element before
arithmetic and no longer memory sets the pace; for half as many if they are integer operations,
comparisons and conversions, and for 10 of its special-function units (a square root, a division or
an exponential is one or more). A TPU v5e is much alike.
"""

import argparse
import collections
import re

import jax
from settings import Setting, settings
from targets import compile_for, parse_target
from tqdm import tqdm

SHAPE = (4096, 4096)
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
    """The number of operations of each kind, apart for floating-point numbers and integers."""
    leaf = jax.ShapeDtypeStruct(SHAPE, setting.dtype)
    state = jax.eval_shape(setting.init, [leaf])
    text = compile_for(target, setting.jitted(), [leaf], state, [leaf]).as_text()
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
    """Compiles every setting and prints a table in markdown; progress goes to stderr."""
    parser = argparse.ArgumentParser(description="Counts a step's operations for each element.")
    target = parse_target(parser).target
    columns = ["special", "multiply, add", "integer multiply, add", "other", "in all"]
    rows = {name: count(setting, target) for name, setting in tqdm(settings().items())}
    print(f"| operations per element, compiled for {target} | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name, counts in rows.items():
        counts["in all"] = counts.total()
        print(f"| {name} | {' | '.join(str(counts[column]) for column in columns)} |")


if __name__ == "__main__":
    main()
