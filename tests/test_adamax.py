"""AdaMax, Algorithm 2 of Kingma and Ba: against float64, its bound, its zeros."""

import numpy as np
import pytest
import reference
from trees import directions, largest_error, normal

import adam_jax

B2 = [0.9, 0.999, 0.99999, 0.9999999]


@pytest.mark.parametrize("b2", B2)
def test_adamax_agrees_with_float64(b2):
    gradients = normal(2000, 400)
    actual, _ = directions(adam_jax.scale_by_adamax(b2=b2), gradients)
    desired = reference.trajectory(gradients, b2=b2, infinity_norm=True)
    # u shrinks by less than its own ulp. A step can be wrong by half an ulp, 2^-24, and always in
    # the same direction, for as long as a maximum lasts: 1 / (1 - b2) steps, or all.
    assert largest_error(actual, desired) < 4e-6 + min(1 / (1 - b2), 2000) * 2.0**-24


# Algorithm 2: AdaMax.


def test_adamax_hardly_steps_farther_than_alpha():
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(1, (3000, 50)).astype(np.float32)
    heavy[:, :10] = np.where(rng.random((3000, 10)) < 0.01, heavy[:, :10], 0)
    steps = np.abs(directions(adam_jax.adamax(0.002), heavy)[0])
    # Gradients that shrink by b2 a step reach the exact bound, b2 (1 - b1) / (b2 - b1) = 1.009.
    # The paper's "alpha" approximates it.
    assert steps.max() <= 0.002 * 0.999 * 0.1 / 0.099 * (1 + 1e-6)


def test_adamax_reaches_its_bound_on_gradients_that_shrink_with_its_memory():
    shrinking = 0.999 ** np.arange(3000.0)[:, None]
    steps = np.abs(directions(adam_jax.scale_by_adamax(eps=0.0), shrinking)[0])
    np.testing.assert_allclose(steps[-1], 0.999 * 0.1 / 0.099, rtol=1e-4)


def test_adamax_without_any_gradient_makes_no_step():
    assert not directions(adam_jax.adamax(0.002, eps=0.0), np.zeros((10, 3), np.float32))[0].any()
