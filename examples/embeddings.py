"""Trains a table of embeddings of which each step uses few rows.

    uv run examples/embeddings.py
    uv run examples/embeddings.py --moments int8
    uv run examples/embeddings.py --mode exact --steps 600
    uv run examples/embeddings.py --compare --rows 65536 --steps 1000

The model predicts the next byte of Python's standard library. The last byte, the last two and so on
up to the last six each name a row of one table, by a hash, and a small network reads these rows.
Of two million rows a step uses a few thousand: `adam_jax.row_sparse` updates these in place,
however large the table is. The network has an ordinary optimizer. There are three modes: `lazy`
leaves other rows as they are, `exact` moves them as Adam does, and `dense` is Adam on the gradient
of the whole table. The last command trains a small table in each mode.

The default settings take about two minutes on two CPU cores. The text is on every machine that runs
Python: nothing is downloaded. Every tenth file is held out.
"""

import argparse
import functools
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import adam_jax

CONTEXTS = 6  # the longest has so many bytes
HIDDEN_WIDTH = 128
STEPS_PER_CALL = 20
EVALUATE_EVERY = 200  # steps
HELD_OUT_STRIDE = 7  # of the held-out text every seventh byte is predicted
LOG_2 = math.log(2)  # nats per bit


def load_text() -> tuple[jax.Array, jax.Array]:
    """Returns the bytes of the standard library without its tests, and those held out."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = sorted(Path(os.__file__).parent.rglob("*.py"))
    paths = [path for path in paths if left_out.isdisjoint(path.parts)]
    files = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    held_out = files[9::10]
    del files[9::10]
    return jnp.asarray(np.concatenate(files)), jnp.asarray(np.concatenate(held_out))


def context_ids(text: jax.Array, places: jax.Array, rows: int) -> jax.Array:
    """Returns the rows of the contexts of each place: the last byte, the last two and so on."""
    hashed, ids = jnp.zeros(places.shape, jnp.uint32), []
    for back in range(1, CONTEXTS + 1):
        hashed = (hashed + text[places - back] + 1) * np.uint32(0x9E3779B1)
        hashed ^= hashed >> 15
        ids.append(hashed % np.uint32(rows))
    return jnp.stack(ids, axis=-1)


def mean_loss(vectors: jax.Array, network: Any, labels: jax.Array) -> jax.Array:
    """Returns bits per byte: the network reads the vectors of all contexts side by side."""
    hidden = jnp.tanh(vectors.reshape(len(vectors), -1) @ network["hidden"])
    logits = (hidden @ network["out"]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))
    return losses.mean() / LOG_2


def dense(optimizer: optax.GradientTransformation) -> adam_jax.RowSparse:
    """Returns the functions of `row_sparse`, but computes the gradient of the whole table."""

    def lookup(ids: jax.Array, table: jax.Array, state: Any) -> jax.Array:
        return table[ids]

    def update(ids: jax.Array, gradients: jax.Array, table: jax.Array, state: Any) -> Any:
        gradient = jnp.zeros_like(table).at[ids].add(gradients)  # as JAX differentiates table[ids]
        updates, state = optimizer.update(gradient, state, table)
        return optax.apply_updates(table, updates), state

    return adam_jax.RowSparse(optimizer.init, lookup, update, lambda *table_state: table_state)


MODES = {
    "lazy": adam_jax.row_sparse,
    "exact": functools.partial(adam_jax.row_sparse, exact=True),
    "dense": dense,
}


# With donation a step works in place: its time does not grow with the table.
@functools.partial(
    jax.jit, static_argnames=("rows", "optimizer", "batch_size"), donate_argnames="carry"
)
def train_steps(
    rows: adam_jax.RowSparse,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    carry: tuple[Any, ...],
    steps: jax.Array,
    text: jax.Array,
    key: jax.Array,
) -> tuple[tuple[Any, ...], jax.Array]:
    """Returns the table, its state, the network and its state, and the loss of each step."""

    def step(carry: tuple[Any, ...], number: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
        table, table_state, network, network_state = carry
        step_key = jax.random.fold_in(key, number)
        places = jax.random.randint(step_key, (batch_size,), CONTEXTS, len(text))
        ids = context_ids(text, places, len(table))
        vectors = rows.lookup(ids, table, table_state)
        loss_and_gradients = jax.value_and_grad(mean_loss, argnums=(0, 1))
        loss, (of_vectors, of_network) = loss_and_gradients(vectors, network, text[places])
        table, table_state = rows.update(ids, of_vectors, table, table_state)
        updates, network_state = optimizer.update(of_network, network_state, network)
        return (table, table_state, optax.apply_updates(network, updates), network_state), loss

    return jax.lax.scan(step, carry, steps)


@functools.partial(jax.jit, static_argnames="rows")
def held_out_loss(
    rows: adam_jax.RowSparse, table: jax.Array, state: Any, network: Any, text: jax.Array
) -> jax.Array:
    """Returns the mean loss at places all over the text, 1,024 at a time."""

    def loss(places: jax.Array) -> jax.Array:
        vectors = rows.lookup(context_ids(text, places, len(table)), table, state)
        return mean_loss(vectors, network, text[places])

    places = jnp.arange(CONTEXTS, len(text), HELD_OUT_STRIDE)
    return jax.lax.map(loss, places[: len(places) // 1024 * 1024].reshape(-1, 1024)).mean()


class Result(NamedTuple):
    """The figures of one training run."""

    losses: np.ndarray  # of each step, in bits per byte
    held_out: dict[int, float]  # bits per byte after so many steps
    step_time: float  # in seconds, without compilation
    seconds: float  # of the whole run
    memory: float  # bytes per parameter of the table and its state


def train(settings: argparse.Namespace, mode: str, text: tuple[jax.Array, jax.Array]) -> Result:
    """Trains in one of the modes, with the settings of the command line."""
    began = time.perf_counter()
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.steps // 10, settings.steps
    )
    adam = adam_jax.adam(schedule, mu_dtype=settings.moments, nu_dtype=settings.moments)
    # Clipping needs all gradients, and the exact mode of a table takes Adam alone.
    rows, optimizer = MODES[mode](adam), optax.chain(adam_jax.clip_by_global_norm(1.0), adam)
    # Contexts that no step has seen stay at 0.
    table = jnp.zeros((settings.rows, settings.width))
    sizes = {"hidden": (CONTEXTS * settings.width, HIDDEN_WIDTH), "out": (HIDDEN_WIDTH, 256)}
    key, draw = jax.random.key(settings.seed), jax.nn.initializers.lecun_normal()
    network = {name: draw(key, size) for name, size in sizes.items()}
    carry = (table, rows.init(table), network, optimizer.init(network))
    memory = sum(leaf.nbytes for leaf in jax.tree.leaves(carry[:2])) / table.size

    numbers = np.arange(settings.steps)
    losses, held_out, times = [], {}, []
    # With disable=None there is no bar where it could not move, such as in a log file.
    with tqdm(total=settings.steps, unit="step", leave=False, disable=None) as bar:
        for steps in np.split(numbers, range(STEPS_PER_CALL, settings.steps, STEPS_PER_CALL)):
            call_began = time.perf_counter()
            carry, new = train_steps(
                rows, optimizer, settings.batch_size, carry, jnp.asarray(steps), text[0], key
            )
            losses.extend(np.asarray(new).tolist())
            times.append((time.perf_counter() - call_began) / len(steps))
            bar.update(len(steps))
            done = len(losses)
            if (
                done == settings.steps
            ):  # the exact mode makes up for the steps that rows have missed
                catch_up = jax.jit(rows.catch_up, donate_argnums=(0, 1))
                carry = (*catch_up(*carry[:2]), *carry[2:])
            if done % EVALUATE_EVERY == 0 or done == settings.steps:
                held_out[done] = float(held_out_loss(rows, *carry[:3], text[1]))
                bar.write(
                    f"{mode}, step {done:5}: {np.mean(losses[-EVALUATE_EVERY:]):.3f} bits per byte "
                    f"in training, {held_out[done]:.3f} held out"
                )
    # The first call compiles.
    step_time, seconds = float(np.median(times[1:] or times)), time.perf_counter() - began
    return Result(np.array(losses), held_out, step_time, seconds, memory)


def plot(results: dict[str, Result], title: str, path: Path) -> None:
    """Draws the bits per byte of each mode, in training and held out, into a PNG."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = ["C0o-", "C1s-", "C2x--"]  # exact and dense agree: both must show
    for (mode, result), style in zip(results.items(), styles, strict=False):
        steps = np.arange(1, len(result.losses) + 1)
        axes.plot(steps, result.losses, style[:2], alpha=0.25, linewidth=0.6)
        axes.plot(*zip(*result.held_out.items(), strict=True), style, label=f"{mode}, held out")
    axes.plot([], [], "0.6", linewidth=0.6, label="training, each step")
    lowest = min(result.losses.min() for result in results.values())
    axes.set(title=title, xlabel="step", ylabel="bits per byte", ylim=(lowest - 0.1, lowest + 2.5))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """Parses and checks the command line: a mistake shows now, not after training."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # errors in one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, moments = parser.add_argument, ["float32", "bfloat16", "int8"]
    add("--mode", choices=MODES, default="lazy", help="how rows move that a step does not use")
    add("--compare", action="store_true", help="train in each mode; best with few rows")
    add("--rows", type=int, default=2**21, metavar="N", help="of the table")
    add("--width", type=int, default=32, metavar="N", help="of each row")
    add("--steps", type=int, default=2400, metavar="N", help="batches to train on")
    add("--batch-size", type=int, default=2048, metavar="N", help="bytes to predict per step")
    add("--learning-rate", type=float, default=1e-2, metavar="RATE", help="peak, after warmup")
    add("--moments", choices=moments, default="float32", help="what stores mu and nu")
    add("--seed", type=int, default=0, metavar="N", help="of weights and batches")
    add("--output", type=Path, default=Path("out/embeddings.png"), metavar="PNG", help="the plot")
    args = parser.parse_args()
    for name in ("rows", "width", "steps", "batch_size", "learning_rate"):
        if (value := getattr(args, name)) <= 0:
            parser.error(f"argument --{name.replace('_', '-')}: must be positive, got {value}")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {error}")
    return args


def main() -> None:
    """Trains as the command line says and plots the losses."""
    args, text = parse_arguments(), load_text()
    print(
        f"{len(text[0]):,} bytes of Python's standard library, and {len(text[1]):,} held out; "
        f"a table of {args.rows:,} rows, {args.rows * args.width:,} parameters"
    )
    modes = MODES if args.compare else [args.mode]
    results = {mode: train(args, mode, text) for mode in modes}
    plot(results, f"Table of {args.rows:,} rows", args.output)
    print("mode   held-out bits per byte  ms per step  seconds in all  bytes per parameter")
    for mode, (_, held_out, step_time, seconds, memory) in results.items():
        bits = held_out[args.steps]
        print(f"{mode:5} {bits:23.4f} {1e3 * step_time:12.1f} {seconds:15.1f} {memory:20.2f}")
    print(f"plot: {args.output}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as the shell reports a program that Ctrl-C ended
