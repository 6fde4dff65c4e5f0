"""Compares formats for Adam's moments on gradients that are hard on them.

    uv run benchmarks stress

Each format's Adam and float32 Adam get the same gradients. The benchmark compares their updates, u
and u32, over all steps (the last 600 if half of the coordinates become quiet, and the second half
of them in the row that mentions it). Three tables have a row for each kind of gradients and a
column for each format:

- the update's relative error: the square root of sum |u - u32|^2 / sum |u32|^2;
- the largest step, max |u| over max |u32|;
- sqrt(nu) over float32's after the last step: the median over the coordinates.

A fourth table has the worst relative error of the update over the first steps on normal gradients,
for int8 moments and several betas.

An exact format has 0, 1 and 1. eps is 1e-30, so it hides no nu that is too small. The usual one is
`--eps 1e-8`; gradients are about 1. optax.adam with bfloat16 gradients keeps both moments in
bfloat16. `peers.py` has the formats of FlashOptim and bitsandbytes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from command import parser
from settings import MOMENTS
from tables import number, table
from tqdm import tqdm

import adam_jax

B1, B2 = 0.9, 0.999
REFERENCE = "float32"
BETAS = [
    *((0.9, 0.999), (0.9, 0.98), (0.9, 0.95), (0.8, 0.9), (0.95, 0.95), (0.95, 0.99)),
    *((0.9, 0.9999), (0.98, 0.92), (0.5, 0.999), (0.0, 0.999), (0.0, 0.99)),
]
CHUNK = 10  # steps at a time; all numbers of steps are multiples of it
Shape = tuple[int, int]
Draw = Callable[[jax.Array, jax.Array], jax.Array]  # (key of a step, its number) -> gradients


class Gradients(NamedTuple):
    """A kind of gradients."""

    name: str
    draw: Draw
    steps: int
    measured: slice  # the steps whose updates are compared
    columns: slice = slice(None)  # where nu is compared


class Format(NamedTuple):
    """An Adam, and the dtype of its gradients."""

    optimizer: optax.GradientTransformation
    dtype: type = jnp.float32


class Seen(NamedTuple):
    """A summary of one step's updates."""

    largest: jax.Array
    norm: jax.Array
    error: jax.Array  # the norm of the difference to float32's updates


def formats(eps: float) -> dict[str, Format]:
    """Returns all formats, by the name of their column."""

    def ours(mu: str, nu: str) -> Format:
        return Format(adam_jax.scale_by_adam(eps=eps, mu_dtype=mu, nu_dtype=nu))

    return {name: ours(moments, moments) for name, moments in MOMENTS.items()} | {
        "int8 mu, float32 nu": ours("int8", "float32"),
        "int8 mu, bfloat16 nu": ours("int8", "bfloat16"),
        "optax.adam, bfloat16 mu": Format(optax.scale_by_adam(eps=eps, mu_dtype=jnp.bfloat16)),
        "optax.adam, bfloat16 gradients": Format(optax.scale_by_adam(eps=eps), jnp.bfloat16),
        "FlashOptim, int8 moments": Format(peers.flashoptim(eps)),
        "bitsandbytes, 8 bits": Format(peers.bitsandbytes(eps)),
    }


def gradients(key: jax.Array, shape: Shape, steps: int) -> list[Gradients]:
    """Returns all kinds of gradients."""
    half = steps // 2
    all_steps, late = slice(steps), slice(half, steps)
    spread = jax.random.normal(key, shape)
    normal = functools.partial(jax.random.normal, shape=shape)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def log_normal(sigma: float) -> Draw:
        scales = jnp.exp(sigma * spread)
        return lambda key, t: jnp.where(t < half, 1, 0.1) * scales * normal(key)

    def drifting(key: jax.Array, t: jax.Array) -> jax.Array:
        heavy = jax.random.normal(key, (4, *shape))
        student_t = heavy[0] / jnp.sqrt(jnp.mean(jnp.square(heavy[1:]), axis=0))
        return student_t + jnp.sin(2 * jnp.pi * t / steps + spread)

    def sparse(axis: int) -> Draw:
        kept = [1, 1]
        kept[axis] = shape[axis]
        rates = 10 ** jax.random.uniform(key, kept, minval=-2.0, maxval=-1.0)

        def draw(key: jax.Array, t: jax.Array) -> jax.Array:
            which, values = jax.random.split(key)
            return jnp.where(jax.random.uniform(which, kept) < rates, normal(values), 0)

        return draw

    def loud(key: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.where(column % 32 == 0, 1 - 2 * (t % 2), 1 / 600)

    def quiet(key: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.where((column % 2 == 1) & (t >= steps), 0.1, 1) * normal(key)

    long = steps + 55 * steps // 12  # 5500 after the first 1200
    last = slice(long - half, long)
    return [
        *(
            Gradients(
                f"log-normal scales, sigma {sigma}, tenfold drop",
                log_normal(sigma),
                steps,
                all_steps,
            )
            for sigma in (0.5, 1, 2)
        ),
        Gradients("sigma 0.5, after the drop alone", log_normal(0.5), steps, late),
        Gradients("Student t (3), drifting mean", drifting, steps, all_steps),
        Gradients("sparse rows", sparse(0), steps, all_steps),
        Gradients("sparse columns", sparse(1), steps, all_steps),
        Gradients("one of 32 loud and alternating, the rest 1/600", loud, steps, all_steps),
        Gradients("every second falls tenfold, long after", quiet, long, last, slice(1, None, 2)),
    ]


def norm(x: jax.Array) -> jax.Array:
    """Returns the Euclidean norm, finite even if the sum of squares is not."""
    largest = jnp.max(jnp.abs(x))
    largest = jnp.where(largest > 0, jnp.minimum(largest, jnp.finfo(x.dtype).max), 1)
    return largest * jnp.sqrt(jnp.sum(jnp.square(x / largest)))


@functools.partial(jax.jit, static_argnums=0)
def draw_steps(draw: Draw, key: jax.Array, steps: jax.Array) -> jax.Array:
    """Draws the gradients of a few steps."""
    return jax.vmap(lambda t: draw(jax.random.fold_in(key, t), t))(steps)


def follow(formats: dict[str, Format]) -> Callable[[Any, jax.Array], tuple[Any, dict[str, Seen]]]:
    """Returns a function that makes a few steps of each format, and summarizes them."""

    def step(states: Any, gradient: jax.Array) -> tuple[Any, dict[str, Seen]]:
        new_states, updates = {}, {}
        for name, (optimizer, dtype) in formats.items():
            update, new_states[name] = optimizer.update(gradient.astype(dtype), states[name])
            updates[name] = jnp.asarray(update, jnp.float32)
        exact = updates[REFERENCE]
        seen = {
            name: Seen(jnp.max(jnp.abs(update)), norm(update), norm(update - exact))
            for name, update in updates.items()
        }
        return new_states, seen

    return jax.jit(lambda states, gradients: jax.lax.scan(step, states, gradients))


def read_nu(format: Format, state: Any, expected: np.ndarray, count: int) -> np.ndarray:
    """Returns the nu that the next step, number `count`, uses, in any format.

    The updates for gradients h and -h differ, for any mu, by

        2 (1 - b1) h / (1 - b1^count) / sqrt((b2 nu + (1 - b2) h^2) / (1 - b2^count))

    With h about ten times the root of the expected nu, neither term hides the other. A mean over
    several h averages out the format's own errors.
    """
    readings = []
    for factor in np.geomspace(7, 14, 8):
        h = jnp.asarray(np.where(expected > 0, factor * np.sqrt(expected), 1), format.dtype)
        up, down = (np.asarray(format.optimizer.update(g, state)[0], np.float64) for g in (h, -h))
        h = np.asarray(h, np.float64)
        root = 2 * (1 - B1) * h / (1 - B1**count) / (up - down)
        readings.append(((1 - B2**count) * root**2 - (1 - B2) * h**2) / B2)
    return np.maximum(np.mean(readings, axis=0), 0)


class Score(NamedTuple):
    """A format on one kind of gradients: a number for each table."""

    error: float
    largest_step: float
    sqrt_nu: float


def score(
    kind: Gradients,
    formats: dict[str, Format],
    run: Callable[[Any, jax.Array], tuple[Any, dict[str, Seen]]],
    key: jax.Array,
    shape: Shape,
    progress: tqdm,
) -> dict[str, Score]:
    """Scores every format on one kind of gradients."""
    states: Any = {
        name: optimizer.init(jnp.zeros(shape, dtype))
        for name, (optimizer, dtype) in formats.items()
    }
    chunks = []
    for start in range(0, kind.steps, CHUNK):
        steps = jnp.arange(start, start + CHUNK)
        states, seen = run(states, draw_steps(kind.draw, key, steps))
        chunks.append(jax.device_get(seen))
        progress.update(CHUNK)
    seen = jax.tree.map(
        lambda *parts: np.concatenate(parts).astype(np.float64)[kind.measured], *chunks
    )
    exact, exact_nu = seen[REFERENCE], np.asarray(states[REFERENCE].nu)
    compared = np.zeros(shape, bool)
    compared[:, kind.columns] = exact_nu[:, kind.columns] > 0

    def root_ratio(name: str) -> float:
        nu = read_nu(formats[name], states[name], exact_nu, kind.steps + 1)
        return float(np.sqrt(np.median(nu[compared] / exact_nu[compared])))

    return {
        name: Score(
            float(np.linalg.norm(seen[name].error) / np.linalg.norm(exact.norm)),
            float(seen[name].largest.max() / exact.largest.max()),
            root_ratio(name),
        )
        for name in formats
    }


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def errors_of_betas(
    b1: jax.Array, b2: jax.Array, shape: Shape, steps: int, eps: float
) -> jax.Array:
    """Returns the relative error of int8's update at each step, on normal gradients."""
    make: Any = functools.partial(adam_jax.scale_by_adam, b1, b2, eps=eps)
    stored, exact = make(mu_dtype="int8", nu_dtype="int8"), make()

    def step(states: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        gradient = jax.random.normal(key, shape)
        update, state = stored.update(gradient, states[0])
        desired, exact_state = exact.update(gradient, states[1])
        return (state, exact_state), norm(update - desired) / norm(desired)

    zeros = jnp.zeros(shape)
    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, (stored.init(zeros), exact.init(zeros)), keys)[1]


def table_of_betas(shape: Shape, steps: int, eps: float) -> str:
    """Returns the fourth table."""
    rows = {}
    for b1, b2 in BETAS:
        betas = jnp.float32(b1), jnp.float32(b2)
        errors = np.asarray(errors_of_betas(*betas, shape, steps, eps))
        rows[f"{b1}, {b2}"] = [f"{errors.max():.3f}", f"{errors[-1]:.3f}"]
    return table("b1, b2", ["worst error", "last error"], rows)


def main() -> None:
    """Runs everything, then prints the tables."""
    options = parser("stress", __doc__)
    options.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options.add_argument("--eps", type=float, default=1e-30, help="default: %(default)s")
    options = options.parse_args()
    shape, steps = ((8, 512), 120) if options.small else ((64, 1024), 1200)
    model_key, step_key = jax.random.split(jax.random.key(options.seed))
    kinds = gradients(model_key, shape, steps)
    compared = formats(options.eps)
    run = follow(compared)
    with tqdm(total=sum(kind.steps for kind in kinds), unit="step") as progress:
        rows = {kind.name: score(kind, compared, run, step_key, shape, progress) for kind in kinds}
    print(f"A leaf of {shape}, {steps} steps (the last row {kinds[-1].steps}), ", end="")
    print(f"eps {options.eps}, seed {options.seed}.")
    columns = [name for name in compared if name != REFERENCE]
    for title, field in [
        ("relative error of the update", "error"),
        ("largest step / float32's", "largest_step"),
        ("sqrt(nu) / float32's", "sqrt_nu"),
    ]:
        cells = {
            kind: [number(getattr(scores[name], field)) for name in columns]
            for kind, scores in rows.items()
        }
        print(f"\n{table(title, columns, cells)}")
    square, steps = (64, 64), 100 if options.small else 1000
    print(f"\nint8 moments on a leaf of {square}, {steps} steps of normal gradients.\n")
    print(table_of_betas(square, steps, options.eps))
