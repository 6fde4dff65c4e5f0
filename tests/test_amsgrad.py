"""AMSGrad against float64, with the maximum taken in either order."""

import jax
import numpy as np
import optax
import pytest
import reference
from trees import directions, largest_error, normal

import adam_jax

B2 = [0.9, 0.999, 0.99999, 0.9999999]


@pytest.mark.parametrize("b2", B2)
@pytest.mark.parametrize("maximum", ["raw", "corrected"])
def test_amsgrad_agrees_with_float64(b2, maximum):
    gradients = normal(2000, 400)
    actual, _ = directions(adam_jax.scale_by_amsgrad(b2=b2, maximum=maximum), gradients)
    desired = reference.trajectory(gradients, b2=b2, amsgrad=maximum)
    assert largest_error(actual, desired) < 4e-6


def test_amsgrad_takes_the_maximum_in_either_order():
    """A first gradient that is larger than the rest tells the two orders apart."""
    gradients = np.ones((50, 1), np.float32)
    gradients[0] = 10
    runs = {
        name: directions(adam_jax.scale_by_amsgrad(maximum=name), gradients)[0]
        for name in ("raw", "corrected")
    }
    with jax.numpy_dtype_promotion("standard"):
        theirs, _ = directions(optax.scale_by_amsgrad(), gradients)
    np.testing.assert_allclose(runs["corrected"], theirs, rtol=2e-5)
    assert runs["raw"][-1] > 2 * runs["corrected"][-1]


def test_an_unknown_maximum_is_refused():
    with pytest.raises(ValueError, match="maximum must be one of 'raw', 'corrected', got 'torch'"):
        adam_jax.amsgrad(0.1, maximum="torch")  # pyright: ignore[reportArgumentType]
