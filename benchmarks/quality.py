"""Trains with parameters and moments kept in fewer and fewer bits, and says what that costs.

    python benchmarks/quality.py
    uv run --with flashoptim-jax benchmarks/quality.py
    uv run benchmarks/quality.py --size

The GPT and the network for MNIST of the examples, over several seeds. With one seed all settings
see the same data in the same order and start from the same weights (rounded, where they are not
kept in float32). flashoptim_jax is a row of the tables where it is installed. The tables go to
stdout when all is done, each result to stderr as soon as it is there.

With `--size` it is a GPT of ten million parameters, in the settings of `at_size.py`. Each result is
kept in `docs/quality_at_size.json`, and only what is missing there is trained.
"""

import argparse
import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import gpt
import mnist

LOW_MOMENTS = {
    "bfloat16": "--mu-dtype bfloat16 --nu-dtype bfloat16",
    "int8": "--mu-dtype int8 --nu-dtype int8",
}


class Setting(NamedTuple):
    """A row of the tables: flags of the examples, and an optimizer if it is not ours."""

    flags: str
    make_optimizer: Callable[..., optax.GradientTransformation] = mnist.make_optimizer


class Outcome(NamedTuple):
    """What is reported of one training."""

    score: float
    memory: float  # bytes per parameter: weight, gradient and optimizer state


def optax_adamw(settings: argparse.Namespace, steps: int) -> optax.GradientTransformation:
    """The optimizer of the examples, made of nothing but optax."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            mnist.make_schedule(settings.learning_rate, steps),
            weight_decay=mnist.WEIGHT_DECAY,
            mask=mnist.is_kernel,
        ),
    )


def flash_adamw(settings: argparse.Namespace, steps: int) -> optax.GradientTransformation:
    """FlashOptim's AdamW, which makes new parameters itself, as an optax transformation."""
    import flashoptim_jax

    clip = optax.clip_by_global_norm(1.0)

    def optimizer(params):
        kernels = jax.tree.leaves(mnist.is_kernel(params))
        return flashoptim_jax.flash_adamw(
            mnist.make_schedule(settings.learning_rate, steps),
            weight_decay=0.0,
            param_groups=[
                {
                    "params": lambda path, leaf: kernels[path[0]],
                    "weight_decay": mnist.WEIGHT_DECAY,
                }
            ],
            fused=False,  # the same arithmetic without its kernels for GPUs
        )

    # It compares the structures of its trees, and nnx.Optimizer changes them: it gets lists.
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


SETTINGS = {
    "float32": Setting(""),
    "moments in bfloat16": Setting(LOW_MOMENTS["bfloat16"]),
    "moments in int8": Setting(LOW_MOMENTS["int8"]),
    "weights in bfloat16 + int8, moments in int8": Setting(
        f"--param-dtype bfloat16 --remainder int8 {LOW_MOMENTS['int8']}"
    ),
    "all in bfloat16, optax.adamw": Setting("--param-dtype bfloat16", optax_adamw),
    "weights in bfloat16 + int8, flashoptim_jax": Setting("--param-dtype bfloat16", flash_adamw),
}


def train_gpt(setting: Setting, flags: str) -> Outcome:
    """The held-out loss in nats per byte."""
    settings = gpt.parse_arguments(f"{flags} {setting.flags}".split())
    result = gpt.train(settings, gpt.load_text(), setting.make_optimizer)
    gradient = jnp.dtype(settings.param_dtype).itemsize
    return Outcome(result.held_out[settings.steps], result.memory + gradient)


def train_mnist(setting: Setting, flags: str) -> Outcome:
    """The accuracy on the held-out digits, in percent."""
    settings = mnist.parse_arguments(f"{flags} {setting.flags}".split())
    result = mnist.train(settings, setting.make_optimizer)
    gradient = jnp.dtype(settings.param_dtype).itemsize
    return Outcome(100 * result.accuracies[-1], result.memory + gradient)


class Task(NamedTuple):
    """A table: what is trained, how long, and how scores are shown."""

    title: str
    train: Callable[[Setting, str], Outcome]
    flags: str
    digits: int


def tasks(options: argparse.Namespace) -> list[Task]:
    """Both tables, or what shows within a minute that all of this runs."""
    if options.small:
        of_gpt = "--steps 20 --layers 1 --width 32 --context 32 --batch-size 8"
        of_mnist = "--epochs 1 --batch-size 400"
    else:
        of_gpt, of_mnist = f"--steps {options.steps}", f"--epochs {options.epochs}"
    return [
        Task("GPT: held-out loss, nats per byte", train_gpt, of_gpt, 4),
        Task("MNIST: held-out accuracy, %", train_mnist, of_mnist, 2),
    ]


def table(title: str, flags: str, outcomes: dict[str, list[Outcome]], digits: int) -> str:
    """Writes in markdown each seed's score, their mean, and how far it is from float32's."""
    scores = {name: np.array([o.score for o in found]) for name, found in outcomes.items()}
    baseline, *_ = scores.values()
    seeds = len(baseline)
    spread = f" (its seeds' spread: {baseline.std(ddof=1):.{digits}f})" if seeds > 1 else ""
    columns = ["setting", "bytes per parameter", *(f"seed {seed}" for seed in range(seeds)), "mean"]
    rows = [[*columns, f"mean, less float32's{spread}"], ["---", *["---:"] * (seeds + 3)]]
    for name, found in scores.items():
        shown = [f"{score:.{digits}f}" for score in (*found, found.mean())]
        difference = f"{found.mean() - baseline.mean():+.{digits}f}"
        rows.append([name, f"{outcomes[name][0].memory:.2f}", *shown, difference])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"**{title}** (`{flags}`)", "", *lines])


def main() -> None:
    """Trains everything and prints both tables; progress goes to stderr."""
    parser = argparse.ArgumentParser(
        description="Trains the examples' networks with parameters and moments in fewer and "
        "fewer bits, and prints how well they learned as markdown tables.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    seeds_help = "training runs of each setting (default: 3, with --size 1)"
    add("--seeds", type=int, default=argparse.SUPPRESS, metavar="N", help=seeds_help)
    add("--steps", type=int, default=600, metavar="N", help="of the GPT")
    add("--epochs", type=int, default=6, metavar="N", help="over MNIST")
    add("--small", action="store_true", help="tiny networks; the scores mean nothing")
    add("--size", action="store_true", help="a GPT of ten million parameters, for 2,000 steps")
    options = parser.parse_args()
    seeds = getattr(options, "seeds", 1 if options.size else 3)
    if min(seeds, options.steps, options.epochs) < 1:
        parser.error("--seeds, --steps and --epochs must be at least 1")
    if options.size:
        import at_size  # which is made of this module

        at_size.main(seeds, options.small)
        return
    settings = dict(SETTINGS)
    if importlib.util.find_spec("flashoptim_jax") is None:
        print("flashoptim_jax is not installed: its row is left out", file=sys.stderr)
        settings = {k: v for k, v in settings.items() if v.make_optimizer is not flash_adamw}

    began, tables = time.monotonic(), []
    for task in tasks(options):
        outcomes = {name: [] for name in settings}
        # Seeds in the outer loop: what a killed run leaves is whole rows of a smaller table.
        for seed in range(seeds):
            for name, setting in settings.items():
                with contextlib.redirect_stdout(sys.stderr):
                    outcome = task.train(setting, f"{task.flags} --seed {seed}")
                outcomes[name].append(outcome)
                jax.clear_caches()
                print(
                    f"[{time.monotonic() - began:5.0f} s] {task.title}: {name}, seed {seed}: "
                    f"{outcome.score:.{task.digits}f} at {outcome.memory:.2f} bytes per parameter",
                    file=sys.stderr,
                    flush=True,
                )
        tables.append(table(task.title, task.flags, outcomes, task.digits))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
