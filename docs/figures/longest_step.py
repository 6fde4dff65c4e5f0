"""Draws how long a step can get after a long silence, with moments in float32 and in int8.

    uv run docs/figures/longest_step.py

After 10^6 steps without gradients come gradients that grow by b2 / b1 a step, which is the worst
case. Every element of a leaf of (64, 64) gets the same gradients. The first panel shows the longest
step of any element, the second one the longest of 60 steps for each b2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from style import BLACK, GREY, INT8, new_figure, options, save

import adam_jax

B1, EPS = 0.9, 1e-30
FORMATS = {"float32": "float32", "int8 moments": "int8"}
BOUND = 7.75 * 8.4 * np.sqrt((1 - B1) / (1 + B1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def longest(format: str, b2: float, steps: int) -> jax.Array:
    """Returns the longest step of any element, at each of so many steps."""
    optimizer = adam_jax.scale_by_adam(B1, b2, EPS, mu_dtype=format, nu_dtype=format)
    # The last gradient is 1: float32 holds the first ones.
    gradients = jnp.float32(b2 / B1) ** jnp.arange(1 - steps, 1)

    def step(state: Any, g: jax.Array) -> tuple[Any, jax.Array]:
        updates: Any
        updates, state = optimizer.update(jnp.full((64, 64), g), state)
        return state, jnp.abs(updates).max()

    state: Any = optimizer.init(jnp.zeros((64, 64)))
    return jax.lax.scan(step, state._replace(count=jnp.int32(10**6)), gradients)[1]


def main() -> None:
    """Draws both panels, one below the other."""
    chosen = options(__file__)
    steps = 60
    figure = new_figure(5.8)
    upper, lower = figure.subplots(2, 1)
    looks = {"float32": (GREY, 6, 0), "int8 moments": (INT8, 1.8, 3)}
    for name, format in FORMATS.items():
        color, width, order = looks[name]
        lengths = longest(format, 0.999, steps)
        upper.plot(
            range(1, steps + 1), lengths, color=color, linewidth=width, label=name, zorder=order
        )
        spread = np.logspace(-1, -6, 2 if chosen.small else 11)
        ends = [float(longest(format, float(1 - x), steps).max()) for x in spread]
        lower.semilogx(spread, ends, color=color, linewidth=width, label=name, zorder=order)
    for axes in (upper, lower):
        axes.axhline(BOUND, color=BLACK, linestyle=":", label=f"bound with int8: {BOUND:.1f}")
        axes.set_ylabel("longest step,\nin learning rates")
    upper.set(xlabel="steps since the silence (b2 = 0.999)", ylim=(0, 17), xlim=(1, steps))
    upper.set_yticks([0, 5, 10, 15])
    upper.legend(loc="lower right")
    upper.set_title("No step with int8 moments is longer than 15 learning rates")
    lower.set(xlabel="1 - b2", ylim=(0, 40))
    lower.invert_xaxis()
    lower.set_title("Nearer to b2 = 1, only int8 moments keep this bound")
    save(figure, chosen.output)


if __name__ == "__main__":
    main()
