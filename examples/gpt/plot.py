"""The figure: what each setting loses, and what it saves."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from precision import ALL_BFLOAT16, FLOAT32
from train import Result

import adam_jax

AVERAGED = 30  # steps: batches are the same for all settings, and their noise hides differences
SAME = 0.02  # nats per byte; other seeds move the held-out loss by 0.03 (docs/quality.md)


class Look(NamedTuple):
    """How a setting is drawn."""

    label: str
    line: dict[str, Any]


# The others lie on the broad line of float32, or they do not.
LOOKS = {
    FLOAT32: Look("float32", {"color": "#b0b0b0", "linewidth": 6}),
    "float32, released": Look("float32, released", {"color": "#0072b2"}),
    "bfloat16 moments": Look("bfloat16 moments", {"color": "#e69f00"}),
    "int8 moments": Look("int8 moments", {"color": "#8a5fbf"}),
    ALL_BFLOAT16: Look("all bfloat16", {"color": "#d55e00", "linewidth": 1.8}),
    "5 bytes": Look("5 bytes", {"color": "#00694d", "linewidth": 1.8}),
    "7 bytes": Look(
        "7 bytes", {"color": "#222222", "linewidth": 1.8, "linestyle": (0, (3, 2)), "zorder": 3}
    ),
}
PARTS = {
    "weights": "#0072b2",
    "gradients": "#e69f00",
    "mu": "#009e73",
    "nu": "#cc79a7",
    "scales": "#999999",
    "remainder": "#56b4e9",
}
TEXT: Any = {"font.size": 14, "axes.titlesize": "medium"}  # legible where the figure is 400 px wide
# Where a legend is, outside of the axes.
BELOW: dict[str, Any] = {
    "loc": "upper center",
    "bbox_to_anchor": (0.42, -0.2),
    "frameon": False,
    "handlelength": 1.6,
    "columnspacing": 1.2,
}


def bytes_by_part(usage: adam_jax.MemoryUsage) -> dict[str, float]:
    """Returns the bytes per parameter of each part. What is left are counters of steps."""
    parts = {"weights": usage.weights, "gradients": usage.gradients, **usage.state}
    return {name: parts.get(name, 0) / usage.size for name in PARTS}


def final_loss(result: Result) -> float:
    """Returns the held-out loss after the last step."""
    return result.held_out[max(result.held_out)]


def message(losses: dict[str, float]) -> str:
    """Says which settings end with float32's held-out loss, and which do not."""
    if FLOAT32 not in losses or len(losses) == 1:
        return "Training loss"
    above = {
        LOOKS[name].label: loss - losses[FLOAT32]
        for name, loss in losses.items()
        if name != FLOAT32
    }
    groups = {
        ("learns", "learn", "as float32 does"): [x for x in above if abs(above[x]) <= SAME],
        ("falls", "fall", "behind"): [x for x in above if above[x] > SAME],
        ("ends", "end", "below float32"): [x for x in above if above[x] < -SAME],
    }
    clauses = []
    for (singular, plural, rest), names in groups.items():
        if names:
            # "7 bytes learn", but "all bfloat16 falls".
            verb = plural if len(names) > 1 or names[0].endswith("s") else singular
            clauses.append(f"{' and '.join(names)} {verb} {rest}")
    return ";\n".join(clauses)


def memory_message(totals: dict[str, float]) -> str:
    """Says what adam_jax's settings take, and what float32 takes."""
    ours = [f"{total:.1f}" for name, total in totals.items() if name not in (FLOAT32, ALL_BFLOAT16)]
    if FLOAT32 not in totals or not ours:
        return "Memory"
    return f"{' and '.join(ours)} bytes per parameter instead of {totals[FLOAT32]:.1f}"


def draw_losses(axes: Axes, results: dict[str, Result]) -> None:
    """Draws the training loss over the steps, and the last steps again, enlarged."""
    steps = max(len(result.losses) for result in results.values())
    window = min(AVERAGED, steps // 10 + 1)
    end = slice(-max(2, steps // 5), None)
    inset = axes.inset_axes((0.5, 0.42, 0.5, 0.48))
    for name, (label, line) in LOOKS.items():
        if name in results:
            losses = np.convolve(results[name].losses, np.full(window, 1 / window), mode="valid")
            at = np.arange(window, len(losses) + window)
            axes.plot(at, losses, label=f"{label}: {final_loss(results[name]):.2f}", **line)
            inset.plot(at[end], losses[end], **line)
    axes.set(xlabel="step", ylabel="training loss (nats per byte)")
    axes.set_title(message({name: final_loss(result) for name, result in results.items()}))
    inset.set_title("last steps", fontsize="medium", pad=4)
    inset.tick_params(labelsize="small")
    axes.legend(title="held-out loss at the end", **BELOW, ncols=2)


def draw_memory(axes: Axes, usages: dict[str, adam_jax.MemoryUsage]) -> None:
    """Draws a bar for each setting, one part after the other."""
    labels = [LOOKS[name].label for name in usages]
    parts = [bytes_by_part(usage) for usage in usages.values()]
    left = np.zeros(len(labels))
    for name, color in PARTS.items():
        sizes = np.array([part[name] for part in parts])
        axes.barh(labels, sizes, left=left, height=0.7, color=color, label=name)
        left += sizes
    for row, total in enumerate(left):
        axes.text(total + 0.2, row, f"{total:.1f}", va="center")
    axes.set(xlabel="bytes per parameter", xlim=(0, 1.15 * left.max()), xticks=range(0, 17, 4))
    axes.set_title(memory_message(dict(zip(usages, left.tolist(), strict=True))))
    axes.invert_yaxis()
    axes.legend(**BELOW, ncols=3)


def draw(results: dict[str, Result], usages: dict[str, adam_jax.MemoryUsage], path: Path) -> None:
    """Draws losses and memory into a PNG, one above the other, legible on a phone."""
    with rc_context(TEXT):
        figure = Figure(figsize=(6.4, 9.6), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(3, 2))
        draw_losses(above, results)
        draw_memory(below, usages)
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
