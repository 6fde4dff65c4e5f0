"""The examples, run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_mnist_learns_in_two_epochs_and_plots(tmp_path):
    plot = tmp_path / "plots" / "mnist.png"
    finished = run("examples/mnist.py", "--epochs", "2", "--output", str(plot))
    assert finished.returncode == 0, finished.stderr
    accuracies = re.findall(r"held-out accuracy (\d+\.\d)%", finished.stdout)
    assert len(accuracies) == 2
    assert float(accuracies[-1]) > 90  # 12 epochs reach 97 and more
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")
    assert plot.stat().st_size > 10_000


@pytest.mark.slow
def test_linen_mnist_learns():
    finished = run("examples/linen_mnist.py", "--epochs", "2")
    assert finished.returncode == 0, finished.stderr
    accuracies = re.findall(r"held-out accuracy (\d+\.\d)%", finished.stdout)
    assert len(accuracies) == 2
    assert float(accuracies[-1]) > 90


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--learning-rate", "-1"], "--learning-rate: must be positive, got -1.0"),
        (["--batch-size", "5000"], "--batch-size: must be from 1 to 4000, got 5000"),
        (["--output", "/dev/null/mnist.png"], "--output: "),
    ],
)
def test_a_wrong_value_is_one_line(arguments, message):
    finished = run("examples/mnist.py", *arguments)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
    assert finished.stdout == ""
