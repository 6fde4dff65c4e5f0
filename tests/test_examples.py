"""The examples, run as a user runs them, and those in docstrings."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(command, *more):
    """Runs a script of ours: words of a command line, and more that may have spaces in them."""
    command = [sys.executable, *command.split(), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_mnist_learns_in_two_epochs_and_plots(tmp_path):
    plot = tmp_path / "plots" / "mnist.png"
    finished = run("examples/mnist.py --epochs 2 --output", str(plot))
    assert finished.returncode == 0, finished.stderr
    accuracies = re.findall(r"held-out accuracy (\d+\.\d)%", finished.stdout)
    assert len(accuracies) == 2
    assert float(accuracies[-1]) > 90  # 12 epochs reach 97 and more
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")
    assert plot.stat().st_size > 10_000


@pytest.mark.slow
def test_linen_mnist_learns():
    finished = run("examples/linen_mnist.py --epochs 2")
    assert finished.returncode == 0, finished.stderr
    accuracies = re.findall(r"held-out accuracy (\d+\.\d)%", finished.stdout)
    assert len(accuracies) == 2
    assert float(accuracies[-1]) > 90


SEVEN_BYTES = "--param-dtype bfloat16 --remainder int8 --mu-dtype int8 --nu-dtype int8"


def scalars(logdir):
    """What TensorBoard would read: the value of each name and step."""
    from tensorboardX.proto.event_pb2 import Event  # not there with the oldest versions

    (file,) = logdir.iterdir()
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        # A record is its length in 8 bytes, a checksum in 4, an event, and a checksum in 4.
        end = at + 12 + int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : end])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at = end + 4
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "memory"), [("", 12), (SEVEN_BYTES, 5)])
def test_gpt_learns_and_plots(tmp_path, flags, memory):
    plot = tmp_path / "plots" / "gpt.png"
    tiny = "--steps 100 --layers 1 --width 64 --context 32 --learning-rate 0.01"
    logdir = tmp_path / "logs"
    paths = ["--output", str(plot), "--logdir", str(logdir)]
    finished = run(f"examples/gpt.py {tiny} {flags}", "--prompt", "import ", *paths)
    assert finished.returncode == 0, finished.stderr
    *_, sample_and_summary = finished.stdout.partition("\n\nimport ")
    summary = sample_and_summary.splitlines()[-1]
    # How often each byte occurs, and nothing else, is worth a loss of 3.14.
    loss = float(re.search(r"held-out loss (\d+\.\d+) nats", summary)[1])
    assert loss < 3
    assert float(re.search(r"(\d+\.\d) bytes per parameter", summary)[1]) < memory + 0.5
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")
    assert plot.stat().st_size > 10_000
    logged = scalars(logdir)
    assert logged["loss/training", 100] < logged["loss/training", 10]
    assert abs(logged["loss/held_out", 100] - loss) < 1e-4
    assert 0 < logged["update_rms/blocks/0/dense_in/kernel", 50] < 0.02  # the rate is 0.01
    assert 0 < logged["signal_to_noise", 100] < 2
    assert (("remainder_use", 100) in logged) == bool(flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mnist.py --optimizer sgd", "invalid choice: 'sgd'"),
        ("mnist.py --epochs 0", "--epochs: must be at least 1, got 0"),
        ("mnist.py --learning-rate -1", "--learning-rate: must be positive, got -1.0"),
        ("mnist.py --batch-size 5000", "--batch-size: must be from 1 to 4000, got 5000"),
        ("mnist.py --output /dev/null/mnist.png", "--output: "),
        ("mnist.py --optimizer adamax --nu-dtype int8", "nu_dtype"),
        ("mnist.py --remainder int8", "--remainder: float32 parameters have none, got int8"),
        ("gpt.py --steps 0", "--steps: must be at least 1, got 0"),
        ("gpt.py --width 100", "--width: must be a multiple of 32, got 100"),
        ("gpt.py --temperature 0", "--temperature: must be positive, got 0.0"),
        ("gpt.py --prompt=", "--prompt: must not be empty"),
    ],
)
def test_a_wrong_value_is_one_line(arguments, message):
    finished = run(f"examples/{arguments}")
    assert finished.returncode == 2
    assert message in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
    assert finished.stdout == ""


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["_adam", "_convert", "_master_weights", "_sharding"])
def test_docstrings(name):
    results = doctest.testmod(importlib.import_module(f"adam_jax.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
