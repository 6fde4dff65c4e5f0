"""Clips gradients in training steps that never hold all of them at once."""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import check_not_negative, keystr
from adam_jax._state import with_extra_args
from adam_jax._types import Leaf, RealLeaf, Scalar


def per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Applies a transformation to each layer of stacked leaves by itself.

    `optax.clip_by_block_rms(1.0)` looks at whole leaves. Where a leaf is a stack of layers, as
    `jax.lax.scan` needs it, that treats separate parameters as one. In

        optimizer = optax.chain(per_layer(optax.clip_by_block_rms(1.0)), adam_jax.adamw(1e-3))

    it looks at one layer of a leaf at a time, and `per_layer(optax.clip_by_global_norm(1.0))` clips
    by the norm of all gradients of a layer. `value_and_update` accepts such an optimizer, since no
    layer depends on another. The wrapper is a `jax.vmap` over the first axis of gradients,
    parameters and state.

    Args:
        inner: any optax gradient transformation.

    Returns:
        An optax gradient transformation for trees whose leaves all have the same number of layers
        as their first axis; to apply it to a part of a tree, put it into `optax.masked`. Its state
        is that of `inner` for one layer, with an axis of layers in front of each leaf.

    Raises:
        ValueError: for leaves with different numbers of layers, or scalars, naming their paths.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, optax
        >>> clip = adam_jax.per_layer(optax.clip_by_global_norm(1.0))
        >>> gradients = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}  # of two layers
        >>> updates, _ = clip.update(gradients, clip.init(gradients))
        >>> updates["w"]
        Array([[0.6, 0.8],
               [0.3, 0.4]], dtype=float32)
    """
    inner = with_extra_args(inner)

    def init(params: optax.Params) -> optax.OptState:
        _check_layers(params)
        return jax.vmap(inner.init)(params) if jax.tree.leaves(params) else inner.init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        _check_layers(updates)
        # The places of the layers in their stack mean nothing to a layer by itself.
        extra_args.pop("positions", None)
        of_one = lambda *args: inner.update(*args, **extra_args)  # noqa: E731
        return (jax.vmap(of_one) if jax.tree.leaves(updates) else of_one)(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_layers(tree: Any) -> None:
    first: tuple[str, int] | None = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = keystr(path)
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"per_layer got the scalar {name}, which has no axis of layers. Leave it out with "
                "optax.masked."
            )
        first = first or (name, leaf.shape[0])
        if leaf.shape[0] != first[1]:
            raise ValueError(
                f"per_layer got {first[0]} with {first[1]} layers and {name} with {leaf.shape[0]}. "
                "Leave out leaves that are not stacked with optax.masked, and use one per_layer "
                "for each stack length."
            )


def clip_by_global_norm(max_norm: Scalar) -> optax.GradientTransformationExtraArgs:
    r"""Scales gradients so that their norm over all leaves is at most `max_norm`.

    $$g \leftarrow g \min(1, \text{max\_norm} / \lVert g \rVert)$$

    $$\lVert g \rVert^2 = \sum_\text{leaves} \sum_i |g_i|^2$$

    This is `optax.clip_by_global_norm` ([Pascanu et al.
    (2013)](https://arxiv.org/abs/1211.5063)) with the norm in float32. `value_and_update` accepts
    it too, and then makes two backward passes, one for the norm and one for the updates. It clips
    by the norm of the loss's gradients, so put it first in the chain; the chain may be inside
    `master_weights`.

    Args:
        max_norm: the largest norm, in units of the gradient.

    Returns:
        An optax gradient transformation without state. If you know the norm already, pass it to
        `update` as the extra argument `global_norm`.

    Raises:
        ValueError: for a negative or infinite `max_norm`.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> clip = adam_jax.clip_by_global_norm(1.0)
        >>> gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
        >>> updates, _ = clip.update(gradients, clip.init(gradients))
        >>> updates["a"], updates["b"]
        (Array([0.6], dtype=float32), Array([0.8], dtype=float32))
    """
    check_not_negative("max_norm", max_norm)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        global_norm: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        norm = global_norm
        if norm is None:
            norm = jnp.sqrt(
                sum(map(sum_of_squares, jax.tree.leaves(updates)), jnp.zeros((), jnp.float32))
            )
        factor = jnp.where(norm <= max_norm, 1, max_norm / norm)
        return jax.tree.map(lambda g: _scaled(g, factor), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def sum_of_squares(gradient: Leaf) -> RealLeaf:
    """Returns the square of a gradient's norm, in float32 or wider."""
    dtype = jnp.promote_types(jnp.finfo(gradient.dtype).dtype, jnp.float32)
    return jnp.sum(jnp.square(jnp.abs(gradient).astype(dtype))).astype(jnp.float32)


def _scaled(gradient: Leaf, factor: jax.Array) -> Leaf:
    with jax.numpy_dtype_promotion("standard"):  # complex leaves meet real scalars
        wide = gradient * factor
    return wide.astype(gradient.dtype)
