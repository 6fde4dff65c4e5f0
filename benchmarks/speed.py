"""Times adam_jax beside optax.adam and, where installed, torch's fused Adam and FlashOptim.

    python benchmarks/speed.py

A first table has Adam in float32, a second one the formats in which moments and weights can be
stored, and what each of them takes to compile. All of them run in one process, after a warm-up, in
turns (ours, optax, torch, ours, ...), so that whatever else the machine does falls on all alike.
Reported are medians over the rounds, and their ratios: absolute times mean little on another
machine.
"""

import argparse
import gc
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from settings import RATE, Setting, Shapes, gpt2, settings, with_optax
from tqdm import tqdm

import adam_jax

JAX_OPTIMIZERS = {"adam_jax": adam_jax.adam, "optax": optax.adam}
NO_OPTIMIZER = "none"
PLAIN = "adam, float32 moments"
SEVEN_BYTES = "bfloat16 parameters, int8 remainder, int8 moments"
LIKE = {  # by setting, FlashOptim's setting that keeps as much
    "adam, int8 moments": "FlashOptim",
    SEVEN_BYTES: "FlashOptim, bfloat16 parameters, int8 remainder",
}
TIMED = ["optax.adam", PLAIN, "adam, bfloat16 moments", *LIKE, *LIKE.values()]
TORCH = "torch, fused"


def cases(small: bool) -> dict[str, Shapes]:
    """The shapes of the leaves of each tree; `small` ones run through in seconds."""
    leaf, many, fewer = ((2**10,), 10, 5) if small else ((2**25,), 1000, 500)
    return {
        f"one leaf of {leaf[0]:,}": [leaf],
        "GPT-2": gpt2(16, 64, 32, 2) if small else gpt2(768, 50257, 1024, 12),
        f"{many} leaves of (128, 64)": [(128, 64)] * many,
        f"{fewer} leaves of (64,)": [(64,)] * fewer,
    }


def normal(shapes: Shapes, seed: int) -> list[jax.Array]:
    """Standard normal leaves."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    draw = jax.jit(jax.random.normal, static_argnums=1)
    return [draw(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def jitted_step(setting: Setting, shapes: Shapes) -> Callable[[], None]:
    """One donated step of a setting, on arrays of its own."""
    step = setting.jitted()
    params, gradients = (
        [leaf.astype(setting.dtype) for leaf in normal(shapes, seed)] for seed in (0, 1)
    )
    carry = params, setting.init(params)

    def run() -> None:
        nonlocal carry
        carry = jax.block_until_ready(step(*carry, gradients))

    return run


def eager_update(optimizer: optax.GradientTransformation, shapes: Shapes) -> Callable[[], None]:
    """One un-jitted `optimizer.update`, without `apply_updates`."""
    gradients = normal(shapes, seed=1)
    state = optimizer.init(gradients)

    def run() -> None:
        nonlocal state
        _, state = jax.block_until_ready(optimizer.update(gradients, state, gradients))

    return run


def no_optimizer() -> optax.GradientTransformation:
    """A step of gradient descent with Adam's state: what a step costs without the optimizer."""
    return optax.GradientTransformation(
        optax.adam(RATE).init, lambda updates, state, params=None: (updates, state)
    )


def torch_step(shapes: Shapes) -> Callable[[], None]:
    """One step of torch's fused Adam."""
    import torch

    params = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.Adam(params, lr=RATE, fused=True)
    return lambda: optimizer.step() and None


def seconds_per_call(run: Callable[[], None], calls: int) -> float:
    """The mean time of a few calls in a row, after one that brings their data into the caches."""
    time.sleep(0.05)  # the threads of the one before, torch's above all, spin for a while
    run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def in_turns(
    runs: dict[str, Callable[[], None]], rounds: int, seconds: float, progress: tqdm
) -> dict[str, float]:
    """Each one's median time over the rounds, each of which takes about `seconds` of each."""
    calls = {}
    for name, run in runs.items():
        run()  # compiles
        calls[name] = max(1, round(seconds / seconds_per_call(run, 1)))
    samples = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(seconds_per_call(run, calls[name]))
        progress.update()
    return {name: statistics.median(times) for name, times in samples.items()}


def stages(setting: Setting, shapes: Shapes) -> dict[str, float]:
    """The time of each stage of compiling the step, with nothing remembered from before."""
    jax.clear_caches()
    gc.collect()
    gc.freeze()  # or the collector would walk all of torch in the middle of what is timed
    params = [jax.ShapeDtypeStruct(shape, setting.dtype) for shape in shapes]
    state = jax.eval_shape(setting.init, params)
    start = time.perf_counter()
    traced = setting.jitted().trace(params, state, params)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    lowered.compile()
    return {
        "trace": traced_at - start,
        "lower": lowered_at - traced_at,
        "trace + lower": lowered_at - start,
        "compile": time.perf_counter() - lowered_at,
    }


def compile_ratios(timed: dict[str, Setting], shapes: Shapes, rounds: int) -> dict[str, float]:
    """The time to trace, lower and compile each setting's step, over that of optax.adam."""
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, setting in timed.items():
            taken = stages(setting, shapes)
            samples[name].append(taken["trace + lower"] + taken["compile"])
    medians = {name: statistics.median(times) for name, times in samples.items()}
    return {name: time / medians["optax.adam"] for name, time in medians.items()}


def recompilations(make: Callable[..., optax.GradientTransformation]) -> int:
    """How many programs an eager update compiles for each hyperparameter given a new value."""
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


def machine() -> str:
    """What the numbers were measured on, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    packages = [f"{package.__name__} {package.__version__}" for package in (jax, optax)]
    if has_torch():
        import torch

        packages.append(f"torch {torch.__version__} ({torch.get_num_threads()} threads)")
    return ", ".join(
        [
            models[0] if models else platform.processor() or platform.machine(),
            f"{os.cpu_count()} cores",
            f"JAX on {jax.devices()[0].device_kind}",
            f"Python {platform.python_version()}",
            *packages,
        ]
    )


def format_cases(small: bool) -> dict[str, Shapes]:
    """The trees of the table of formats: rows of some length, that int8 has a scale for each of."""
    leaf = (64, 128) if small else (4096, 8192)
    return {f"one leaf of {leaf}": [leaf], "GPT-2": cases(small)["GPT-2"]}


def format_rows(case: str, times: dict[str, float], compiling: dict[str, float]) -> list[str]:
    """Lines of the table of formats: ratios to float32, and to FlashOptim's like, and the times."""
    rows = []
    for name, taken in times.items():
        peer = times.get(LIKE.get(name, ""))
        cells = [f"{case}: {name}", f"{taken / times[PLAIN]:.2f}"]
        cells += [f"{taken / peer:.2f}" if peer else "", f"{1e3 * taken:.3g}"]
        cells.append(f"{compiling[name]:.1f}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def has_torch() -> bool:
    """Whether torch can be imported; it is not a dependency of this project."""
    return importlib.util.find_spec("torch") is not None


def row(case: str, times: dict[str, float]) -> str:
    """A line of the table: what was timed, the ratios, the times."""
    ours, theirs = (times[name] for name in JAX_OPTIMIZERS)
    torch = times.get(TORCH)
    cells = [case, f"{ours / theirs:.2f}", f"{ours / torch:.2f}" if torch else ""]
    cells += [f"{1e3 * t:.3g}" if t else "" for t in (ours, theirs, torch)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures everything and prints a table in markdown; progress goes to stderr."""
    parser = argparse.ArgumentParser(
        description="Times adam_jax beside optax.adam and torch's fused Adam, in turns, and "
        "prints ratios and medians as a markdown table."
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="turns that each one gets (default: %(default)s)"
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny shapes: shows within seconds that all of this runs; the times mean nothing",
    )
    options = parser.parse_args()
    trees = cases(options.small)
    seconds = 0.0 if options.small else 0.1
    few = max(1, options.rounds // 3)  # rounds for what takes seconds
    format_trees = format_cases(options.small)
    total = len(trees) * (options.rounds + few) + few + len(format_trees) * few
    progress = tqdm(total=total, unit="round")
    optimizers = {name: make(RATE) for name, make in JAX_OPTIMIZERS.items()}

    rows = []
    for case, shapes in trees.items():
        runs = {
            name: jitted_step(with_optax(optimizer, jnp.float32), shapes)
            for name, optimizer in optimizers.items()
        }
        if has_torch():
            runs[TORCH] = torch_step(shapes)
        rows.append(row(f"step: {case}", in_turns(runs, options.rounds, seconds, progress)))
    gpt2_shapes = trees["GPT-2"]
    runs = {name: eager_update(optimizer, gpt2_shapes) for name, optimizer in optimizers.items()}
    rows.append(row("eager `update`: GPT-2", in_turns(runs, few, 0.0, progress)))
    del runs
    compiled = optimizers | {NO_OPTIMIZER: no_optimizer()}
    for case, shapes in trees.items():
        samples = {name: [] for name in compiled}
        for _ in range(few):
            for name, optimizer in compiled.items():
                samples[name].append(stages(with_optax(optimizer, jnp.float32), shapes))
            progress.update()
        for stage in samples[NO_OPTIMIZER][0]:
            medians = {
                name: statistics.median(sample[stage] for sample in times)
                for name, times in samples.items()
            }
            rows.append(row(f"{stage}: {case}", medians))
            if stage == "trace + lower":
                floor = medians[NO_OPTIMIZER]
                beyond = {name: time - floor for name, time in medians.items()}
                rows.append(row(f"{stage}, the optimizer's part: {case}", beyond))
    format_table = []
    for case, shapes in format_trees.items():
        timed = {name: setting for name, setting in settings().items() if name in TIMED}
        compiling = compile_ratios(timed, shapes, few)
        runs = {name: jitted_step(setting, shapes) for name, setting in timed.items()}
        format_table += format_rows(case, in_turns(runs, few, seconds, progress), compiling)
        del runs
    progress.close()

    print(f"{machine()}\n")
    print(f"| | ours / optax | ours / torch | ours, ms | optax, ms | {TORCH}, ms |")
    print("|---|---|---|---|---|---|")
    print(*rows, sep="\n")
    counts = {name: recompilations(make) for name, make in JAX_OPTIMIZERS.items()}
    print(
        "\nPrograms compiled by eager updates when learning rate, b1, b2 and eps change:", end=" "
    )
    print(", ".join(f"{name} {count}" for name, count in counts.items()) + ".")
    print(
        "\n| step, with storage formats | / float32 | / FlashOptim's like | ms | compile / optax |"
    )
    print("|---|---|---|---|---|")
    print(*format_table, sep="\n")


if __name__ == "__main__":
    main()
