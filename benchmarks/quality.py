"""Trains with weights and moments in fewer and fewer bits, and prints how well each one learns.

    uv run benchmarks quality
    uv run --with flashoptim-jax benchmarks quality

Trains the GPT of `examples/gpt` and the network of `examples/flax_nnx.py` on MNIST digits, over
several seeds. With one seed all settings see the same data in the same order and start from the
same weights, rounded where they are not stored in float32. FlashOptim is a row of the tables where
its package, `flashoptim-jax`, is installed. The tables go to stdout at the end, each result to
stderr as soon as it is there.
"""

import argparse
import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import digits  # finds the examples
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import tables
from command import parser
from experiment import Experiment
from precision import Setting
from text import load_text
from train import train


class Outcome(NamedTuple):
    """The figures of one training run."""

    score: float
    memory: float  # bytes per parameter: weight, gradient and optimizer state


def flash_adamw(variant: str, rate: optax.Schedule) -> optax.GradientTransformation:
    """Makes an optax transformation of FlashOptim's AdamW, which returns new parameters."""
    import flashoptim_jax

    clip = optax.clip_by_global_norm(1.0)

    def optimizer(params):
        kernels = jax.tree.leaves(precision.is_kernel(params))
        return flashoptim_jax.flash_adamw(
            rate,
            weight_decay=0.0,
            param_groups=[
                {
                    "params": lambda path, leaf: kernels[path[0]],
                    "weight_decay": precision.WEIGHT_DECAY,
                }
            ],
            fused=False,  # the same arithmetic without its kernels for GPUs
        )

    # It compares the structures of its trees, which nnx.Optimizer changes: so it gets lists.
    def init(params):
        return optimizer(params).init(jax.tree.leaves(params))

    def update(updates, state, params=None):
        updates, structure = jax.tree.flatten(optax.tree.cast(updates, jnp.float32))
        flash, params = optimizer(params), jax.tree.leaves(params)
        gradients, _ = clip.update(updates, clip.init(params))
        new_params, state = flash.step(params, state, gradients)
        # In float32 the difference leads to the new parameters again, bit by bit.
        new_params, params = (optax.tree.cast(p, jnp.float32) for p in (new_params, params))
        return structure.unflatten(optax.tree.sub(new_params, params)), state

    return optax.GradientTransformation(init, update)


FLASH = "FlashOptim, 7 bytes"
OURS = ["float32", "bfloat16 moments", "int8 moments", "7 bytes", "optax.adamw, all bfloat16"]
SETTINGS = {name: precision.SETTINGS[name] for name in OURS} | {
    FLASH: Setting(FLASH, flash_adamw, dtype="bfloat16")
}


def train_gpt(setting: Setting, experiment: Experiment) -> Outcome:
    """Returns the held-out loss in nats per byte."""
    result = train(experiment, setting, load_text())
    gradient = jnp.dtype(setting.dtype).itemsize
    return Outcome(result.held_out[experiment.steps], result.stored + gradient)


def train_digits(setting: Setting, epochs: int, batch_size: int, seed: int) -> Outcome:
    """Returns the accuracy on the held-out digits in percent."""
    accuracy, stored = digits.train(setting, epochs, batch_size, seed)
    return Outcome(100 * accuracy, stored + jnp.dtype(setting.dtype).itemsize)


class Task(NamedTuple):
    """A table: what is trained, how long, and how scores are shown."""

    title: str
    length: str
    train: Callable[[Setting, int], Outcome]  # with a seed
    digits: int


def tasks(options: argparse.Namespace) -> list[Task]:
    """Returns both tables, or with `--small` two that take a minute."""
    if options.small:
        experiment = Experiment(steps=20, layers=1, width=32, context=32, batch_size=8)
        epochs, batch_size = 1, 400
    else:
        experiment = Experiment(steps=options.steps)
        epochs, batch_size = options.epochs, 32
    return [
        Task(
            "GPT: held-out loss, nats per byte",
            f"--steps {experiment.steps}",
            lambda setting, seed: train_gpt(setting, experiment._replace(seed=seed)),
            4,
        ),
        Task(
            "MNIST: held-out accuracy, %",
            f"--epochs {epochs}",
            lambda setting, seed: train_digits(setting, epochs, batch_size, seed),
            2,
        ),
    ]


def table(title: str, length: str, outcomes: dict[str, list[Outcome]], digits: int) -> str:
    """Writes in markdown each seed's score, their mean, and its difference from float32's."""
    scores = {name: np.array([o.score for o in found]) for name, found in outcomes.items()}
    baseline, *_ = scores.values()
    seeds = len(baseline)
    spread = f" (its seeds' spread: {baseline.std(ddof=1):.{digits}f})" if seeds > 1 else ""
    columns = ["bytes per parameter", *(f"seed {seed}" for seed in range(seeds)), "mean"]
    rows = {}
    for name, found in scores.items():
        shown = [f"{score:.{digits}f}" for score in (*found, found.mean())]
        difference = f"{found.mean() - baseline.mean():+.{digits}f}"
        rows[name] = [f"{outcomes[name][0].memory:.2f}", *shown, difference]
    written = tables.table("setting", [*columns, f"mean, less float32's{spread}"], rows)
    return f"**{title}** (`{length}`)\n\n{written}"


def main() -> None:
    """Trains everything and prints both tables; progress goes to stderr."""
    options = parser("quality", __doc__)
    add = options.add_argument
    add("--seeds", type=int, default=3, metavar="N", help="runs per setting (default: %(default)s)")
    add("--steps", type=int, default=600, metavar="N", help="of the GPT (default: %(default)s)")
    add("--epochs", type=int, default=6, metavar="N", help="over MNIST (default: %(default)s)")
    found = options.parse_args()
    if min(found.seeds, found.steps, found.epochs) < 1:
        options.error("--seeds, --steps and --epochs must be at least 1")
    settings = dict(SETTINGS)
    if importlib.util.find_spec("flashoptim_jax") is None:
        print("flashoptim_jax is not installed: its row is left out", file=sys.stderr)
        del settings[FLASH]

    began, found_tables = time.monotonic(), []
    for task in tasks(found):
        outcomes = {name: [] for name in settings}
        # Seeds in the outer loop: what a killed run leaves is whole rows of a smaller table.
        for seed in range(found.seeds):
            for name, setting in settings.items():
                with contextlib.redirect_stdout(sys.stderr):
                    outcome = task.train(setting, seed)
                outcomes[name].append(outcome)
                jax.clear_caches()
                print(
                    f"[{time.monotonic() - began:5.0f} s] {task.title}: {name}, seed {seed}: "
                    f"{outcome.score:.{task.digits}f} at {outcome.memory:.2f} bytes per parameter",
                    file=sys.stderr,
                    flush=True,
                )
        found_tables.append(table(task.title, task.length, outcomes, task.digits))
    print("\n\n".join(found_tables))
