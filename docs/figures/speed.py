"""Draws how long a step takes in each setting, from the tables in docs/speed.md.

Run it as `uv run docs/figures/speed.py`.
"""

from pathlib import Path

from matplotlib.axes import Axes
from style import BLACK, GREY, INT8, new_figure, options, save

PAGE = Path(__file__).parents[1] / "speed.md"
PEER = "#ffffff"
COLORS = {"float32": GREY, "bfloat16 moments": "#c8b6dd", "int8 moments": INT8, "7 bytes": BLACK}
Bars = dict[str, float]  # by setting, the time of a step in units of float32's


def column(text: str, table: str, heading: str) -> Bars:
    """Reads the times below a heading of the table whose first heading is `table`.

    Raises:
        ValueError: if the page has no such table or column, or no time of float32 in it.
    """
    blocks = [block for block in text.split("\n\n") if block.startswith(f"| {table} |")]
    if len(blocks) != 1:
        raise ValueError(f'{PAGE.name} has {len(blocks)} tables "{table}"; there must be one')
    header, _, *rows = [cells(line) for line in blocks[0].splitlines()]
    if heading not in header:
        raise ValueError(f'the table "{table}" has no column "{heading}"; it has {header}')
    place = header.index(heading)
    times = {row[0]: float(row[place]) for row in rows if row[place]}
    if "float32" not in times:
        raise ValueError(f'the column "{heading}" of the table "{table}" has no float32')
    return {name: time / times["float32"] for name, time in times.items()}


def cells(line: str) -> list[str]:
    """Splits a line of a table into its cells, without their bold type."""
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def draw_bars(axes: Axes, title: str, bars: Bars) -> None:
    """Draws a bar for each setting, with its number."""
    names = list(bars)
    drawn = axes.barh(
        names,
        [bars[name] for name in names],
        color=[COLORS.get(name, PEER) for name in names],
        edgecolor="#666666",
        linewidth=0.8,
    )
    axes.bar_label(drawn, [f"{bars[name]:.2f}" for name in names], padding=4)
    axes.set_title(title)
    axes.grid(visible=False)
    axes.set_xlim(0, 1.12 * max(bars.values()))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


def main() -> None:
    """Draws a panel for each kind of device and parameters."""
    chosen, text = options(__file__), PAGE.read_text()
    large = column(text, "H200, ms per step", "one leaf of (16384, 16384)")
    many = column(text, "H200, ms per step", "GPT-2, each step started by Python")
    # torch is in one table and the formats in the other, of the same run.
    peers = column(text, "CPU, ms per step", "GPT-2")
    formats = column(text, "CPU, formats, ms", "GPT-2 / float32")
    cpu = peers | {
        name: time
        for name, time in formats.items()
        if name not in peers and not name.startswith("FlashOptim")  # its kernels are for GPUs
    }
    figure = new_figure(8)
    panels = figure.subplots(3, 1, height_ratios=[len(large), len(many), len(cpu)])
    draw_bars(panels[0], "NVIDIA H200: one leaf of 268 million parameters", large)
    draw_bars(panels[1], "NVIDIA H200: GPT-2, 148 leaves, started by Python", many)
    draw_bars(panels[2], "CPU, two cores: GPT-2", cpu)
    panels[2].set_xlabel("time of a step (float32 = 1; white: other packages)")
    figure.suptitle(
        f"7 bytes take {large['7 bytes']:.2f} of float32's time on one large leaf\n"
        f"on a GPU, {many['7 bytes']:.1f} times on many leaves, "
        f"{cpu['7 bytes']:.1f} times on a CPU",
        fontsize=12,
    )
    save(figure, chosen.output)


if __name__ == "__main__":
    main()
