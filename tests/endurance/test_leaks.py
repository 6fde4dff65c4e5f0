"""Nothing grows in three thousand eager steps, and growth on purpose is found.

All optimizers and formats over 10,000 steps: `uv run tests/endurance/leaks.py`.
"""

import jax
import pytest
from leaks import CASES, growth

import adam_jax
from adam_jax import _adam, _transformation


@pytest.mark.full
@pytest.mark.parametrize("name", ["adamw", "seven bytes", "a new one at each step"])
def test_nothing_grows_in_3000_eager_steps(name):
    with jax.numpy_dtype_promotion("standard"):
        grown = growth(*CASES[name], 3000)
    assert grown.compiled == 0
    assert grown.arrays == 0
    assert grown.blocks < 1000  # one object for each step would be 3000


def test_growth_is_found():
    """Kept states add arrays and objects, and a new closure compiles again."""
    adam, kept = adam_jax.adam(1e-2), []

    def keeping(gradients, state, params):
        kept.append(state)
        return adam.update(gradients, state, params)

    grown = growth(lambda _: adam._replace(update=keeping), "float32", 1000, warm_up=1)
    assert grown.arrays >= 3 * 1000
    assert grown.blocks > 1000
    variant = _adam._variant(0.9, 0.999, 1e-8, 0.0, None, None, nesterov=False)

    def with_a_closure(_):
        algorithm = variant.algorithm._replace(direction=lambda g, moments, s: g)
        return _transformation.scale_by(variant._replace(algorithm=algorithm))

    assert growth(with_a_closure, "float32", 5, warm_up=1).compiled == 5
