"""Trains any module with any optimizer in Linen's own TrainState."""

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState


def train(model, optimizer, x, y, steps):
    """Fits y by least squares. Returns the parameters before and after, and the losses."""
    params = model.init(jax.random.key(0), x)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    @jax.jit
    def step(state):
        loss = lambda p: jnp.mean((state.apply_fn(p, x) - y) ** 2)  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(steps):
        state, loss = step(state)
        losses.append(loss)
    return params, state.params, losses
