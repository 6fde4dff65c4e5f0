"""Draws the bits of a float32 weight, and where `master_weights` keeps them.

    uv run docs/figures/bit_layout.py

`load_master_params` loads one weight; the figure shows the bits of its parameter and remainder.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from style import BLACK, GREY, REMAINDER, WEIGHT, new_figure, options, save

import adam_jax

VALUE = np.float32(1.2345678)
LOST = "#ffffff"


class Row(NamedTuple):
    """One way to keep a weight."""

    name: str
    bits: str  # 32, those that are not kept as "·"
    split: int  # so many bits are the parameter's, the others the remainder's


def kept(remainder: str) -> tuple[int, int]:
    """Returns the patterns of the bfloat16 parameter and of the remainder, as unsigned integers."""
    optimizer = adam_jax.master_weights(optax.sgd(0.0), remainder)
    params: Any = jnp.full((1,), VALUE, jnp.bfloat16)
    weights = jnp.full((1,), VALUE)
    state: Any
    params, state = adam_jax.load_master_params(weights, params, optimizer.init(params))
    width = f"uint{8 * state.remainder.dtype.itemsize}"
    pattern = jax.lax.bitcast_convert_type(params, jnp.uint16)
    return int(pattern[0]), int(np.asarray(state.remainder).view(width)[0])


def rows() -> list[Row]:
    """Returns the bits in float32 and with two remainders."""
    whole = f"{VALUE.view(np.uint32):032b}"
    (high, eight), (same, sixteen) = kept("int8"), kept("int16")
    # Of this weight the lower half is less than half a unit: the remainder's bits are its own.
    assert f"{high:016b}" == f"{same:016b}" == whole[:16]
    assert f"{sixteen:016b}" == whole[16:]
    assert f"{eight:08b}" == whole[16:24]
    return [
        Row(f"float32 weight {VALUE:.7f}: 4 bytes", whole, 32),
        Row("bfloat16 + int16 remainder: 4 bytes", f"{high:016b}{sixteen:016b}", 16),
        Row("bfloat16 + int8 remainder: 3 bytes", f"{high:016b}{eight:08b}{'·' * 8}", 16),
        Row("bfloat16 + no remainder: 2 bytes", f"{high:016b}{'·' * 16}", 16),
    ]


def draw_row(axes: Axes, y: float, row: Row) -> None:
    """Draws 32 boxes, each with its bit."""
    for i, bit in enumerate(row.bits):
        color = LOST if bit == "·" else WEIGHT if i < row.split else REMAINDER
        edge = GREY if bit == "·" else "white"
        axes.barh(y, 1, left=i, height=0.9, color=color, edgecolor=edge, linewidth=0.8)
        ink = BLACK if color != WEIGHT else "white"
        if bit != "·":
            axes.text(i + 0.5, y, bit, ha="center", va="center_baseline", color=ink)
    axes.text(0, y + 0.58, row.name, va="bottom")


def main() -> None:
    """Draws a row for each way to keep the weight."""
    chosen = options(__file__)
    figure = new_figure(4.2)
    axes = figure.subplots()
    axes.set_axis_off()
    found = rows()
    for i, row in enumerate(found):
        draw_row(axes, -2 * i, row)
    for begin, end, name in [(0, 1, "sign"), (1, 9, "exponent"), (9, 32, "mantissa")]:
        axes.hlines(1.5, begin + 0.1, end - 0.1, color=BLACK, linewidth=1)
        axes.text((begin + end) / 2, 1.6, name, ha="center", va="bottom")
    axes.set_xlim(-0.4, 32.1)
    axes.set_ylim(0.4 - 2 * len(found) + 1, 2.3)
    axes.set_title("A bfloat16 weight and a remainder make up a float32")
    save(figure, chosen.output)


if __name__ == "__main__":
    main()
