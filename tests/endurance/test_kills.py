"""A training run killed at random moments ends as if nothing had happened: see kills.py."""

import shutil

import numpy as np
import pytest

OFF_BY_ONE = """
import runpy

import jax

fold_in = jax.random.fold_in
jax.random.fold_in = lambda key, step: fold_in(key, step + 1)
runpy.run_path({gpt!r}, run_name="__main__")
"""


@pytest.mark.full
def test_two_kills_change_no_bit_and_another_order_of_batches_does(tmp_path):
    import kills  # it needs packages that the tests with the oldest versions lack

    hits, continued_from = kills.train_and_kill(tmp_path, 2, "7 bytes", seed=0)
    assert sum(hits.values()) == 2
    assert continued_from
    arrays, desired = (kills.final(tmp_path / name) for name in ("killed", "whole"))
    assert len(arrays["losses"]) == 300
    assert not kills.differences(arrays, desired)

    # Repeat the last 50 steps with the batches of the steps after them.
    folder, script = tmp_path / "off_by_one", tmp_path / "off_by_one.py"
    shutil.copytree(tmp_path / "whole" / "checkpoints", folder / "checkpoints")
    shutil.rmtree(folder / "checkpoints" / "7-bytes" / "300")
    script.write_text(OFF_BY_ONE.format(gpt=str(kills.GPT)))
    training = kills.Training(folder, 300, "7 bytes", script)
    training.finish()
    assert training.continued_from() == 250
    arrays = kills.final(folder)
    np.testing.assert_array_equal(arrays["losses"][:250], desired["losses"][:250])
    assert (arrays["losses"][250:] != desired["losses"][250:]).all()
    assert {"losses", "held_out", "[0]['embedding']"} <= set(kills.differences(arrays, desired))
