"""Draws the int8 codes of nu and mu on number lines, and what rounding does to one value.

    uv run docs/figures/number_line.py

The numbers that codes stand for come from the decoder of `adam_jax`, and the shares in the last
panel from its encoder: it rounds one value of nu in every element of a leaf.
"""

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from style import BLACK, MU, NU, new_figure, number_line, options, save

from adam_jax._codec import Codec, Int8Mu, Int8Nu, Rows, Stored, codec_of
from adam_jax._rounding import draw, key_of_leaf

CODEC = Codec(Int8Mu(6), Int8Nu(9))  # both moments in int8
DEPTHS = [0, 9, 18]


def decoded() -> tuple[np.ndarray, np.ndarray]:
    """Returns all values of nu in units of the row's scale, and all of mu in units of q."""
    bytes_of_mu, bytes_of_nu = np.arange(-128, 128), np.arange(256)
    grid = np.meshgrid(bytes_of_mu.astype(np.int8), bytes_of_nu.astype(np.uint8), indexing="ij")
    mu, nu = map(jnp.asarray, grid)
    stored = Stored(mu, nu)
    assert codec_of(stored) == CODEC
    mu, nu = CODEC.read(stored, Rows(jnp.float32(1), jnp.float32(1)), jnp.float32)
    mu, nu = np.asarray(mu), np.asarray(nu)
    # Both bytes have bits for a few codes more, which the encoder does not use.
    at_scale = mu[nu == 1]  # here q is the unit
    return np.unique(nu[nu <= 1]), np.unique(at_scale[np.abs(at_scale) <= 7.75])


def rounded(value: float, elements: int) -> np.ndarray:
    """Returns what a leaf's elements hold after each of them stored the same nu."""
    shape = (elements // 64, 64)
    nu = jnp.full(shape, value, jnp.float32)
    rows = Rows(jnp.ones((shape[0], 1)), jnp.ones((shape[0], 1)))
    like = Stored(jnp.zeros(shape, jnp.int8), jnp.zeros(shape, jnp.uint8))
    noise = draw(key_of_leaf(jnp.uint32(0)), jnp.int32(0))
    _, (_, nu, *_) = CODEC.write((jnp.zeros(shape), nu), like, rows, noise)
    return np.asarray(nu, np.float64)


def draw_nu(axes: Axes, nu: np.ndarray) -> None:
    """Draws one factor of two of nu at each of several depths, stretched to the same length."""
    for y, depth in enumerate(DEPTHS):
        top = 2.0**-depth
        inside = nu[(nu >= top / 2) & (nu <= top)]
        axes.vlines(inside / top, -y - 0.3, -y + 0.3, color=NU, linewidth=1.2)
        axes.text(1.02, -y, f"{len(inside) - 1} codes", va="center")
    axes.set_yticks(
        [-y for y in range(len(DEPTHS))],
        ["s/2 to s", *(f"s/$2^{{{d + 1}}}$ to s/$2^{{{d}}}$" for d in DEPTHS[1:])],
    )
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([0.5, 0.75, 1], ["lower end", "middle", "upper end"])
    axes.set(xlim=(0.49, 1.13), ylim=(0.5 - len(DEPTHS), 0.5))
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.set_title("nu: fine near the row's scale s, coarser below")


def draw_mu(axes: Axes, mu: np.ndarray) -> None:
    """Draws the values of mu around 0."""
    number_line(axes)
    end = 1.75
    shown = mu[np.abs(mu) <= end]
    axes.vlines(shown, 0, 1, color=MU, linewidth=0.5)
    axes.vlines(0, -0.15, 1.15, color=BLACK, linewidth=1.2)
    for low, high in [(-1.75, -0.75), (-0.75, -0.25), (-0.25, 0.25), (0.25, 0.75), (0.75, 1.75)]:
        count = np.sum((mu >= low) & (mu <= high)) - 1
        axes.text((low + high) / 2, 1.2, str(count), ha="center", va="bottom")
    ticks = [-1.75, -0.75, -0.25, 0, 0.25, 0.75, 1.75]
    axes.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
    axes.set(xlim=(-end - 0.02, end + 0.02), ylim=(-0.15, 1.6))
    axes.set_xlabel("mu in units of q; above: codes between two ticks")
    axes.set_title("mu: finest around 0, where most values are")


def draw_rounding(axes: Axes, nu: np.ndarray, elements: int) -> None:
    """Draws how often one value between two codes becomes each of them."""
    number_line(axes)
    below, above = nu[nu < 0.8][-1], nu[nu > 0.8][0]
    value = float(below + 0.3 * (above - below))
    results = rounded(value, elements)
    shares = {end: float(np.mean(results == end)) for end in (below, above)}
    assert sum(shares.values()) == 1
    mean = results.mean()
    axes.hlines(0, below, above, color=BLACK, linewidth=1)
    for end, share in shares.items():
        axes.bar(end, share, width=0.04 * (above - below), color=NU)
        axes.text(end, share + 0.04, f"{share:.1%}", ha="center", va="bottom")
    axes.plot(value, 0, "o", color=BLACK, clip_on=False, zorder=3)
    axes.annotate(
        f"nu = {value:.4f} s\nmean of {elements:,}: {mean:.4f} s",
        (value, 0.02),
        (value + 0.05 * (above - below), 0.42),
        arrowprops={"arrowstyle": "-", "color": BLACK, "linewidth": 0.8},
    )
    margin = 0.12 * (above - below)
    axes.set_xticks([below, above], [f"{below:.4f} s", f"{above:.4f} s"])
    axes.set(xlim=(below - margin, above + margin), ylim=(0, 1))
    axes.set_title("Stochastic rounding keeps the mean")


def main() -> None:
    """Draws three panels, one below the other."""
    chosen = options(__file__)
    nu, mu = decoded()
    figure = new_figure(5.8)
    first, second, third = figure.subplots(3, 1, height_ratios=[1.3, 1, 1.1])
    draw_nu(first, nu)
    draw_mu(second, mu)
    draw_rounding(third, nu, 2**12 if chosen.small else 2**20)
    save(figure, chosen.output)


if __name__ == "__main__":
    main()
