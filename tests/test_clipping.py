"""Clipping by the norm of all gradients, and transformations of single layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_close, random_tree, untyped

import adam_jax


def test_per_layer_transforms_each_layer_by_itself():
    gradients = random_tree({"a": (3, 4), "b": (3, 2, 5)})
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9))
    outer = adam_jax.per_layer(inner)
    state = outer.init(gradients)
    for _ in range(2):
        updates, state = outer.update(gradients, state)
    for i in range(3):
        layer = jax.tree.map(lambda x, i=i: x[i], gradients)
        inner_state = inner.init(layer)
        for _ in range(2):
            expected, inner_state = inner.update(layer, inner_state)
        assert_close(jax.tree.map(lambda x, i=i: x[i], updates), expected, 1e-6)
        assert_close(jax.tree.map(lambda x, i=i: x[i], state), inner_state, 1e-6)


def test_per_layer_accepts_parameters_extra_arguments_and_empty_trees():
    decay = adam_jax.per_layer(optax.add_decayed_weights(0.5))
    params = {"w": jnp.ones((2, 3))}
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    np.testing.assert_array_equal(untyped(updates)["w"], 0.5)
    clip = adam_jax.per_layer(adam_jax.clip_by_global_norm(1.0))
    updates, _ = clip.update(params, clip.init(params), global_norm=jnp.float32(2))
    np.testing.assert_array_equal(untyped(updates)["w"], 0.5)
    assert decay.update({}, decay.init({}), {})[0] == {}


def test_per_layer_refuses_leaves_that_are_not_stacked_alike():
    clip = adam_jax.per_layer(optax.clip_by_global_norm(1.0))
    with pytest.raises(ValueError, match=r"scalar \['b'\]"):
        clip.init({"a": jnp.ones(3), "b": jnp.ones(())})
    with pytest.raises(ValueError, match=r"\['a'\] with 3 layers and \['b'\] with 4"):
        clip.init({"a": jnp.ones(3), "b": jnp.ones((4, 2))})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clip_by_global_norm_agrees_with_optax(dtype, max_norm, standard_promotion):
    gradients = {"a": random_tree({"": (5, 3)})[""].astype(dtype), "b": jnp.ones(4, dtype)}
    ours = adam_jax.clip_by_global_norm(max_norm)
    clipped, _ = ours.update(gradients, ours.init(gradients))
    theirs = optax.clip_by_global_norm(max_norm)
    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(dtype, jnp.float32)), gradients)
    expected, _ = theirs.update(wide, theirs.init(wide))
    assert jax.tree.map(lambda x: x.dtype, clipped) == jax.tree.map(lambda x: x.dtype, gradients)
    assert_close(clipped, expected, 1e-2 if dtype == "bfloat16" else 1e-6)
    with pytest.raises(ValueError, match="max_norm"):
        adam_jax.clip_by_global_norm(-1.0)
