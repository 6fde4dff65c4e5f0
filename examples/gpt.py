r"""Trains a small GPT on the source of Python's standard library, byte by byte.

    uv run examples/gpt.py
    uv run examples/gpt.py --param-dtype bfloat16 --remainder int8 --mu-dtype int8 --nu-dtype int8
    uv run examples/gpt.py --param-dtype bfloat16 --remainder int8 --mu-dtype int8 --nu-dtype int8 \
        --release
    uv run examples/gpt.py --checkpoints out/checkpoints
    uv run examples/gpt.py --logdir out/logs
    uv run --with tensorboard tensorboard --logdir out/logs

The default settings take about two minutes on two CPU cores. The text is on every machine that
runs Python: nothing is downloaded. Every tenth file is held out. The second command keeps weights,
gradients and optimizer state in 7 bytes per parameter instead of 16. The third one updates each
block as soon as it has its gradients, which are never there for all blocks at once: 5 bytes. The
fourth one saves every 50 steps and, given once more, continues: a run that was killed, at any
moment and however often, comes to the same bits as one that was not. It may continue with
`--release` or without: the numbers are the same up to rounding. The fifth one writes down what
`adam_jax.step_statistics` says of every tenth step, and the last shows it. Losses compare between
runs under one version of Python, since every version has a text of its own.
"""

import argparse
import functools
import math
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoints import CheckpointError, Checkpoints
from flax import nnx
from matplotlib.figure import Figure
from mnist import Parser, bytes_per_parameter, make_optimizer
from tensorboardX import SummaryWriter
from tqdm import tqdm

import adam_jax

VARIANTS = ["adam", "adamw", "nadam", "nadamw"]  # those with both moments in every format
VOCABULARY = 256
HEAD_WIDTH = 32
UNROLLED = functools.partial(jax.lax.scan, unroll=True)  # on a CPU a quarter faster than a loop
STEPS_PER_CALL = 10  # one call runs several: on a CPU a third faster than one by one
EVALUATIONS = 10
SAVE_EVERY = 50  # steps: a killed run loses at most these
# Settings that change no step: --release does no more than round elsewhere.
FREE = {"prompt", "temperature", "release", "logdir", "checkpoints", "output"}
SCANNED = {"embedding": False, "blocks": True, "norm": False}  # the GPT's stacks of layers
SAMPLED_BYTES = 300
LOG_2 = math.log(2)  # nats per bit


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the standard library's modules, for training and held out."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    files = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    held_out = files[9::10]
    del files[9::10]
    return np.concatenate(files), np.concatenate(held_out)


class Block(nnx.Module):
    """Attention to what came before, then two dense layers, each added to its input."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention_in = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.dense_norm = nnx.LayerNorm(width, rngs=rngs)
        self.dense_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.dense_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Vectors of the same shape, (batch, length, width)."""
        x = x + self.attention_out(self.attend(self.attention_in(self.attention_norm(x))))
        return x + self.dense_out(nnx.gelu(self.dense_in(self.dense_norm(x))))

    def attend(self, x: jax.Array) -> jax.Array:
        """From queries, keys and values side by side to what the heads have found."""
        batch, length, _ = x.shape
        queries, keys, values = jnp.split(x.reshape(batch, length, -1, HEAD_WIDTH), 3, axis=2)
        scores = jnp.einsum("bqhw,bkhw->bhqk", queries, keys).astype(jnp.float32)
        past = jnp.tril(jnp.ones((length, length), dtype=bool))
        weights = nnx.softmax(jnp.where(past, scores / math.sqrt(HEAD_WIDTH), -jnp.inf))
        found = jnp.einsum("bhqk,bkhw->bqhw", weights.astype(x.dtype), values)
        return found.reshape(batch, length, -1)


class GPT(nnx.Module):
    """A decoder-only transformer that computes in the dtype of its weights.

    Its blocks are one whose weights are stacked: each has the blocks as its first axis.
    """

    def __init__(self, layers: int, width: int, context: int, rngs: nnx.Rngs):
        draw = functools.partial(nnx.initializers.normal(1 / math.sqrt(width)), rngs.params())
        self.embedding = nnx.Param(draw((VOCABULARY + context, width)))
        blocks = [Block(width, rngs) for _ in range(layers)]
        self.blocks = jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, text: jax.Array, scan: Callable[..., Any] = UNROLLED) -> jax.Array:
        """The logits of the byte after each one of (batch, length) bytes, in float32."""
        of_bytes, of_positions = jnp.split(self.embedding[...], [VOCABULARY])
        x = of_bytes[text.astype(jnp.int32)] + of_positions[: text.shape[1]]
        x, _ = scan(lambda x, block: (block(x), None), x, self.blocks)
        return (self.norm(x) @ of_bytes.T).astype(jnp.float32)


def mean_loss(
    graph: Any, params: Any, windows: jax.Array, scan: Callable[..., Any] = UNROLLED
) -> jax.Array:
    """In nats per byte, over windows of the text with one byte more than the context."""
    logits = nnx.merge(graph, params)(windows[:, :-1], scan)
    labels = windows[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# Donated, the old weights and moments give their memory to the new ones: no second copy.
@functools.partial(
    jax.jit,
    static_argnames=("graph", "optimizer", "batch_shape", "release", "watched"),
    donate_argnames="carry",
)
def train_steps(
    graph: Any,
    optimizer: optax.GradientTransformation,
    batch_shape: tuple[int, int],
    carry: tuple[Any, Any],
    steps: jax.Array,
    text: jax.Array,
    key: jax.Array,
    release: bool = False,
    watched: bool = False,
) -> tuple[tuple[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]:
    """The parameters and the optimizer's state after the numbered steps.

    And each step's loss, and its statistics if it is watched.
    """
    size, length = batch_shape
    loss = functools.partial(mean_loss, graph)
    released_step = adam_jax.value_and_update(loss, optimizer, layers=SCANNED)

    def step(carry: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], Any]:
        params, old_state = carry
        step_key = jax.random.fold_in(key, number)
        starts = jax.random.randint(step_key, (size, 1), 0, len(text) - length + 1)
        batch = text[starts + jnp.arange(length)]
        if release:
            value, params, state = released_step(params, old_state, batch)
            return (params, state), (value, {})
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, old_state, params)
        statistics = {}
        if watched:
            statistics = adam_jax.step_statistics(updates, state, params, old_state=old_state)
        return (optax.apply_updates(params, updates), state), (value, statistics)

    return jax.lax.scan(step, carry, steps)


@functools.partial(jax.jit, static_argnames="graph")
def held_out_loss(graph: Any, params: Any, windows: jax.Array) -> jax.Array:
    """The mean loss over all windows, 32 at a time."""
    losses = jax.lax.map(lambda w: mean_loss(graph, params, w[None]), windows, batch_size=32)
    return losses.mean()


def start(
    weights: Any, dtype: str, optimizer: optax.GradientTransformation, remainder: str
) -> tuple[Any, Any]:
    """The parameters in their dtype and the optimizer's state, from weights in float32."""
    params = optax.tree.cast(weights, dtype)
    state = optimizer.init(params)
    if remainder != "off":
        return adam_jax.load_master_params(weights, params, state)
    return params, state


class Result(NamedTuple):
    """What a training leaves behind."""

    model: GPT
    losses: np.ndarray  # of each step, in nats per byte
    held_out: dict[int, float]  # loss after so many steps; the last is that of the whole text
    speed: float  # tokens per second
    memory: float  # bytes per parameter, for the weights and the optimizer's state


def settings_of_steps(
    settings: argparse.Namespace, text: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """What every step depends on: only a run with the same may continue from a checkpoint."""
    chosen = {name: value for name, value in vars(settings).items() if name not in FREE}
    checksum = zlib.crc32(text[0].tobytes())
    return chosen | {"text": f"{len(text[0]):,} bytes (CRC {checksum:08x})"}


def train(
    settings: argparse.Namespace,
    text: tuple[np.ndarray, np.ndarray],
    make_optimizer: Callable[..., optax.GradientTransformation] = make_optimizer,
    thinned: int = 8,
) -> Result:
    """Trains as the settings say, which are those of the command line.

    Until the last step, the held-out loss is that of one in `thinned` windows.
    """
    model = GPT(settings.layers, settings.width, settings.context, nnx.Rngs(settings.seed))
    graph, weights = nnx.split(model)
    optimizer = make_optimizer(settings, settings.steps)
    carry = start(nnx.to_pure_dict(weights), settings.param_dtype, optimizer, settings.remainder)
    memory = bytes_per_parameter(*carry)

    training, held_out = map(jnp.asarray, text)
    batch_shape = settings.batch_size, settings.context + 1
    windows = held_out[: len(held_out) // batch_shape[1] * batch_shape[1]]
    windows = windows.reshape(-1, batch_shape[1])
    key = jax.random.key(settings.seed)
    tokens_per_step = settings.batch_size * settings.context

    checkpoints = Checkpoints(settings.checkpoints, settings_of_steps(settings, text))
    carry, progress = checkpoints.latest(carry, {"losses": [], "held_out": [], "speeds": []})
    losses, held_out_losses, speeds = progress.values()
    saved = len(losses)
    stages = np.array_split(np.arange(settings.steps), min(EVALUATIONS, settings.steps))
    lengths = {stage[-1] + 1: len(stage) for stage in stages}  # by the step that a stage ends with
    calls = [
        steps
        for stage in stages
        for steps in np.split(stage, range(STEPS_PER_CALL, len(stage), STEPS_PER_CALL))
        if steps[0] >= saved
    ]
    watched = settings.logdir is not None
    # With disable=None there is no bar where it could not move, such as in a log file.
    with (
        checkpoints,
        tqdm(
            total=settings.steps * tokens_per_step,
            initial=saved * tokens_per_step,
            unit=" tokens",
            unit_scale=True,
            leave=False,
            disable=None,
        ) as bar,
        SummaryWriter(
            settings.logdir, write_to_disk=watched, purge_step=saved + 1 if saved else None
        ) as writer,
    ):
        if saved:
            bar.write(f"continuing from step {saved}")
        for steps in calls:
            began = time.perf_counter()
            carry, (new, statistics) = train_steps(
                graph,
                optimizer,
                batch_shape,
                carry,
                jnp.asarray(steps),
                training,
                key,
                settings.release,
                watched,
            )
            losses.extend(np.asarray(new).tolist())
            speeds.append(len(steps) * tokens_per_step / (time.perf_counter() - began))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(len(steps) * tokens_per_step)
            writer.add_scalar("loss/training", losses[-1], len(losses))
            for name, values in jax.device_get(statistics).items():
                writer.add_scalar(name, values[-1], len(losses))
            if length := lengths.get(len(losses)):
                # A part of the held-out text shows how it goes, all of it comes at the end.
                part = windows if len(losses) == settings.steps else windows[::thinned]
                loss = float(held_out_loss(graph, carry[0], part))
                held_out_losses.append((len(losses), loss))
                writer.add_scalar("loss/held_out", loss, len(losses))
                bar.write(
                    f"step {len(losses):5}: training loss {np.mean(losses[-length:]):.4f}, "
                    f"held-out loss {loss:.4f}"
                )
            if len(losses) >= saved + SAVE_EVERY or len(losses) == settings.steps:
                checkpoints.save(len(losses), carry, progress)
                saved = len(losses)
    # The median leaves the compilation out.
    speed, by_step = float(np.median(speeds)), dict(held_out_losses)
    return Result(nnx.merge(graph, carry[0]), np.array(losses, np.float32), by_step, speed, memory)


def memory_needed(settings: argparse.Namespace) -> str:
    """The memory that training keeps for parameters, in a line; nothing is allocated."""

    def params() -> Any:
        model = GPT(settings.layers, settings.width, settings.context, nnx.Rngs(settings.seed))
        return optax.tree.cast(nnx.to_pure_dict(nnx.state(model)), settings.param_dtype)

    usage = adam_jax.memory_usage(
        make_optimizer(settings, settings.steps),
        jax.eval_shape(params),
        layers=SCANNED if settings.release else False,
    )
    parts = {"weights": usage.weights, "gradients": usage.gradients, **usage.state}
    shown = ", ".join(f"{part} {count / usage.size:.2f}" for part, count in parts.items())
    return (
        f"{usage.size:,} parameters, {usage.total / 1e6:.1f} MB without activations. "
        f"Bytes per parameter: {shown}"
    )


def sample(model: GPT, prompt: bytes, temperature: float, context: int, key: jax.Array) -> bytes:
    """The prompt and what the model writes after it."""

    @nnx.jit
    def next_byte(model: GPT, text: jax.Array, last: int, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, model(text[None])[0, last] / temperature)

    text = list(prompt)
    for step_key in jax.random.split(key, SAMPLED_BYTES):
        seen = text[-context:]
        # What stands after the last byte cannot be seen from it: zeros fill the context.
        filled = jnp.array(seen + [0] * (context - len(seen)), jnp.uint8)
        text.append(int(next_byte(model, filled, len(seen) - 1, step_key)))
    return bytes(text)


def plot(losses: np.ndarray, held_out: dict[int, float], title: str, path: Path) -> None:
    """Draws the training loss and the held-out loss into a PNG."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.plot(
        np.arange(1, len(losses) + 1),
        losses,
        color="C0",
        alpha=0.4,
        linewidth=0.8,
        label="training, each step",
    )
    axes.plot(list(held_out), list(held_out.values()), "C1o-", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    bits = axes.secondary_yaxis(
        "right",
        functions=(lambda nats: np.divide(nats, LOG_2), lambda bits: np.multiply(bits, LOG_2)),
    )
    bits.set_ylabel("loss (bits per byte)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines["top"].set_visible(False)
    figure.savefig(path, dpi=150)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings on the command line, all checked: a mistake shows now, not after training."""
    parser = Parser(
        description="Train a small GPT on the source of Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=1000, metavar="N", help="batches to train on")
    add("--layers", type=int, default=3, metavar="N", help="transformer blocks")
    add("--width", type=int, default=128, metavar="N", help="of each vector; heads have 32")
    add("--context", type=int, default=128, metavar="N", help="bytes that the model sees")
    add("--prompt", default="def ", metavar="TEXT", help="what the sample begins with")
    add("--temperature", type=float, default=0.8, metavar="T", help="of the sample")
    add("--release", action="store_true", help="never have the gradients of all blocks at once")
    add("--logdir", type=Path, metavar="DIR", help="for TensorBoard: losses, and how steps go")
    add("--checkpoints", type=Path, metavar="DIR", help="to save in, and to continue from")
    parser.add_training_flags(
        VARIANTS, learning_rate=4e-3, batch_size=16, output=Path("out/gpt.png")
    )
    args = parser.parse_args(arguments)
    for name in ("steps", "layers", "context", "batch_size"):
        if (value := getattr(args, name)) < 1:
            flag = name.replace("_", "-")
            parser.error(f"argument --{flag}: must be at least 1, got {value}")
    if args.width < 1 or args.width % HEAD_WIDTH:
        parser.error(f"argument --width: must be a multiple of {HEAD_WIDTH}, got {args.width}")
    if not args.prompt:
        parser.error("argument --prompt: must not be empty")
    if not 0 < args.temperature < math.inf:
        parser.error(f"argument --temperature: must be positive, got {args.temperature}")
    if args.release and args.logdir:
        parser.error(
            "argument --release: leaves no updates for the statistics of --logdir; give one of both"
        )
    parser.check_training_flags(args)
    if args.checkpoints:
        try:
            args.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument --checkpoints: {error}")
        if not os.access(args.checkpoints, os.W_OK):
            parser.error(f"argument --checkpoints: cannot write in {args.checkpoints}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the command line says, plots how it went and lets the model write."""
    args = parse_arguments(arguments)
    text = load_text()
    print(
        f"Python {platform.python_version()}'s standard library: {len(text[0]):,} bytes, "
        f"and {len(text[1]):,} held out"
    )
    print(memory_needed(args))
    model, losses, held_out, speed, memory = train(args, text)
    kept = (
        f"{args.param_dtype} parameters, remainder {args.remainder}, "
        f"moments {args.mu_dtype} and {args.nu_dtype}"
    )
    plot(losses, held_out, f"GPT with {args.optimizer}\n{kept}", args.output)
    prompt, key = os.fsencode(args.prompt), jax.random.key(args.seed)
    written = sample(model, prompt, args.temperature, args.context, key)
    print(f"\n{written.decode(errors='replace')}\n")
    loss = held_out[args.steps]
    print(
        f"{args.optimizer}, {kept}: held-out loss {loss:.4f} nats per byte "
        f"({loss / LOG_2:.4f} bits), {speed:,.0f} tokens/s, weights and optimizer state "
        f"{memory:.1f} bytes per parameter; plot: {args.output}"
    )


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        # The last thing that is seen: when Orbax cannot read one array it goes on reading others,
        # in a loop that it has closed, and each ends with tracebacks, hundreds of lines in all.
        with open(os.dup(sys.stderr.fileno()), "w") as terminal, open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
            print(f"gpt.py: error: {error}", file=terminal)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as the shell reports a program that Ctrl-C ended
