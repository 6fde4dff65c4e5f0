"""Times Adam's steps on a GPU in each setting, and compares them with a copy, optax and torch.

    uv run --with torch --with flashoptim-jax --with "jax[cuda13]" benchmarks gpu

Memory limits the speed of a step. The benchmark therefore first measures how fast a copy is. Each
contestant then runs in a process of its own, where its library alone takes memory. A first process
compiles and ends; a second one loads the compiled programs and is measured. As many contestants as
fit in memory step in turns; the tables have medians over the rounds. torch's parameters are
float32. Without torch, times are compared with optax's. All of it takes seven and a half minutes on
an H200. The columns:

- bandwidth / copy: bytes moved per second, over those of the copy; both count what is read and what
  is written. "Bytes moved" are what no step can do without: parameters, gradients and state are
  read, parameters and state are written. At 1, only a step that moves fewer bytes is faster;
- time / torch, fused: the time of a step over that of torch's fused Adam in float32;
- ms: the time of a step while a Python loop queues many, as a training loop does;
- launch, ms: the time in which Python queues a single step on an idle GPU. If it is as long as the
  step, the GPU waits for Python. Between the other work of a training step that may not show;
- bytes moved: per parameter;
- peak bytes: per parameter, the most that the library's allocator had handed out at one time during
  the steps, gradients included. JAX cannot reset its count, and its compiler counts too: it tries
  kernels on arrays of its own to find the fastest. A process that loads its programs tries nothing,
  and the arrays that it makes before the first step are those of the step. JAX's allocator counts
  whole blocks, which may be up to 128 MiB larger than their array. "-" stands for a CPU, where
  nobody counts, or for a process that had to compile after all; a warning then explains it.

A leaf with stochastically rounded moments has so many operations that it takes some tenths of a
second to compile, and a thousand leaves take minutes: those run in the settings MANY_LEAVES alone.
"""

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from command import parser
from settings import RATE, Shapes, gpt2, settings
from tables import number, table
from targets import nbytes
from timing import has_torch, in_turns, machine

# Their arguments, by name.
TORCH_ADAM = {"torch, fused": {"fused": True}, "torch, foreach": {"foreach": True}}
MANY_LEAVES = [*TORCH_ADAM, "optax.adam", "float32", "bfloat16 moments", "int8 moments"]
ROUNDS = 7
SECONDS = 0.2  # that a contestant's steps take in a round
# What JAX reports: that it has a new program, compiled or loaded, and that it has loaded one.
NEW_PROGRAM = "/jax/core/compile/backend_compile_duration"
LOADED = "/jax/compilation_cache/cache_hits"


class Machine(NamedTuple):
    """The device that the contestants run on."""

    description: str
    has_gpu: bool
    memory: float  # bytes a process may take; infinite where nobody counts
    bandwidth: float  # of a copy: bytes per second, both read and written


class Trainer(NamedTuple):
    """An optimizer with its arrays on the device."""

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
        """Calls a function of the name in the process; returns None once something has failed."""
        if self.failure is None:
            try:
                return self.process.submit(function, self.name, *args).result()
            except Exception as error:  # its row has the message; the others continue
                self.failure = error
                traceback.print_exception(error)
        return None


def one_process(folder: str | None = None) -> ProcessPoolExecutor:
    """Starts a process that runs one task at a time and keeps programs in the folder."""
    return ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=keep_programs,
        initargs=(folder,),
    )


def trees(small: bool) -> dict[str, Shapes]:
    """Returns the shapes of each tree's leaves; the `small` ones are for a CPU."""
    many, leaf = (2, (128, 64)) if small else (1000, (16384, 16384))
    return {
        f"one leaf of {leaf}": [leaf],
        "GPT-2": gpt2(64, 128, 128, 0) if small else gpt2(768, 50257, 1024, 12),
        f"{many} leaves of (128, 64)": [(128, 64)] * many,
    }


def elements(shapes: Shapes) -> int:
    """Returns the number of parameters."""
    return sum(map(math.prod, shapes))


# The functions below run in the contestants' processes.

trainers: dict[str, Trainer] = {}  # those of this process, by name
events: Counter[str] = Counter()  # how often JAX reported each one in this process


def keep_programs(folder: str | None) -> None:
    """Makes JAX load programs from the folder, store compiled ones there, and count both."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count)


def count(event: str, *_: float, **__: Any) -> None:
    """Counts an event."""
    events[event] += 1


def look_around(small: bool) -> Machine:
    """Describes this machine and measures its memory."""
    has_gpu = jax.default_backend() == "gpu"
    small = small or not has_gpu
    copier = copying(2**20 if small else 2**31)
    best = min(step_times(copier, 0.0 if small else SECONDS)[0] for _ in range(ROUNDS))
    return Machine(
        description=machine(),
        has_gpu=has_gpu,
        memory=device_memory().get("bytes_limit", math.inf),
        bandwidth=copier.moved / best,
    )


def prepare(name: str, shapes: Shapes, has_gpu: bool) -> int:
    """Compiles a contestant's step for a tree, and returns the bytes that the step moves."""
    trainer = with_torch(name, shapes, has_gpu) if name in TORCH_ADAM else with_jax(name, shapes)
    trainer.step()
    trainer.wait()
    trainers[name] = trainer
    return trainer.moved


def sample(name: str, seconds: float) -> tuple[float, float]:
    """Measures a contestant once."""
    return step_times(trainers[name], seconds)


def peak(name: str) -> int | None:
    """Returns the most bytes in use at one time, or None if the process compiled anything."""
    if compiled := events[NEW_PROGRAM] - events[LOADED]:
        message = f"no peak of {name}: its process compiled {compiled} programs and loaded the rest"
        warnings.warn(message, stacklevel=1)
        return None
    return trainers[name].peak()


def step_times(trainer: Trainer, seconds: float) -> tuple[float, float]:
    """Returns the seconds of a step among others, and those in which a single one is queued."""
    steps = max(1, round(seconds / run(trainer, 1)[0]))
    run(trainer, 1 + steps // 4)  # the clocks of an idle GPU are low
    _, launch = run(trainer, 1)
    return run(trainer, steps)[0], launch


def run(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Returns the mean time of a step until all are done, and until all are queued."""
    trainer.wait()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    queued = time.perf_counter()
    trainer.wait()
    return (time.perf_counter() - start) / steps, (queued - start) / steps


def device_memory() -> dict[str, int]:
    """Returns JAX's account of the device's memory; empty on a CPU."""
    return jax.devices()[0].memory_stats() or {}


def copying(size: int) -> Trainer:
    """Returns a trainer whose step copies that many bytes on the device."""
    # Into the memory of the last copy: others would be asked for while that is still in use.
    copy = jax.jit(lambda target, source: jnp.copy(source), donate_argnums=0, keep_unused=True)
    target, source = (jnp.full(size, byte, jnp.uint8) for byte in (0, 1))

    def step() -> None:
        nonlocal target
        target = copy(target, source)

    return Trainer(step, lambda: target.block_until_ready(), 2 * size, lambda: None)


def with_jax(name: str, shapes: Shapes) -> Trainer:
    """Returns a trainer of one of the settings; its step is jitted and donated."""
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
        2 * nbytes(carry) + nbytes(gradients),
        lambda: device_memory().get("peak_bytes_in_use"),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def ripple(shape: tuple[int, ...], dtype: type) -> jax.Array:
    """Returns numbers that differ; random ones would need more memory than their own."""
    return jnp.sin(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape).astype(dtype)


def with_torch(name: str, shapes: Shapes, has_gpu: bool) -> Trainer:
    """Returns a trainer of one of torch's Adams, in float32."""
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


# The functions below run in the process that was started.


@contextmanager
def started(names: Sequence[str], has_gpu: bool, programs: str) -> Generator[list[Contestant]]:
    """Starts contestants in fresh processes, which load the programs that earlier ones compiled.

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
    contestants: Sequence[Contestant], shapes: Shapes, here: Machine, seconds: float
) -> dict[str, Result | Exception]:
    """Returns each contestant's result on one tree: all get ready at once, then step in turns."""
    moved = get_ready(contestants, shapes, here.has_gpu)
    samplers = {one.name: functools.partial(one.ask, sample, seconds) for one in contestants}
    samples = in_turns(samplers, ROUNDS)
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
    names: Sequence[str], shapes: Shapes, here: Machine, small: bool
) -> dict[str, Result | Exception]:
    """Races on one tree, with as many contestants at a time as fit in memory.

    Processes are fresh for each tree and after compiling: JAX cannot reset its count of the most
    memory.
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
                results |= race(contestants, shapes, here, 0.0 if small else SECONDS)
    return results


def takes_part(name: str, shapes: Shapes) -> bool:
    """Tells whether a contestant compiles quickly enough for so many leaves."""
    return len(shapes) < 1000 or name in MANY_LEAVES


def table_of(
    case: str, results: dict[str, Result | Exception], parameters: int, bandwidth: float
) -> str:
    """Returns a tree's table."""
    reference = "torch, fused" if "torch, fused" in results else "optax.adam"
    peer = results[reference]
    columns = ["bandwidth / copy", f"time / {reference}", "ms", "launch, ms"]
    columns += ["bytes moved", "peak bytes"]
    rows = {}
    for name, result in results.items():
        if isinstance(result, Exception):
            message = f"{type(result).__name__}: {result}".splitlines()[0].replace("|", "/")
            rows[name] = [message, *[""] * 5]
            continue
        rows[name] = [
            f"{result.moved / result.step / bandwidth:.2f}",
            f"{result.step / peer.step:.2f}" if isinstance(peer, Result) else "-",
            number(1e3 * result.step),
            number(1e3 * result.launch),
            f"{result.moved / parameters:.2f}",
            f"{result.peak / parameters:.2f}" if result.peak else "-",
        ]
    return table(case, columns, rows, best={"ms": min})


def main() -> None:
    """Measures everything and prints each tree's table as soon as it is known."""
    arguments = parser("gpu", __doc__)
    options = arguments.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or one process would take it all
    with one_process() as process:
        here = process.submit(look_around, options.small).result()
    if not (here.has_gpu or options.small):
        arguments.error(f"JAX finds no GPU, without which only --small runs: {here.description}")
    print(f"{datetime.date.today()}, {here.description}\n")
    if not here.has_gpu:
        print("This is no GPU: the numbers only show that the benchmark runs.\n")
    print(f"A copy reads and writes {here.bandwidth / 1e12:.3g} TB/s.", flush=True)
    names = [*(TORCH_ADAM if has_torch() else []), *settings()]
    failed = False
    for case, shapes in trees(options.small).items():
        some = [name for name in names if takes_part(name, shapes)]
        results = measure(some, shapes, here, options.small)
        print(f"\n{table_of(case, results, elements(shapes), here.bandwidth)}", flush=True)
        failed |= any(isinstance(result, Exception) for result in results.values())
    if failed:
        sys.exit("Some contestants failed.")
