"""Times `import adam_jax` and `import optax`, in fresh processes and in turns.

    uv run benchmarks imports

A program that trains imports optax in any case. The last two rows are therefore what adam_jax adds:
imports in a process that has imported optax already. They are timed alone, which is steadier than
a difference of two large times. No time includes the interpreter's own start. The first process of
each row, which writes bytecode, does not count.
"""

import functools
import statistics
import subprocess
import sys

from command import parser
from tables import table
from timing import in_turns, machine

# (what is imported before, what is timed)
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
    """Returns the time of one import in a process of its own."""
    command = [sys.executable, "-c", CHILD, before, timed]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measures everything and prints a table."""
    arguments = parser("imports", __doc__)
    arguments.add_argument("--rounds", type=int, default=25, help="turns of each (default: 25)")
    options = arguments.parse_args()
    samplers = {row: functools.partial(seconds, *row) for row in IMPORTS}
    samples = in_turns(samplers, 1 if options.small else 1 + options.rounds)
    if not options.small:
        samples = {row: times[1:] for row, times in samples.items()}
    found = {row: (statistics.median(times), min(times)) for row, times in samples.items()}
    rows = {}
    for before, timed in IMPORTS:
        median, least = found[before, timed]
        base_median, base_least = found[BASELINE]
        ratios = [f"{median / base_median:.3f}", f"{least / base_least:.3f}"]
        absolute = [f"{1e3 * median:.1f}", f"{1e3 * least:.1f}"]
        rows[f"`{timed}`, after `{before}`" if before else f"`{timed}`"] = [*ratios, *absolute]
    columns = ["median / optax", "least / optax", "median, ms", "least, ms"]
    print(f"{machine()}\n\n{table('import', columns, rows)}")
