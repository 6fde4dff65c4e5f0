"""What the scripts of this folder share: colours, sizes and the command line.

Each script computes one figure from adam_jax and writes it next to itself:

    uv run docs/figures/number_line.py
    uv run docs/figures/number_line.py --small --output number_line.png
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

BLACK, GREY, ORANGE = "#222222", "#b0b0b0", "#d55e00"
WEIGHT, REMAINDER, GRADIENT, MU, NU = "#0072b2", "#56b4e9", "#e69f00", "#009e73", "#cc79a7"
INT8 = "#8a5fbf"

WIDTH = 6  # inches: text of 10 points is legible when the picture shrinks to 400 pixels
DPI = 150

mpl.rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "font.size": 10,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }
)


def options(script: str) -> Namespace:
    """Returns the options of a figure's script, given its path."""
    path = Path(script)
    parser = ArgumentParser(
        description=f"Draws docs/figures/{path.stem}.png.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    output = path.with_suffix(".png")
    parser.add_argument("--output", type=Path, default=output, metavar="PATH", help="the picture")
    parser.add_argument("--small", action="store_true", help="computes less, to see that it runs")
    return parser.parse_args()


def new_figure(height: float) -> Figure:
    """Returns an empty figure of so many inches, as wide as all figures."""
    return Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(h_pad=0.08))


def number_line(axes: Axes) -> None:
    """Leaves of some axes only the horizontal one."""
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])


def save(figure: Figure, path: Path) -> None:
    """Writes a figure on white, because it stands on light and on dark pages."""
    figure.savefig(path, dpi=DPI)
    print(f"picture: {path}")
