"""GPT-2 and Llama 3.1 as plain functions of stacked parameters, to be compiled.

They save memory as users of large models do:

- layers are stacked and scanned, with `jax.checkpoint` around each: the forward pass keeps only the
  input of each layer;
- matrix products are in bfloat16. The scan casts float32 parameters layer by layer;
- attention runs over 256 queries at a time, and again in the backward pass, so memory never holds
  the scores of all queries. (Fused kernels take still less.)
- the loss runs over 256 tokens at a time, likewise: logits of 2048 tokens and Llama's vocabulary
  would take 1 GB in float32, and their gradients another;
- on a mesh with explicit axes, each device has tokens of its own, and divided weights (FSDP) are
  gathered layer by layer where they are used. Without explicit axes, the compiler may gather the
  tokens of all devices instead.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

CHUNK = 256  # tokens
COMPUTED = jnp.bfloat16
Params = dict[str, Any]


class Model(NamedTuple):
    """A decoder-only transformer: GPT-2 if it has learned positions, else a Llama."""

    layers: int
    width: int
    heads: int
    key_value_heads: int
    mlp: int
    vocabulary: int
    positions: int = 0

    @property
    def gpt2(self) -> bool:
        """Tells GPT-2 (LayerNorm, GELU, tied embeddings) from Llama (RMSNorm, SwiGLU, a head)."""
        return self.positions > 0

    @property
    def length(self) -> int:
        """Returns the tokens of a sequence: GPT-2's context, or 2048."""
        return self.positions or 2048

    @property
    def stacked(self) -> dict[str, bool]:
        """Marks the parameters that are stacked over layers, for `value_and_update`."""
        return {name: name == "blocks" for name in self.weights()}

    def weights(self) -> dict[str, Any]:
        """Returns the shapes of all parameters."""
        key_value = self.width // self.heads * self.key_value_heads
        block = {
            "query": (self.width, self.width),
            "key": (self.width, key_value),
            "value": (self.width, key_value),
            "out": (self.width, self.width),
            "up": (self.width, self.mlp),
            "down": (self.mlp, self.width),
        }
        if self.gpt2:
            biases = {f"{name}_bias": shape[1:] for name, shape in block.items()}
            norms = {"attention_norm": (2, self.width), "mlp_norm": (2, self.width)}
            ends = {
                "embedding": (self.vocabulary, self.width),
                "positions": (self.positions, self.width),
                "norm": (2, self.width),
            }
            block |= biases
        else:
            norms = {"attention_norm": (self.width,), "mlp_norm": (self.width,)}
            ends = {
                "embedding": (self.vocabulary, self.width),
                "norm": (self.width,),
                "head": (self.width, self.vocabulary),
            }
            block |= {"gate": (self.width, self.mlp)}
        blocks = {name: (self.layers, *shape) for name, shape in (block | norms).items()}
        return ends | {"blocks": blocks}

    def params(self, dtype: Any) -> Params:
        """Returns the shapes and dtypes of all parameters."""
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, dtype),
            self.weights(),
            is_leaf=lambda x: isinstance(x, tuple),
        )

    def loss(self, params: Params, tokens: jax.Array, scan: Any = jax.lax.scan) -> jax.Array:
        """Returns the mean cross-entropy of the next tokens of (batch, length + 1)."""
        x = rows(gathered(params["embedding"]), tokens[:, :-1]).astype(COMPUTED)
        if self.gpt2:
            x += gathered(params["positions"])[: x.shape[1]].astype(COMPUTED)
        block = jax.checkpoint(self.block, prevent_cse=False)
        x, _ = scan(lambda x, p: (block(x, p), None), x, params["blocks"])
        x = self.norm(x, gathered(params["norm"]))
        head = params["embedding"].T if self.gpt2 else params["head"]
        head = gathered(head.astype(COMPUTED))

        def part(x: jax.Array, labels: jax.Array) -> jax.Array:
            logits = (x @ head).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

        return jnp.mean(in_chunks(part, x, tokens[:, 1:]))

    def block(self, x: jax.Array, p: Params) -> jax.Array:
        """Applies attention and an MLP, each after a norm and added to its input."""
        p = jax.tree.map(lambda w: gathered(w.astype(COMPUTED)), p)

        def dense(x: jax.Array, name: str) -> jax.Array:
            x = x @ p[name]
            return x + p[f"{name}_bias"] if self.gpt2 else x

        normed = self.norm(x, p["attention_norm"])
        split = lambda x: x.reshape(*x.shape[:2], -1, self.width // self.heads)  # noqa: E731
        query, key, value = (split(dense(normed, name)) for name in ("query", "key", "value"))
        if not self.gpt2:
            query, key = rotated(query), rotated(key)
        x = x + dense(attend(query, key, value).reshape(x.shape), "out")
        normed = self.norm(x, p["mlp_norm"])
        up = dense(normed, "up")
        up = jax.nn.gelu(up) if self.gpt2 else up * jax.nn.silu(dense(normed, "gate"))
        return x + dense(up, "down")

    def norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """Applies LayerNorm, whose scale and bias come in one array, or RMSNorm."""
        wide, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
        if self.gpt2:
            wide = jax.nn.standardize(wide) * scale[0] + scale[1]
            return wide.astype(x.dtype)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
        return (wide * scale).astype(x.dtype)


def on_a_mesh(x: jax.Array) -> bool:
    """Tells whether an array is on a mesh with explicit axes."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def gathered(weight: jax.Array) -> jax.Array:
    """Returns the whole weight on each device; the backward pass reduces and scatters gradients."""
    return reshard(weight, PartitionSpec()) if on_a_mesh(weight) else weight


def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the rows of a table, divided over devices as their ids are."""
    if not on_a_mesh(ids):
        return table[ids]
    sharding = jax.typeof(ids).sharding
    spec = PartitionSpec(*sharding.spec, None)
    return table.at[ids].get(out_sharding=NamedSharding(sharding.mesh, spec))


def rotated(x: jax.Array) -> jax.Array:
    """Applies rotary positions."""
    half = x.shape[-1] // 2
    rates = 500_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * rates
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Applies causal attention to (batch, length, heads, width); keys may have fewer heads."""
    batch, length, _, width = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, width)

    def part(query: jax.Array, places: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqkgw,btkw->bkgqt", query, key).astype(jnp.float32)
        past = places[:, None, None, :, None] >= jnp.arange(length)
        weights = jax.nn.softmax(jnp.where(past, scores / math.sqrt(width), -jnp.inf))
        return jnp.einsum("bkgqt,btkw->bqkgw", weights.astype(value.dtype), value)

    places = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return in_chunks(part, query, places)


def in_chunks(part: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Applies a function to (batch, length, ...), a part of the length at a time.

    The backward pass recomputes everything inside.
    """
    batch, length, *_ = arrays[0].shape
    size = min(CHUNK, length)
    assert length % size == 0
    split = [
        jnp.moveaxis(x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0) for x in arrays
    ]
    checkpointed = jax.checkpoint(part, prevent_cse=False)
    found = jax.lax.map(lambda x: checkpointed(*x), tuple(split))
    return jnp.moveaxis(found, 0, 1).reshape(batch, length, *found.shape[3:])


MODELS = {
    "gpt2-124m": Model(12, 768, 12, 12, 3072, 50257, positions=1024),
    "gpt2-1.5b": Model(48, 1600, 25, 25, 6400, 50257, positions=1024),
    "llama-8b": Model(32, 4096, 32, 8, 14336, 128256),
    "llama-70b": Model(80, 8192, 64, 8, 28672, 128256),
}
SMALL = {  # to see that everything runs
    "gpt2": Model(2, 128, 2, 2, 512, 1000, positions=256),
    "llama": Model(2, 256, 4, 2, 512, 1024),
}
