"""Steps of Adam on a GPU, in each setting: against its memory's speed, optax's steps and torch's.

    python benchmarks/gpu.py
    uv run --with torch --with "jax[cuda13]" benchmarks/gpu.py

Memory sets the pace of a step, so a copy says first how fast it is. Then each contestant gets a
process of its own, in which its library takes the memory that it needs and no other library any. A
first process compiles and ends. A second one loads what the first compiled, and is measured. They
step in turns, as many of them as the memory has room for; reported are medians over the rounds.
torch's parameters are float32; where torch is not installed, times are compared with optax's. It
took seven and a half minutes on an H200 with a single process for each contestant. The columns:

- bandwidth / a copy's: bytes moved per second, over those of the copy; in both, what is read and
  what is written. Moved are the bytes that no step can do without: parameters, gradients and state
  in, parameters and state out. At 1 a step can only be faster with fewer of them;
- time / torch, fused: the time of a step over that of torch's fused Adam, in float32;
- ms: the time of a step when a loop in Python queues many, as one that trains would;
- launch, ms: the time in which Python queues a single one on an idle GPU. If it is as long as the
  step, the GPU waits for Python. Between the other work of a training step that may not show;
- bytes moved: per parameter;
- peak bytes: per parameter, the most that the library's allocator had handed out at one time during
  the steps, so with the gradients. JAX can't set its count back, and its compiler counts too: it
  tries kernels on arrays of its own to see which one is fastest. A process that loads its programs
  tries nothing, and the arrays that it makes before the first step are those of the step. JAX's
  allocator counts whole blocks: one may be up to 128 MiB larger than its array. "-" is a CPU, where
  nobody counts, or a process that had to compile after all, of which a warning tells.

Where moments are rounded at random, a leaf has so many operations that the compiler takes some
tenths of a second for it, and minutes for a thousand: those run in the settings of MANY_LEAVES
alone.
"""

import argparse
import datetime
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # adam_jax need not be installed
from bytes import size
from settings import RATE, Shapes, gpt2, settings
from speed import PLAIN, TORCH, has_torch, machine

OPTAX = "optax.adam"
TORCH_ADAM = {TORCH: {"fused": True}, "torch, foreach": {"foreach": True}}  # arguments, by name
MANY_LEAVES = [*TORCH_ADAM, OPTAX, PLAIN, "adam, bfloat16 moments", "adam, int8 moments"]
ROUNDS = 7
SECONDS = 0.2  # that a contestant's steps take in a round
# What JAX reports: that it has a new program, compiled or loaded, and that it has loaded one.
NEW_PROGRAM = "/jax/core/compile/backend_compile_duration"
LOADED = "/jax/compilation_cache/cache_hits"


class Machine(NamedTuple):
    """What the contestants run on."""

    description: str
    has_gpu: bool
    memory: float  # bytes a process may take; infinite where nobody counts
    bandwidth: float  # of a copy: bytes per second, both read and written


class Trainer(NamedTuple):
    """An optimizer with all it needs on the device."""

    step: Callable[[], Any]  # queues a step
    wait: Callable[[], Any]  # until all that is queued is done
    moved: int  # bytes that a step has to read and to write
    peak: Callable[[], int | None]  # bytes taken at one time, at most


class Result(NamedTuple):
    """A row's numbers: medians, in seconds, and bytes."""

    step: float
    launch: float
    moved: int
    peak: int | None


class Contestant:
    """One optimizer, and the process that it runs in."""

    def __init__(self, name: str, process: ProcessPoolExecutor) -> None:
        self.name = name
        self.process = process
        self.failure: Exception | None = None

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function, given the name, returns over there; None once something has failed."""
        if self.failure is None:
            try:
                return self.process.submit(function, self.name, *args).result()
            except Exception as error:  # its row says so; the others go on
                self.failure = error
                traceback.print_exception(error)
        return None


def one_process(folder: str | None = None) -> ProcessPoolExecutor:
    """A fresh process, which does one thing after the other and keeps programs in the folder."""
    return ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=keep_programs,
        initargs=(folder,),
    )


def trees(small: bool) -> dict[str, Shapes]:
    """The shapes of each tree's leaves; the `small` ones are for a CPU."""
    many, leaf = (2, (128, 64)) if small else (1000, (16384, 16384))
    return {
        f"one leaf of {leaf}": [leaf],
        "GPT-2": gpt2(64, 128, 128, 0) if small else gpt2(768, 50257, 1024, 12),
        f"{many} leaves of (128, 64)": [(128, 64)] * many,
    }


def elements(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(map(math.prod, shapes))


# What runs in the contestants' processes.

trainers: dict[str, Trainer] = {}  # those of this process, by name
events: Counter[str] = Counter()  # how often JAX reported each one in this process


def keep_programs(folder: str | None) -> None:
    """Has JAX load its programs from the folder, keep there what it compiles, and count both."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count)


def count(event: str, *_: float, **__: Any) -> None:
    """Counts an event."""
    events[event] += 1


def look_around(small: bool) -> Machine:
    """What this machine is, and how fast its memory is."""
    has_gpu = jax.default_backend() == "gpu"
    small = small or not has_gpu
    copier = copying(2**20 if small else 2**31)
    best = min(times(copier, 0.0 if small else SECONDS)[0] for _ in range(ROUNDS))
    return Machine(
        description=machine(),
        has_gpu=has_gpu,
        memory=device_memory().get("bytes_limit", math.inf),
        bandwidth=copier.moved / best,
    )


def prepare(name: str, shapes: Shapes, has_gpu: bool) -> int:
    """Makes a contestant ready for a tree, compiled, and returns the bytes that its step moves."""
    trainer = with_torch(name, shapes, has_gpu) if name in TORCH_ADAM else with_jax(name, shapes)
    trainer.step()
    trainer.wait()
    trainers[name] = trainer
    return trainer.moved


def sample(name: str, seconds: float) -> tuple[float, float]:
    """The times of a contestant."""
    return times(trainers[name], seconds)


def peak(name: str) -> int | None:
    """The most bytes that a contestant took at one time; None if its process compiled anything."""
    if compiled := events[NEW_PROGRAM] - events[LOADED]:
        message = f"no peak of {name}: its process compiled {compiled} programs and loaded the rest"
        warnings.warn(message, stacklevel=1)
        return None
    return trainers[name].peak()


def times(trainer: Trainer, seconds: float) -> tuple[float, float]:
    """The seconds that a step takes among others, and those in which a single one is queued."""
    steps = max(1, round(seconds / run(trainer, 1)[0]))
    run(trainer, 1 + steps // 4)  # the clocks of an idle GPU are low
    _, launch = run(trainer, 1)
    return run(trainer, steps)[0], launch


def run(trainer: Trainer, steps: int) -> tuple[float, float]:
    """The mean time of a step, until all are done and until all are queued."""
    trainer.wait()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    queued = time.perf_counter()
    trainer.wait()
    return (time.perf_counter() - start) / steps, (queued - start) / steps


def device_memory() -> dict[str, int]:
    """JAX's account of the device's memory; empty on a CPU."""
    return jax.devices()[0].memory_stats() or {}


def copying(size: int) -> Trainer:
    """Copies that many bytes on the device."""
    # Into the memory of the last copy: others would be asked for while that is still in use.
    copy = jax.jit(lambda target, source: jnp.copy(source), donate_argnums=0, keep_unused=True)
    target, source = (jnp.full(size, byte, jnp.uint8) for byte in (0, 1))

    def step() -> None:
        nonlocal target
        target = copy(target, source)

    return Trainer(step, lambda: target.block_until_ready(), 2 * size, lambda: None)


def with_jax(name: str, shapes: Shapes) -> Trainer:
    """One of the settings, its step jitted and donated."""
    setting = settings()[name]
    compiled = setting.jitted()
    params = [ripple(shape, setting.dtype) for shape in shapes]
    # Un-jitted, this would take more memory than a step: master_weights hands float32 weights on.
    carry = params, jax.jit(setting.init)(params)
    # After the state: what else `init` may need finds room where the gradients will be.
    gradients = [ripple(shape, setting.dtype) for shape in shapes]

    def step() -> None:
        nonlocal carry
        carry = compiled(*carry, gradients)

    return Trainer(
        step,
        lambda: jax.block_until_ready(carry),
        2 * size(carry) + size(gradients),
        lambda: device_memory().get("peak_bytes_in_use"),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def ripple(shape: tuple[int, ...], dtype: type) -> jax.Array:
    """Different numbers everywhere, in no more memory than their own, as random ones would need."""
    return jnp.sin(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape).astype(dtype)


def with_torch(name: str, shapes: Shapes, has_gpu: bool) -> Trainer:
    """One of torch's Adams, in float32."""
    import torch

    device = "cuda" if has_gpu else "cpu"
    params = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.Adam(params, lr=RATE, **TORCH_ADAM[name])
    optimizer.step()  # makes the state
    state = [value for kept in optimizer.state.values() for value in kept.values()]
    weights, moments = (sum(x.numel() * x.element_size() for x in xs) for xs in (params, state))
    return Trainer(
        optimizer.step,
        torch.cuda.synchronize if has_gpu else lambda: None,
        2 * (weights + moments) + weights,
        torch.cuda.max_memory_allocated if has_gpu else lambda: None,
    )


# What runs in the process that was started.


@contextmanager
def started(names: Sequence[str], has_gpu: bool, programs: str) -> Generator[list[Contestant]]:
    """Contestants in fresh processes, which load the programs that those before them compiled.

    Each process has a folder of its own, or it could read a file that another still writes.
    """
    # Without a GPU nobody counts memory, and one process for all is faster to start.
    number = len(names) if has_gpu else 1
    with ExitStack() as stack:
        processes = [stack.enter_context(one_process(f"{programs}/{i}")) for i in range(number)]
        yield list(map(Contestant, names, itertools.cycle(processes)))


def get_ready(contestants: Sequence[Contestant], shapes: Shapes, has_gpu: bool) -> list[int]:
    """Prepares all contestants at once, and returns the bytes that their steps move."""
    with ThreadPoolExecutor(len(contestants)) as threads:
        return list(threads.map(lambda one: one.ask(prepare, shapes, has_gpu), contestants))


def race(
    contestants: Sequence[Contestant], shapes: Shapes, here: Machine, seconds: float, progress: tqdm
) -> dict[str, Result | Exception]:
    """What comes of each contestant on one tree: all get ready at once, then step in turns."""
    moved = get_ready(contestants, shapes, here.has_gpu)
    samples = {contestant.name: [] for contestant in contestants}
    for _ in range(ROUNDS):
        for contestant in contestants:
            samples[contestant.name].append(contestant.ask(sample, seconds))
            progress.update()
    results = {}
    for contestant, count in zip(contestants, moved, strict=True):
        most = contestant.ask(peak)
        if contestant.failure is None:
            step, launch = map(statistics.median, zip(*samples[contestant.name], strict=True))
            results[contestant.name] = Result(step, launch, count, most)
        else:
            results[contestant.name] = contestant.failure
    return results


def measure(
    names: Sequence[str], shapes: Shapes, here: Machine, small: bool, progress: tqdm
) -> dict[str, Result | Exception]:
    """The races on one tree, each of as many contestants as the memory has room for.

    Processes are fresh for each tree and after compiling: JAX can't set its count of the most
    memory back.
    """
    # Adam's 16 bytes per parameter; and as many for temporaries and what allocators keep in hand.
    at_once = max(1, int(min(here.memory / (2 * 16 * elements(shapes)), len(names))))
    results = {}
    for first in range(0, len(names), at_once):
        batch = names[first : first + at_once]
        with tempfile.TemporaryDirectory() as programs:
            with started(batch, here.has_gpu, programs) as contestants:
                get_ready(contestants, shapes, here.has_gpu)  # compiles
            with started(batch, here.has_gpu, programs) as contestants:
                results |= race(contestants, shapes, here, 0.0 if small else SECONDS, progress)
    return results


def takes_part(name: str, shapes: Shapes) -> bool:
    """Whether a contestant is compiled for so many leaves in a time that one can wait."""
    return len(shapes) < 1000 or name in MANY_LEAVES


def print_table(
    case: str, results: dict[str, Result | Exception], parameters: int, bandwidth: float
) -> None:
    """A tree's table, as soon as it is known."""
    reference = TORCH if TORCH in results else OPTAX
    columns = ["bandwidth / a copy's", f"time / {reference}", "ms", "launch, ms"]
    columns += ["bytes moved", "peak bytes"]
    print(f"\n| {case} | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name, result in results.items():
        print(row(name, result, parameters, bandwidth, results[reference]), flush=True)


def row(name: str, result: Result | Exception, parameters: int, bandwidth: float, peer: Any) -> str:
    """A line of a tree's table."""
    if isinstance(result, Exception):
        message = f"{type(result).__name__}: {result}".splitlines()[0].replace("|", "/")
        return f"| {name} | {message} |" + " |" * 5
    cells = [
        name,
        f"{result.moved / result.step / bandwidth:.2f}",
        f"{result.step / peer.step:.2f}" if isinstance(peer, Result) else "-",
        f"{1e3 * result.step:.3g}",
        f"{1e3 * result.launch:.3g}",
        f"{result.moved / parameters:.2f}",
        f"{result.peak / parameters:.2f}" if result.peak else "-",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures everything and prints tables in markdown; progress goes to stderr."""
    parser = argparse.ArgumentParser(
        description="Times Adam's steps on a GPU in all settings, beside optax's and torch's, and "
        "prints markdown tables."
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="small shapes, few steps: shows, on a CPU too, that all of this runs; the numbers "
        "mean nothing",
    )
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or one process would take it all
    with one_process() as process:
        here = process.submit(look_around, options.small).result()
    if not (here.has_gpu or options.small):
        parser.error(f"JAX finds no GPU, without which only --small runs: {here.description}")
    print(f"{datetime.date.today()}, {here.description}\n")
    if not here.has_gpu:
        print("This is no GPU: the numbers are only there to show that the benchmark runs.\n")
    print(f"A copy moves {here.bandwidth / 1e12:.3g} TB/s, read and written.", flush=True)

    names = [*(TORCH_ADAM if has_torch() else []), *settings()]
    cases = trees(options.small)
    total = sum(takes_part(name, shapes) for shapes in cases.values() for name in names)
    results = {}
    with tqdm(total=ROUNDS * total, unit="sample") as progress:
        for case, shapes in cases.items():
            some = [name for name in names if takes_part(name, shapes)]
            results[case] = measure(some, shapes, here, options.small, progress)
            print_table(case, results[case], elements(shapes), here.bandwidth)
    if any(isinstance(result, Exception) for rows in results.values() for result in rows.values()):
        sys.exit("Not every contestant came through.")


if __name__ == "__main__":
    main()
