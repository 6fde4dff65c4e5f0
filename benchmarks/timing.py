"""Times several things in turns, so that other work on the machine slows all of them alike.

Results are medians over the rounds. Their ratios to a peer are comparable between machines;
absolute times are not.
"""

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax
from tqdm import tqdm

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def in_turns(
    samplers: Mapping[K, Callable[[], T]], rounds: int, title: str = ""
) -> dict[K, list[T]]:
    """Calls each function once a round and returns what it returned, with a progress bar."""
    samples: dict[K, list[T]] = {name: [] for name in samplers}
    for _ in tqdm(range(rounds), desc=title, unit="round", leave=False):
        for name, sample in samplers.items():
            samples[name].append(sample())
    return samples


def times(
    runs: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, title: str = ""
) -> dict[str, float]:
    """Returns each function's median time; in a round, its calls take about `seconds`.

    A function returns when its results are there.
    """
    samplers: dict[str, Callable[[], float]] = {}
    for name, run in runs.items():
        run()  # compiles
        samplers[name] = sampler(run, max(1, round(seconds / time_per_call(run, 1))))
    return {name: statistics.median(x) for name, x in in_turns(samplers, rounds, title).items()}


def sampler(run: Callable[[], Any], calls: int) -> Callable[[], float]:
    """Returns a function that times a few calls."""
    return lambda: time_per_call(run, calls)


def time_per_call(run: Callable[[], Any], calls: int) -> float:
    """Returns the mean time of a few calls in a row, after one that brings data into the caches."""
    time.sleep(0.05)  # the threads of the one before, torch's above all, spin for a while
    run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def stepping(step: Callable[..., Any], carry: list[Any]) -> Callable[[], None]:
    """Returns a function that makes a step and waits. The carry becomes the step's last results."""

    def run() -> None:
        carry[:] = jax.block_until_ready(step(*carry))[-len(carry) :]

    return run


def machine() -> str:
    """Describes what the numbers were measured on, in one line."""
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


def has_torch() -> bool:
    """Tells whether torch, which this project does not depend on, can be imported."""
    return importlib.util.find_spec("torch") is not None
