"""Bytes per parameter of training GPT-2 with Adam in each setting, and the time to compile it.

    python benchmarks/bytes.py
    python benchmarks/bytes.py --target h100

What is compiled, for the backend that JAX finds here or for a device that need not be here
(`targets.py` says what that takes), is the end of a training step: gradients go
in, the optimizer updates them and the result is added to the parameters; parameters and state are
donated. No array is made. The columns:

- weight, gradient: what a parameter and its gradient take;
- state: what `init` returns;
- arguments, outputs, aliased, temporaries: the compiler's account of the program. Aliased are the
  outputs that are written over donated arguments;
- peak: arguments + outputs - aliased + temporaries;
- compile: the time to trace, lower and compile the program, as a multiple of optax.adam's.

Backends differ in the temporaries: XLA splits a step into more passes on a CPU than on a GPU or
TPU. FlashOptim is measured where its package, `flashoptim-jax`, is installed; on a CPU that is its
version without kernels.
"""

import argparse
import time
from typing import Any

import jax
from settings import Setting, Shapes, gpt2, settings
from targets import HERE, compile_for, parse_target
from tqdm import tqdm


def account(setting: Setting, shapes: Shapes, target: str) -> dict[str, float]:
    """The table's numbers for one setting."""
    params = [jax.ShapeDtypeStruct(shape, setting.dtype) for shape in shapes]
    state = jax.eval_shape(setting.init, params)
    jax.clear_caches()  # nothing is remembered from before
    start = time.perf_counter()
    compiled = compile_for(target, setting.jitted(), params, state, params)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not count memory"
    counts = {
        "weight": size(params),
        "gradient": size(params),
        "state": size(state),
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    live = counts["arguments"] + counts["outputs"] - counts["aliased"]
    counts["peak"] = live + counts["temporaries"]
    elements = sum(leaf.size for leaf in params)
    return {column: count / elements for column, count in counts.items()} | {"compile": seconds}


def size(tree: Any) -> int:
    """The bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Compiles every setting and prints a table in markdown; progress goes to stderr."""
    parser = argparse.ArgumentParser(
        description="Prints the bytes per parameter of Adam's settings as a markdown table."
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="a small GPT-2 without layers: shows within seconds that all of this runs",
    )
    options = parse_target(parser)
    shapes = gpt2(256, 512, 128, 0) if options.small else gpt2(768, 50257, 1024, 12)
    found = settings()
    account(found["optax.adam"], shapes, options.target)  # the first one starts the compiler
    rows = {name: account(setting, shapes, options.target) for name, setting in tqdm(found.items())}
    seconds = rows["optax.adam"]["compile"]
    for row in rows.values():
        row["compile"] /= seconds
    columns = next(iter(rows.values()))
    device = jax.devices()[0].device_kind if options.target == HERE else options.target
    print(f"GPT-2, {len(shapes)} leaves, compiled for {device}; optax.adam in {seconds:.1f} s.\n")
    print(f"| bytes per parameter | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name, row in rows.items():
        cells = [f"{row[column]:.{1 if column == 'compile' else 3}f}" for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
