"""Checkpoints: what optax wrote continues here, what we wrote continues in optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import adam_jax

PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
GRADIENTS = {"kernel": jnp.full((2, 3), 0.3), "bias": jnp.array([1.0, -2.0, 0.0])}
SCHEDULE = optax.linear_schedule(0.1, 0.0, 20)


def steps(optimizer, state, params, n):
    for _ in range(n):
        updates, state = optimizer.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw"])
@pytest.mark.parametrize("direction", ["from optax", "to optax"])
def test_a_checkpoint_changes_hands(name, direction, tmp_path):
    ours, theirs = (getattr(library, name)(SCHEDULE) for library in (adam_jax, optax))
    first, then = (theirs, ours) if direction == "from optax" else (ours, theirs)
    params, state = steps(first, first.init(PARAMS), PARAMS, 5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"params": params, "state": state})
    target = jax.eval_shape(lambda p: {"params": p, "state": then.init(p)}, PARAMS)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), target)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    continued, _ = steps(then, restored["state"], restored["params"], 5)
    whole, _ = steps(theirs, theirs.init(PARAMS), PARAMS, 10)
    for leaf, desired in zip(jax.tree.leaves(continued), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(leaf, desired, rtol=1e-5, atol=1e-5)
