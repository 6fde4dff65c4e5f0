"""Draws the error of updates in float32 over steps, of optax and of adam_jax.

    uv run docs/figures/float32_error.py

The reference is Algorithm 1 in float64, in NumPy. Gradients are normal, on 400 coordinates; b1 is
0.9 and eps 1e-8. An error is relative to the update, or to 0.05 where the update is smaller. Prints
a table of the largest errors over all steps: of updates, and of 1 - b2^t, which divides nu.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from style import BLACK, ORANGE, new_figure, options, save

import adam_jax
from adam_jax._moments import Decay, bias_correction

B1, EPS = 0.9, 1e-8
OPTIMIZERS = {
    "optax": (optax.scale_by_adam, ORANGE),
    "adam_jax": (adam_jax.scale_by_adam, BLACK),
}
STYLES = {0.999: "-", 0.99999: "--"}
ALL_B2 = [0.9, 0.999, 0.99999, 0.9999999]


def exact(gradients: np.ndarray, b2: float) -> Iterator[np.ndarray]:
    """Yields the direction of each step, in float64."""
    m = v = np.zeros(gradients.shape[1:])
    for t, g in enumerate(gradients.astype(np.float64), start=1):
        m = B1 * m + (1 - B1) * g
        v = b2 * v + (1 - b2) * g**2
        yield m / (1 - B1**t) / (np.sqrt(v / (1 - b2**t)) + EPS)


def errors(optimizer: Any, gradients: np.ndarray, desired: np.ndarray) -> np.ndarray:
    """Returns the largest error over the coordinates, at each step."""

    @jax.jit
    def run(gradients: jax.Array) -> jax.Array:
        step = lambda state, g: optimizer.update(g, state)[::-1]  # noqa: E731
        return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)[1]

    difference = np.abs(np.asarray(run(gradients), np.float64) - desired)
    return np.max(difference / np.maximum(np.abs(desired), 0.05), axis=1)


def errors_of_correction(b2: float, steps: int) -> list[float]:
    """Returns the largest relative error of 1 - b2^t, as 1 - power and as adam_jax computes it."""
    counts = np.arange(1, steps + 1)
    desired = -np.expm1(counts * np.log(b2))
    t = jnp.asarray(counts, jnp.float32)
    as_power = jax.jit(lambda t: 1 - jnp.float32(b2) ** t)
    ours = jax.jit(lambda t: bias_correction(Decay.of(b2), t))
    return [np.max(np.abs(np.asarray(f(t)) / desired - 1)) for f in (as_power, ours)]


def main() -> None:
    """Draws both optimizers at two values of b2."""
    chosen = options(__file__)
    steps = 50 if chosen.small else 2000
    gradients = np.random.default_rng(0).standard_normal((steps, 400)).astype(np.float32)
    figure = new_figure(3.6)
    axes = figure.subplots()
    print("| b2 | update, optax | update, adam_jax | 1 - b2^t as a power | 1 - b2^t, adam_jax |")
    print("|---:|---:|---:|---:|---:|")
    for b2 in ALL_B2:
        desired = np.array(list(exact(gradients, b2)))
        largest: list[float] = []
        for name, (make, color) in OPTIMIZERS.items():
            error = errors(make(B1, b2, EPS), gradients, desired)
            largest.append(error.max())
            if b2 in STYLES:
                axes.loglog(
                    range(1, steps + 1),
                    error,
                    STYLES[b2],
                    color=color,
                    linewidth=1.2,
                    label=f"{name}, b2 = {b2}",
                )
        cells = [*largest, *errors_of_correction(b2, steps)]
        print(f"| {b2} | {' | '.join(f'{cell:.1e}' for cell in cells)} |")
    axes.set(xlabel="step", ylabel="largest error of an update", xlim=(1, steps), ylim=(3e-8, 2e-2))
    axes.legend(ncols=2, loc="upper center", columnspacing=1.2)
    axes.set_title("Updates of adam_jax stay within 2e-6 of float64")
    save(figure, chosen.output)


if __name__ == "__main__":
    main()
