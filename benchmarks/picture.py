"""Draws the README's picture: what a training loses, and saves, with fewer bits.

    python benchmarks/picture.py

Trains the GPT of `examples/gpt.py` in four of the settings of `quality.py`, all on the same data in
the same order and from the same weights. On the left is the training loss, averaged over steps: the
noise of the batches, which is the same for all, would hide what is different. On the right are the
bytes per parameter of the same four trainings, counted from the shapes and dtypes of their arrays.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from bytes import size
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality import SETTINGS, Setting, gpt

AVERAGED = 30  # steps


class Look(NamedTuple):
    """How a setting is drawn."""

    label: str
    line: dict[str, Any]


# By the settings' names. The others lie on the broad line of float32, or they do not.
LOOKS = {
    "float32": Look("float32", {"color": "#8cc4ea", "linewidth": 7}),
    "moments in int8": Look("int8 moments", {"color": "#00694d", "linewidth": 1.8}),
    "weights in bfloat16 + int8, moments in int8": Look(
        "7 bytes", {"color": "#222222", "linewidth": 1.8, "linestyle": (0, (1.5, 1.5))}
    ),
    "all in bfloat16, optax.adamw": Look("all bfloat16", {"color": "#d55e00", "linewidth": 1.8}),
}
PARTS = {"weights": "#1f3b57", "gradients": "#5b86ad", "moments": "#b4cde2", "remainder": "#e69f00"}
# Where a legend is, outside of the axes.
ABOVE: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1.01),
    "ncols": 2,
    "frameon": False,
    "borderaxespad": 0,
    "alignment": "left",
    "handlelength": 1.5,
    "columnspacing": 1.2,
}


class Outcome(NamedTuple):
    """What is drawn of one training."""

    losses: np.ndarray  # of each step, in nats per byte
    held_out: float  # at the end
    bytes: dict[str, float]  # per parameter, by part


def bytes_by_part(settings: Any, setting: Setting) -> dict[str, float]:
    """The bytes per parameter of each part of a training, of which no array is made."""

    def arrays() -> tuple[Any, Any]:
        model = gpt.GPT(settings.layers, settings.width, settings.context, nnx.Rngs(0))
        optimizer = setting.make_optimizer(settings, settings.steps)
        weights = nnx.to_pure_dict(nnx.state(model))
        return gpt.start(weights, settings.param_dtype, optimizer, settings.remainder)

    params, state = jax.eval_shape(arrays)
    moments = [optax.tree.get(state, name) for name in ("mu", "nu")]
    remainder = optax.tree.get(state, "remainder", ())
    counts = {
        "weights": size(params),
        "gradients": size(params),  # in the parameters' dtype
        "moments": size(moments),
        "remainder": size(remainder),
    }
    # A few counters of steps are all that is left.
    assert size(state) - counts["moments"] - counts["remainder"] < 32
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {part: count / parameters for part, count in counts.items()}


def train(setting: Setting, flags: str, text: Any) -> Outcome:
    """Trains the GPT in one setting."""
    settings = gpt.parse_arguments(f"{flags} {setting.flags}".split())
    result = gpt.train(settings, text, setting.make_optimizer)
    held_out = result.held_out[settings.steps]
    return Outcome(result.losses, held_out, bytes_by_part(settings, setting))


def draw_losses(axes: Axes, outcomes: dict[str, Outcome]) -> None:
    """The curves of all settings, and their ends again, larger."""
    steps = len(next(iter(outcomes.values())).losses)
    window = min(AVERAGED, steps)
    inset = axes.inset_axes((0.46, 0.42, 0.54, 0.52))
    end = slice(-max(1, steps // 5), None)
    for name, outcome in outcomes.items():
        mean = np.convolve(outcome.losses, np.full(window, 1 / window), mode="valid")
        at = np.arange(window, steps + 1)
        label = f"{LOOKS[name].label}, {outcome.held_out:.2f}"
        axes.plot(at, mean, label=label, **LOOKS[name].line)
        inset.plot(at[end], mean[end], **LOOKS[name].line)
    axes.set(xlabel="step", ylabel="training loss (nats per byte)")
    inset.tick_params(labelsize="small")
    inset.set_title("the last steps, enlarged", fontsize="small", pad=4)
    title = "setting, and its held-out loss at the end"
    axes.legend(title=title, **ABOVE)


def draw_bytes(axes: Axes, outcomes: dict[str, Outcome]) -> None:
    """A bar for each setting, of the parts one after the other."""
    labels = [LOOKS[name].label for name in outcomes]
    left = np.zeros(len(outcomes))
    for part, color in PARTS.items():
        widths = np.array([outcome.bytes[part] for outcome in outcomes.values()])
        axes.barh(labels, widths, left=left, height=0.6, color=color, label=part)
        left += widths
    for row, total in enumerate(left):
        axes.text(total + 0.25, row, f"{total:.1f}", va="center")
    axes.set(xlabel="bytes per parameter", xlim=(0, 1.16 * left.max()), xticks=range(0, 17, 4))
    axes.invert_yaxis()
    axes.legend(title="what a parameter takes", **ABOVE)


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    """Draws both panels into a PNG, on white: it stands on light and on dark pages."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    draw_losses(left, outcomes)
    draw_bytes(right, outcomes)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)


def main() -> None:
    """Trains in all settings and draws; progress goes to stderr."""
    parser = argparse.ArgumentParser(
        description="Trains a small GPT with weights and moments in fewer and fewer bits, and "
        "draws its losses and its bytes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=600, metavar="N", help="batches to train on")
    add("--seed", type=int, default=0, metavar="N", help="of weights and data")
    picture = Path(__file__).parent.parent / "docs" / "loss_and_bytes.png"
    add("--output", type=Path, default=picture, metavar="PATH", help="the picture")
    options = parser.parse_args()
    flags = f"--steps {options.steps} --seed {options.seed}"
    text, outcomes = gpt.load_text(), {}
    for name in LOOKS:
        print(name, file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):
            outcomes[name] = train(SETTINGS[name], flags, text)
        jax.clear_caches()
    draw(outcomes, options.output)
    for name, outcome in outcomes.items():
        parts = ", ".join(f"{part} {count:.3f}" for part, count in outcome.bytes.items())
        print(f"{name}: held-out loss {outcome.held_out:.4f}; bytes per parameter: {parts}")
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
