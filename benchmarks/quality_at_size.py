"""Trains a GPT of ten million parameters, keeps the results and draws its curves.

    uv run benchmarks quality_at_size

Trains the GPT of `examples/gpt` in its settings, where docs/quality_at_size.json has no result yet,
draws docs/quality_at_size.png and prints the table. A training run takes a quarter or half an hour
on two CPU cores. Its result goes to the JSON file at once, and a run that was interrupted continues
from its checkpoint.
"""

import argparse
import contextlib
import datetime
import json
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import digits  # noqa: F401 (finds the examples)
import jax
import jax.numpy as jnp
import numpy as np
from command import parser
from experiment import Experiment, add_options, experiment_of
from flax import nnx
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot import LOOKS, TEXT, message
from precision import DEFAULT, SETTINGS
from quality import Outcome, table
from text import described, load_text, windows
from train import train

ROOT = Path(__file__).parent.parent
FLAGS = "--steps 2000 --layers 6 --width 384 --context 128 --batch-size 4 --learning-rate 1e-3"
SMALL_FLAGS = "--steps 10 --layers 1 --width 32 --context 32 --batch-size 4"
THINNED = 8  # one in so many windows of the held-out text is scored, always the same ones
POINTS = 40  # of the training loss, each the mean of the steps since the one before
DIGITS = 5
MARKED = {"marker": "o", "markersize": 4}


class Run(NamedTuple):
    """A finished training run. Losses are in nats per byte."""

    setting: str
    seed: int
    flags: str  # the command line of the GPT, without setting, seed and folder
    training: dict[int, float]  # step -> mean loss since the step before
    held_out: dict[int, float]  # step -> loss
    parameters: int
    bytes: float  # per parameter: weight, gradient and optimizer state
    seconds_per_step: float
    text: str  # the size and checksum of the training text
    scored: int  # bytes of the held-out text
    date: str
    python: str
    jax: str
    device: str

    @property
    def steps(self) -> int:
        """Counts the steps of the run."""
        return max(self.held_out)

    @property
    def final(self) -> float:
        """Returns the held-out loss at the end."""
        return self.held_out[self.steps]


def load(path: Path) -> list[Run]:
    """Reads the runs in a file; returns none if there is no file."""
    if not path.exists():
        return []

    def by_step(losses: dict[str, float]) -> dict[int, float]:
        return {int(step): loss for step, loss in losses.items()}

    return [
        Run(**entry)._replace(
            training=by_step(entry["training"]), held_out=by_step(entry["held_out"])
        )
        for entry in json.loads(path.read_text())
    ]


def save(runs: Iterable[Run], path: Path) -> None:
    """Writes the runs to a file, one per line, and replaces the old file in one go."""
    lines = ",\n".join(json.dumps(run._asdict()) for run in runs)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(f"[\n{lines}\n]\n")
    unfinished.replace(path)


def thin(held_out: np.ndarray, context: int) -> np.ndarray:
    """Keeps one in THINNED of the windows that the GPT scores."""
    return windows(held_out, context + 1)[::THINNED].ravel()


def parse(flags: str) -> Experiment:
    """Reads the command line of the GPT."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return experiment_of(parser.parse_args(flags.split()))


def train_in(name: str, seed: int, flags: str, text: Any, checkpoints: Path) -> Run:
    """Trains in one setting, or continues from the last checkpoint in a folder."""
    experiment, setting = parse(flags)._replace(seed=seed), SETTINGS[name]
    training, held_out = text
    scored = thin(held_out, experiment.context)
    result = train(experiment, setting, (training, scored), checkpoints, thinned=1)
    # With release only one block at a time has its gradient.
    gradient = 0 if setting.release else jnp.dtype(setting.dtype).itemsize
    parts = np.array_split(result.losses, min(POINTS, experiment.steps))
    ends = np.cumsum([len(part) for part in parts]).tolist()
    means = [round(float(part.mean()), DIGITS) for part in parts]
    return Run(
        setting=name,
        seed=seed,
        flags=flags,
        training=dict(zip(ends, means, strict=True)),
        held_out={step: round(loss, DIGITS) for step, loss in result.held_out.items()},
        parameters=sum(leaf.size for leaf in jax.tree.leaves(nnx.state(result.model))),
        bytes=round(result.stored + gradient, 3),
        seconds_per_step=round(experiment.batch_size * experiment.context / result.speed, 3),
        text=described(training),
        scored=len(scored),
        date=datetime.date.today().isoformat(),
        python=platform.python_version(),
        jax=jax.__version__,
        device=jax.devices()[0].device_kind,
    )


def complete(path: Path, seeds: Iterable[int], flags: str, checkpoints: Path) -> list[Run]:
    """Trains what is missing in a file and returns the file's runs of the seeds.

    Raises:
        ValueError: if a run is missing, and those in the file do not compare with it: they have
            other flags or another text, and every version of Python has its own.
    """
    wanted = [(name, seed) for seed in seeds for name in DEFAULT]
    found = {(run.setting, run.seed): run for run in load(path)}
    missing = [key for key in wanted if key not in found]
    text = load_text()
    for run in found.values() if missing else ():
        now = f"{flags}, {described(text[0])}"
        if (made := f"{run.flags}, {run.text}") != now:
            raise ValueError(
                f"{path} has a run of another kind: {made}, and not {now}. "
                "Use the same version of Python, or move the file away to start anew."
            )
    for name, seed in missing:
        print(f"{name}, seed {seed}", flush=True)
        folder = checkpoints / f"{re.sub('[^a-z0-9]+', '-', name)}-{seed}"
        found[name, seed] = train_in(name, seed, flags, text, folder)
        save(found.values(), path)
        shutil.rmtree(folder)
        jax.clear_caches()
    return [found[key] for key in wanted]


def summary(runs: list[Run]) -> str:
    """Writes the table of the runs in markdown, and what they have in common."""
    run = runs[0]
    experiment = parse(run.flags)
    outcomes: dict[str, list[Outcome]] = {}
    for each in runs:
        outcomes.setdefault(each.setting, []).append(Outcome(each.final, each.bytes))
    title = f"{run.parameters / 1e6:.1f}M parameters: held-out loss, nats per byte"
    times = [each.seconds_per_step for each in runs]
    tokens = run.steps * experiment.batch_size * experiment.context
    return (
        f"{table(title, run.flags, outcomes, 4)}\n\n"
        f"{run.parameters:,} parameters; {run.steps:,} steps of {experiment.batch_size} x "
        f"{experiment.context} bytes, {tokens:,} in all, of a text of {run.text}; {run.scored:,} "
        f"held-out bytes. A step took {min(times):.2f} to {max(times):.2f} s. "
        f"Python {run.python}, JAX {run.jax}, {run.device}, {run.date}."
    )


def above_float32(run: Run, runs: list[Run]) -> dict[int, float]:
    """Subtracts float32's held-out losses of the same seed."""
    (float32,) = (r for r in runs if (r.setting, r.seed) == ("float32", run.seed))
    return {step: loss - float32.held_out[step] for step, loss in run.held_out.items()}


def ends(runs: list[Run]) -> dict[str, float]:
    """Returns each setting's held-out loss at the end, as a mean over the seeds."""
    found: dict[str, list[float]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append(run.final)
    return {name: float(np.mean(losses)) for name, losses in found.items()}


def draw_losses(axes: Axes, runs: list[Run]) -> None:
    """Draws the held-out loss over the steps."""
    for run in runs:
        label, line = LOOKS[run.setting]
        steps, losses = zip(*run.held_out.items(), strict=True)
        # A name that begins with an underscore is not in the legend: one entry for all seeds.
        axes.plot(steps, losses, label=f"{'_' if run.seed else ''}{label}", **MARKED, **line)
    axes.set(ylabel="held-out loss\n(nats per byte)")
    axes.set_title(message(ends(runs)))
    axes.legend(frameon=False, title=f"GPT of {runs[0].parameters / 1e6:.1f}M parameters")


def draw_differences(axes: Axes, runs: list[Run]) -> None:
    """Draws how far the held-out loss is from float32's, over the steps."""
    for run in runs:
        steps, differences = zip(*above_float32(run, runs).items(), strict=True)
        axes.plot(steps, differences, **MARKED, **LOOKS[run.setting].line)
    axes.set(xlabel="step", ylabel="difference from float32\n(nats per byte)")


def draw(runs: list[Run], path: Path) -> None:
    """Draws both panels into a PNG, one above the other."""
    with rc_context(TEXT):
        figure = Figure(figsize=(6.4, 7.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        draw_losses(above, runs)
        draw_differences(below, runs)
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)


def main() -> None:
    """Trains the missing settings, draws the picture and prints the table.

    With --small, all files are in a folder that is deleted.
    """
    options = parser("quality_at_size", __doc__)
    options.add_argument("--seeds", type=int, default=1, metavar="N", help="default: %(default)s")
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) if options.small else ROOT / "docs"
        checkpoints = (Path(temporary) if options.small else ROOT / "out") / "quality_at_size"
        flags = SMALL_FLAGS if options.small else FLAGS
        found = results / "quality_at_size.json"
        with contextlib.redirect_stdout(sys.stderr):
            runs = complete(found, range(options.seeds), flags, checkpoints)
        draw(runs, results / "quality_at_size.png")
    print(summary(runs))
