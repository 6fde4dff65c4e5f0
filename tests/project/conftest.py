import runpy
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def as_a_user():
    """JAX as users have it, without the strictness of these tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def end_of(monkeypatch, capsys):
    """Runs a script of ours that ends by itself, in this process, where its imports are loaded.

    Returns its exit code, and what it printed to stdout and to stderr.
    """

    def run(script, *arguments):
        monkeypatch.syspath_prepend((ROOT / script).parent)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as finished:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return finished.value.code, *capsys.readouterr()

    return run
