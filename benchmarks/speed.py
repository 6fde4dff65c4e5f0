"""Times adam_jax, optax.adam and, if they are installed, torch's fused Adam and FlashOptim.

    uv run benchmarks speed
    uv run --with torch --with flashoptim-jax benchmarks speed

All contestants run in one process and take turns after a warm-up. Tables have medians and their
ratios; absolute times mean little on another machine. The first table compares float32 with optax
and torch:

- step: the jitted and donated step, `update` and `optax.apply_updates`;
- eager update: an `optimizer.update` that is not jitted;
- trace, lower, compile: the stages of compiling a step, from cold caches. "The optimizer's part" is
  trace + lower, less the time of a step of gradient descent on the same arguments.

The other tables have the step in each storage format, compared with float32 and with FlashOptim's
setting of the same name, and the time to compile it.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import optax
from command import parser
from settings import RATE, Setting, Shapes, gpt2, settings, with_optax
from tables import number, table
from targets import HERE, Stages, compile_cold
from timing import has_torch, in_turns, machine, stepping, times

import adam_jax

TORCH = "torch, fused"
TIMED = ["optax.adam", "float32", "bfloat16 moments", "int8 moments", "7 bytes"]
TIMED += [f"FlashOptim, {name}" for name in ("int8 moments", "7 bytes")]
DESCENT = "gradient descent"


def cases(small: bool) -> dict[str, Shapes]:
    """Returns the shapes of the leaves of each tree."""
    leaf, many, fewer = ((2**10,), 10, 5) if small else ((2**25,), 1000, 500)
    return {
        f"one leaf of {leaf[0]:,}": [leaf],
        "GPT-2": gpt2(16, 64, 32, 2) if small else gpt2(768, 50257, 1024, 12),
        f"{many} leaves of (128, 64)": [(128, 64)] * many,
        f"{fewer} leaves of (64,)": [(64,)] * fewer,
    }


def cases_of_formats(small: bool) -> dict[str, Shapes]:
    """Returns the trees for the table of formats; int8 has a scale for each row of a leaf."""
    leaf = (64, 128) if small else (4096, 8192)
    return {f"one leaf of {leaf}": [leaf], "GPT-2": cases(small)["GPT-2"]}


def normal(shapes: Shapes, seed: int) -> list[jax.Array]:
    """Draws standard normal leaves."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    draw = jax.jit(jax.random.normal, static_argnums=1)
    return [draw(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def jitted_step(setting: Setting, shapes: Shapes) -> Callable[[], None]:
    """Returns a function that makes a donated step, on arrays of its own."""
    step = setting.jitted()
    params, gradients = (
        [leaf.astype(setting.dtype) for leaf in normal(shapes, seed)] for seed in (0, 1)
    )
    return stepping(lambda *carry: step(*carry, gradients), [params, setting.init(params)])


def eager_update(setting: Setting, shapes: Shapes) -> Callable[[], None]:
    """Returns a function that calls `optimizer.update` without jit and without applying it."""
    gradients = normal(shapes, seed=1)
    update = lambda state: setting.optimizer.update(gradients, state, gradients)  # noqa: E731
    return stepping(update, [setting.init(gradients)])


def torch_step(shapes: Shapes) -> Callable[[], None]:
    """Returns a function that makes a step of torch's fused Adam."""
    import torch

    params = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.Adam(params, lr=RATE, fused=True)
    return lambda: optimizer.step() and None


def compile_times(
    compared: dict[str, Setting], shapes: Shapes, rounds: int, title: str
) -> dict[str, list[Stages]]:
    """Returns the time of each stage of compiling each setting's step, in each round."""

    def sample(setting: Setting) -> Stages:
        params = [jax.ShapeDtypeStruct(shape, setting.dtype) for shape in shapes]
        state = jax.eval_shape(setting.init, params)
        return compile_cold(HERE, setting.jitted(), params, state, params)[1]

    samplers = {name: functools.partial(sample, setting) for name, setting in compared.items()}
    return in_turns(samplers, rounds, f"compile: {title}")


def recompilations(make: Callable[..., optax.GradientTransformation]) -> int:
    """Counts the programs that eager updates compile when each hyperparameter changes."""
    compiled = 0

    def count(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    gradients = normal([(8, 16), (16,)], seed=1)

    def update(**changed: float) -> None:
        optimizer = make(**{"learning_rate": RATE, "b1": 0.9, "b2": 0.999, "eps": 1e-8} | changed)
        jax.block_until_ready(optimizer.update(gradients, optimizer.init(gradients), gradients))

    jax.clear_caches()
    update()
    jax.monitoring.register_event_duration_secs_listener(count)
    for name, value in {"learning_rate": 0.01, "b1": 0.8, "b2": 0.99, "eps": 1e-6}.items():
        update(**{name: value})
    jax.monitoring.unregister_event_duration_listener(count)
    return compiled


def cells(taken: dict[str, float]) -> list[str]:
    """Returns a row of the first table: ratios, then milliseconds."""
    ours, theirs = taken["float32"], taken["optax.adam"]
    torch = taken.get(TORCH)
    ratios = [f"{ours / theirs:.2f}", f"{ours / torch:.2f}" if torch else ""]
    return ratios + [number(t and 1e3 * t) for t in (ours, theirs, torch)]


def table_of_float32(small: bool, rounds: int, seconds: float) -> str:
    """Returns the first table."""
    few = max(1, rounds // 3)  # rounds of what takes seconds
    pair = {name: settings()[name] for name in ("float32", "optax.adam")}
    trees, rows = cases(small), {}
    for case, shapes in trees.items():
        runs = {name: jitted_step(setting, shapes) for name, setting in pair.items()}
        if has_torch():
            runs[TORCH] = torch_step(shapes)
        rows[f"step: {case}"] = cells(times(runs, rounds, seconds, f"step: {case}"))
    runs = {name: eager_update(setting, trees["GPT-2"]) for name, setting in pair.items()}
    rows["eager `update`: GPT-2"] = cells(times(runs, few, 0.0, "eager update: GPT-2"))
    del runs
    # A step with Adam's state but without its arithmetic.
    descent = optax.GradientTransformation(
        optax.adam(RATE).init, lambda updates, state, params=None: (updates, state)
    )
    for case, shapes in trees.items():
        samples = compile_times(pair | {DESCENT: with_optax(descent)}, shapes, few, case)

        def median(*stages: str, samples: Any = samples) -> dict[str, float]:
            return {
                name: statistics.median(sum(getattr(x, stage) for stage in stages) for x in found)
                for name, found in samples.items()
            }

        both = median("trace", "lower")
        part = {name: time - both[DESCENT] for name, time in both.items()}
        rows[f"trace: {case}"] = cells(median("trace"))
        rows[f"lower: {case}"] = cells(median("lower"))
        rows[f"trace + lower: {case}"] = cells(both)
        rows[f"trace + lower, the optimizer's part: {case}"] = cells(part)
        rows[f"compile: {case}"] = cells(median("compile"))
    columns = ["float32 / optax", "float32 / torch", "float32, ms", "optax, ms", f"{TORCH}, ms"]
    return table("float32", columns, rows)


def tables_of_formats(small: bool, rounds: int, seconds: float) -> list[str]:
    """Returns a table of the storage formats for each tree."""
    compared = {name: setting for name, setting in settings().items() if name in TIMED}
    tables = []
    for case, shapes in cases_of_formats(small).items():
        compiling = {
            name: statistics.median(map(sum, samples))
            for name, samples in compile_times(compared, shapes, rounds, case).items()
        }
        runs = {name: jitted_step(setting, shapes) for name, setting in compared.items()}
        taken = times(runs, rounds, seconds, f"step: {case}")
        del runs
        rows = {}
        for name, time in taken.items():
            peer = taken.get(f"FlashOptim, {name}")
            ratios = [f"{time / taken['float32']:.2f}", f"{time / peer:.2f}" if peer else ""]
            compile_ratio = compiling[name] / compiling["optax.adam"]
            rows[name] = [*ratios, number(1e3 * time), f"{compile_ratio:.1f}"]
        columns = ["time / float32", "time / FlashOptim", "ms", "compile time / optax"]
        tables.append(table(f"step of {case}", columns, rows, best={"ms": min}))
    return tables


def main() -> None:
    """Measures everything, then prints the tables."""
    arguments = parser("speed", __doc__)
    arguments.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    options = arguments.parse_args()
    seconds = 0.0 if options.small else 0.1
    first = table_of_float32(options.small, options.rounds, seconds)
    others = tables_of_formats(options.small, max(1, options.rounds // 3), seconds)
    print(f"{machine()}\n\n{first}\n")
    counts = [recompilations(make) for make in (adam_jax.adam, optax.adam)]
    print("Programs compiled by eager updates when learning rate, b1, b2 and eps change: ", end="")
    print("adam_jax {}, optax {}.".format(*counts))
    for found in others:
        print(f"\n{found}")
