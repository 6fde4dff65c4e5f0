"""Bytes per parameter of a step of GPT-2 in each setting, and the time to compile it.

    uv run benchmarks bytes
    uv run --group compilers benchmarks bytes --target h100

Compiles the end of a training step: gradients go in, the optimizer updates them, and the result is
added to the parameters. Parameters and state are donated. No array is made. The columns:

- weight, gradient, state: the arrays themselves;
- arguments, outputs, aliased, temporaries: the compiler's account of the program. Aliased are the
  outputs that are written over donated arguments;
- peak: arguments + outputs - aliased + temporaries;
- compile time: to trace, lower and compile the program, as a multiple of optax.adam's.

Backends differ in the temporaries: XLA splits a step into more passes on a CPU than on a GPU or
TPU. FlashOptim is included if its package, `flashoptim-jax`, is installed; on a CPU, and compiled
for another device, that is its version without kernels.
"""

import jax
from command import parse_target, parser
from settings import Setting, Shapes, gpt2, settings
from tables import table
from targets import HERE, compile_cold, count, memory, nbytes
from tqdm import tqdm

COMPILE = "compile time / optax.adam"


def account(setting: Setting, shapes: Shapes, target: str) -> dict[str, float]:
    """Returns the table's numbers for one setting; the time in seconds."""
    params = [jax.ShapeDtypeStruct(shape, setting.dtype) for shape in shapes]
    state = jax.eval_shape(setting.init, params)
    compiled, seconds = compile_cold(target, setting.jitted(), params, state, params)
    elements, found = count(params), memory(compiled).per(count(params))
    return {
        "weight": nbytes(params) / elements,
        "gradient": nbytes(params) / elements,
        "state": nbytes(state) / elements,
        **found._asdict(),
        "peak": found.peak,
        COMPILE: sum(seconds),
    }


def main() -> None:
    """Compiles every setting and prints a table."""
    options = parse_target(parser("bytes", __doc__))
    shapes = gpt2(256, 512, 128, 0) if options.small else gpt2(768, 50257, 1024, 12)
    found = settings()
    account(found["optax.adam"], shapes, options.target)  # the first one starts the compiler
    rows = {name: account(setting, shapes, options.target) for name, setting in tqdm(found.items())}
    seconds = rows["optax.adam"][COMPILE]
    for row in rows.values():
        row[COMPILE] /= seconds
    columns = list(rows["optax.adam"])
    device = jax.devices()[0].device_kind if options.target == HERE else options.target
    print(f"GPT-2, {len(shapes)} leaves, compiled for {device}; optax.adam in {seconds:.1f} s.\n")
    cells = {
        name: [f"{x:.{1 if column == COMPILE else 3}f}" for column, x in row.items()]
        for name, row in rows.items()
    }
    print(table("bytes per parameter", columns, cells))
