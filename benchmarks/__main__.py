"""Runs a benchmark by its name, or lists all of them: `uv run benchmarks NAME [options]`.

`uv run benchmarks NAME --help` explains a benchmark, its options and the columns of its tables.
"""

import importlib
import sys
from pathlib import Path

from catalogue import BENCHMARKS, command

sys.path.append(str(Path(__file__).parents[1]))  # adam_jax, if it is not installed


def main() -> None:
    """Runs the benchmark that the command line names, or prints the list."""
    if len(sys.argv) == 1:
        print("uv run benchmarks NAME [--help] [options]; durations are for two CPU cores.")
        for name, found in BENCHMARKS.items():
            print(f"\n{name}: {found.shows}. Takes {found.takes}.\n    {command(name)}")
        return
    _, name, *options = sys.argv
    if name not in BENCHMARKS:
        sys.exit(f"No benchmark is called {name}. Names: {', '.join(BENCHMARKS)}")
    sys.argv = [f"benchmarks {name}", *options]
    importlib.import_module(name).main()


if __name__ == "__main__":
    main()
