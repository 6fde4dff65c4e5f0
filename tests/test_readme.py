"""The README: its code runs, its commands are those of CI, its links lead to files."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.usefixtures("standard_promotion")
def test_each_block_of_code_makes_an_optimizer_that_trains():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace = {}
    for block, dtype in zip(blocks, (jnp.float32, jnp.bfloat16), strict=True):
        exec(block, namespace)
        optimizer = namespace.pop("optimizer")
        params = {"kernel": jnp.ones((64, 64), dtype)}
        state = optimizer.init(params)

        @jax.jit
        def step(params, state, optimizer=optimizer):
            gradients = jax.grad(lambda p: jnp.sum(jnp.square(p["kernel"])))(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(8):  # of 1e-3: two ulps of a bfloat16 below 1
            params, state = step(params, state)
        assert params["kernel"].dtype == dtype
        assert 0.98 < params["kernel"].mean() < 0.995
    memory = sum(leaf.nbytes for leaf in jax.tree.leaves((params, params, state)))
    assert memory / params["kernel"].size == pytest.approx(7 + 4 / 64, abs=0.01)


def test_commands_are_those_of_ci():
    commands = re.findall(r"^    (pip install uv && .*)$", README, re.MULTILINE)
    assert commands[-1] == "pip install uv && uv run pytest"
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[-1] in ci
    for command in commands:  # the examples run there with fewer steps
        assert any(command.removeprefix("pip install uv && ") in line for line in ci), command


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", README)
    missing = {link for link in links if not link.startswith("https://")}
    missing -= {link for link in missing if (ROOT / link).is_file()}
    assert len(links) > 20
    assert not missing


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_picture_counts_bytes_of_arrays(tmp_path):
    import picture  # with what the examples need
    from quality import SETTINGS, gpt

    totals, outcomes = [], {}
    for name in picture.LOOKS:
        setting = SETTINGS[name]
        parts = picture.bytes_by_part(gpt.parse_arguments(setting.flags.split()), setting)
        totals.append(sum(parts.values()))
        outcomes[name] = picture.Outcome(np.linspace(5, 2, 100), 2.0, parts)
    # Float32; moments of 2 bytes, but for their rows' scales and leaves too small for codes; so
    # with weights, gradients and remainder of 5; all in bfloat16.
    assert totals == [16, pytest.approx(10, abs=0.1), pytest.approx(7, abs=0.1), 8]
    picture.draw(outcomes, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n")
