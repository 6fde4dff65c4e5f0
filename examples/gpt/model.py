"""The model: a small GPT that reads and writes bytes, in Flax NNX."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

VOCABULARY = 256
HEAD_WIDTH = 32
UNROLLED = functools.partial(jax.lax.scan, unroll=True)  # on a CPU a quarter faster than a loop
STACKED = {"embedding": False, "blocks": True, "norm": False}  # where a GPT's layers are


class Block(nnx.Module):
    """Attention to earlier bytes, then two dense layers, each added to its input."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention_in = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.dense_norm = nnx.LayerNorm(width, rngs=rngs)
        self.dense_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.dense_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps vectors of shape (batch, length, width) to others of that shape."""
        x = x + self.attention_out(self.attend(self.attention_in(self.attention_norm(x))))
        return x + self.dense_out(nnx.gelu(self.dense_in(self.dense_norm(x))))

    def attend(self, x: jax.Array) -> jax.Array:
        """Splits the input into queries, keys and values, and returns the heads' outputs."""
        batch, length, _ = x.shape
        queries, keys, values = jnp.split(x.reshape(batch, length, -1, HEAD_WIDTH), 3, axis=2)
        scores = jnp.einsum("bqhw,bkhw->bhqk", queries, keys).astype(jnp.float32)
        past = jnp.tril(jnp.ones((length, length), dtype=bool))
        weights = nnx.softmax(jnp.where(past, scores / math.sqrt(HEAD_WIDTH), -jnp.inf))
        found = jnp.einsum("bhqk,bkhw->bqhw", weights.astype(x.dtype), values)
        return found.reshape(batch, length, -1)


class GPT(nnx.Module):
    """A decoder-only transformer that computes in the dtype of its weights.

    `blocks` is one block whose weights have the layers as their first axis. A scan runs through
    them, which is what gradient release needs.
    """

    def __init__(self, layers: int, width: int, context: int, rngs: nnx.Rngs):
        draw = functools.partial(nnx.initializers.normal(1 / math.sqrt(width)), rngs.params())
        self.embedding = nnx.Param(draw((VOCABULARY + context, width)))
        blocks = [Block(width, rngs) for _ in range(layers)]
        self.blocks = jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, text: jax.Array, scan: Callable[..., Any] = UNROLLED) -> jax.Array:
        """Returns the logits, in float32, of the byte after each one of (batch, length) bytes."""
        of_bytes, of_positions = jnp.split(self.embedding[...], [VOCABULARY])
        x = of_bytes[text.astype(jnp.int32)] + of_positions[: text.shape[1]]
        x, _ = scan(lambda x, block: (block(x), None), x, self.blocks)
        return (self.norm(x) @ of_bytes.T).astype(jnp.float32)


def mean_loss(
    graph: Any, params: Any, windows: jax.Array, scan: Callable[..., Any] = UNROLLED
) -> jax.Array:
    """Returns nats per byte over windows of text that are one byte longer than the context."""
    logits = nnx.merge(graph, params)(windows[:, :-1], scan)
    labels = windows[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def sample(
    model: GPT, prompt: bytes, context: int, seed: int, size: int = 300, temperature: float = 0.8
) -> bytes:
    """Returns the prompt and what the model writes after it."""

    @nnx.jit
    def next_byte(model: GPT, text: jax.Array, last: int, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, model(text[None])[0, last] / temperature)

    text = list(prompt)
    for key in jax.random.split(jax.random.key(seed), size):
        seen = text[-context:]
        # No byte sees those after it: zeros fill the context.
        filled = jnp.array(seen + [0] * (context - len(seen)), jnp.uint8)
        text.append(int(next_byte(model, filled, len(seen) - 1, key)))
    return bytes(text)
