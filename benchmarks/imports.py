"""Times `import adam_jax` beside `import optax`, in fresh processes and in turns.

    python benchmarks/imports.py

A program that trains imports optax in any case. The last rows are therefore what is added: imports
in a process that has imported optax already, timed alone, which is steadier than a difference of
two large times. The interpreter's own start is in none of the times. The first process of each row
writes bytecode where there was none, and is not counted.
"""

import argparse
import statistics
import subprocess
import sys

from speed import machine
from tqdm import tqdm

# What is timed, by what was imported before it.
IMPORTS = [
    ("", "jax"),
    ("", "optax"),
    ("", "adam_jax"),
    ("optax", "jaxtyping"),
    ("optax", "adam_jax"),
]
BASELINE = ("", "optax")
CHILD = """
import importlib, sys, time
before, timed = sys.argv[1:]
if before:
    importlib.import_module(before)
start = time.perf_counter()
importlib.import_module(timed)
print(time.perf_counter() - start)
"""


def seconds(before: str, timed: str) -> float:
    """How long one import takes in a process of its own."""
    command = [sys.executable, "-c", CHILD, before, timed]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measures everything and prints a table in markdown; progress goes to stderr."""
    parser = argparse.ArgumentParser(
        description="Times imports in fresh processes, in turns, and prints their ratios to optax "
        "as a markdown table."
    )
    parser.add_argument(
        "--rounds", type=int, default=25, help="processes for each import (default: %(default)s)"
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="one round: shows within half a minute that this runs; the times mean nothing",
    )
    options = parser.parse_args()
    samples = {row: [] for row in IMPORTS}
    for _ in tqdm(range(1 if options.small else 1 + options.rounds), unit="round"):
        for row, times in samples.items():
            times.append(seconds(*row))
    if not options.small:
        samples = {row: times[1:] for row, times in samples.items()}

    print(f"{machine()}\n")
    print("| import | median / optax | least / optax | median, ms | least, ms |")
    print("|---|---|---|---|---|")
    medians = {row: statistics.median(times) for row, times in samples.items()}
    least = {row: min(times) for row, times in samples.items()}
    for before, timed in IMPORTS:
        row = before, timed
        name = f"`{timed}`, after `{before}`" if before else f"`{timed}`"
        ratios = [f"{times[row] / times[BASELINE]:.3f}" for times in (medians, least)]
        absolute = [f"{1e3 * times[row]:.1f}" for times in (medians, least)]
        print(f"| {' | '.join([name, *ratios, *absolute])} |")


if __name__ == "__main__":
    main()
