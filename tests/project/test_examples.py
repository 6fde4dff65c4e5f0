"""The examples, run as a user runs them, and those in docstrings."""

import doctest
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from covering import first

ROOT = Path(__file__).parents[2]


@functools.cache
def cache():
    """A folder in which scripts find what others have compiled, for as long as the tests run."""
    return tempfile.TemporaryDirectory()


def run(command, *more, folder=ROOT):
    """Runs a script: words of a command line, and more with spaces in them. Warnings are errors."""
    compiled_once = {
        "JAX_COMPILATION_CACHE_DIR": cache().name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        [sys.executable, "-W", "error", *command.split(), *more],
        cwd=folder,
        env=os.environ | compiled_once,
        capture_output=True,
        text=True,
        check=False,
    )


def number(pattern, text):
    """The one in the text that the pattern finds and has in parentheses."""
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


FILES = {  # each with options of a short run
    "plain_jax.py": "--steps 300",
    "flax_nnx.py": "--epochs 1",
    "seven_bytes.py": "--epochs 1",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short_and_stands_alone(name):
    text = (ROOT / "examples" / name).read_text()
    assert len(text.splitlines()) <= 100
    imported = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
    assert "adam_jax" in imported
    ours = {path.stem for path in (ROOT / "examples").rglob("*")}
    assert not ours & set(imported)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_learns_to_read_digits(name, tmp_path):
    copied = shutil.copy(ROOT / "examples" / name, tmp_path)
    finished = run(f"{copied} {FILES[name]}", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    # The full runs reach 93.6, 96.8 and 97.0.
    assert number(r"held-out accuracy (\d+\.\d)%", finished.stdout) > 80
    if name == "seven_bytes.py":
        assert number(r"on each device +\S+ MB +(\d\.\d\d)\n", finished.stdout) < 7.2
    else:
        plot = tmp_path / "out" / name.replace(".py", ".png")
        assert plot.read_bytes().startswith(b"\x89PNG\r\n")


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


@pytest.mark.full
def test_linen_mnist_learns():
    finished = run("examples/linen_mnist.py --epochs 2")
    assert finished.returncode == 0, finished.stderr
    accuracies = re.findall(r"held-out accuracy (\d+\.\d)%", finished.stdout)
    assert len(accuracies) == 2
    assert float(accuracies[-1]) > 90


@pytest.mark.slow
def test_embeddings_are_the_same_from_exact_and_dense_steps(tmp_path):
    plot = tmp_path / "plots" / "embeddings.png"
    small = "--rows 1024 --width 8 --batch-size 64 --steps 40"
    finished = run(f"examples/embeddings.py --compare {small} --output", str(plot))
    assert finished.returncode == 0, finished.stderr
    found = re.findall(r"^(lazy|exact|dense) +(\d+\.\d{4})", finished.stdout, re.MULTILINE)
    bits = {mode: float(number) for mode, number in found}
    assert bits.keys() == {"lazy", "exact", "dense"}
    assert bits["exact"] == pytest.approx(bits["dense"], abs=2e-3)
    assert all(number < 6 for number in bits.values())  # from 8; lazy steps are behind at first
    assert plot.stat().st_size > 10_000


SEVEN_BYTES = "--param-dtype bfloat16 --remainder int8 --mu-dtype int8 --nu-dtype int8"


def scalars(logdir):
    """What TensorBoard would read: the value of each name and step."""
    # It is not there with the oldest versions, and has no types.
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

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
@pytest.mark.parametrize(("flags", "memory"), first(1, [(SEVEN_BYTES, 5), ("", 12)]))
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
    loss = number(r"held-out loss (\d+\.\d+) nats", summary)
    assert loss < 3
    assert number(r"(\d+\.\d) bytes per parameter", summary) < memory + 0.5
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")
    assert plot.stat().st_size > 10_000
    logged = scalars(logdir)
    assert logged["loss/training", 100] < logged["loss/training", 10]
    assert abs(logged["loss/held_out", 100] - loss) < 1e-4
    assert 0 < logged["update_rms/blocks/dense_in/kernel", 50] < 0.02  # the rate is 0.01
    assert 0 < logged["signal_to_noise", 100] < 2
    assert (("remainder_use", 100) in logged) == bool(flags)


def losses(stdout):
    """Of each stage, in training and held out."""
    found = re.findall(r"^step .*: training loss (.*), held-out loss (.*)$", stdout, re.MULTILINE)
    return np.array(found, float)


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "tolerance"),
    # Printed with 4 digits. Programs whose matrix products are in bfloat16 differ by up to 0.004.
    [("", 1.01e-4), (SEVEN_BYTES, 0.01)],
)
def test_gpt_releases_gradients_with_the_same_losses(tmp_path, flags, tolerance):
    tiny = "--steps 5 --layers 2 --width 32 --context 32 --learning-rate 0.01"
    command = f"examples/gpt.py {tiny} {flags} --output {tmp_path}/gpt.png"
    plain, released = run(command), run(f"{command} --release")
    assert released.returncode == 0, released.stderr
    gradients = [number(r"gradients (\d\.\d\d)", x.stdout) for x in (plain, released)]
    # Of the parameters 3/4 are in two layers, whose gradients are there one at a time.
    assert 0.4 < gradients[1] / gradients[0] < 0.8
    assert losses(released.stdout).shape == (5, 2)  # of each step
    np.testing.assert_allclose(losses(released.stdout), losses(plain.stdout), 0, tolerance)


def train_and_save(checkpoints, output, more=""):
    tiny = "--steps 100 --layers 1 --width 32 --context 16 --batch-size 4"
    paths = ["--checkpoints", str(checkpoints), "--output", str(output)]
    return run(f"examples/gpt.py {tiny} {more}", *paths)


of_one_run = pytest.mark.xdist_group("gpt")  # which one worker makes, once


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoints of a training, after 50 and 100 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("gpt")
    finished = train_and_save(folder / "checkpoints", folder / "gpt.png")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return folder / "checkpoints", finished.stdout


@pytest.fixture
def checkpoints(saved, tmp_path):
    """A copy of them."""
    return shutil.copytree(saved[0], tmp_path / "checkpoints")


@of_one_run
@pytest.mark.slow
def test_gpt_continues_from_its_last_checkpoint(saved, checkpoints, tmp_path):
    shutil.rmtree(checkpoints / "100")
    finished = train_and_save(checkpoints, tmp_path / "gpt.png")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    lines = finished.stdout.splitlines()
    assert lines[2] == "continuing from step 50"
    assert lines[3].startswith("step    60: ")
    # Losses and what the model writes are those of the whole run; its speed is another one.
    *desired, summary = saved[1].splitlines()
    assert lines[3:-1] == desired[7:]
    assert lines[-1].partition(" nats")[0] == summary.partition(" nats")[0]


@of_one_run
@pytest.mark.slow
def test_gpt_continues_with_release(saved, checkpoints, tmp_path):
    shutil.rmtree(checkpoints / "100")
    finished = train_and_save(checkpoints, tmp_path / "gpt.png", "--release")
    assert finished.returncode == 0, finished.stderr
    assert "continuing from step 50" in finished.stdout
    # Of the stages after step 50; printed with 4 digits.
    np.testing.assert_allclose(losses(finished.stdout), losses(saved[1])[5:], 0, 1.01e-4)


def cut(step):
    largest = max(step.rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def flip_a_bit(step):
    largest = max(step.rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def replace_by_another_program(step):
    shutil.rmtree(step)
    step.mkdir()
    (step / "weights").write_bytes(b"foreign")


@of_one_run
@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, flip_a_bit, replace_by_another_program])
def test_gpt_says_which_checkpoint_is_damaged(damage, checkpoints, tmp_path):
    damage(checkpoints / "100")
    finished = train_and_save(checkpoints, tmp_path / "gpt.png")
    assert finished.returncode == 1
    # Whatever Orbax may print first.
    line = finished.stderr.splitlines()[-1]
    assert f"gpt.py: error: the checkpoint {checkpoints / '100'} is damaged, or" in line
    assert line.endswith("Delete that directory, and the run continues from step 50.")
    assert "step" not in finished.stdout


@of_one_run
@pytest.mark.slow
def test_gpt_refuses_the_checkpoint_of_another_run(checkpoints, tmp_path):
    finished = train_and_save(checkpoints, tmp_path / "gpt.png", "--seed 1 --mu-dtype int8")
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1
    assert f"the checkpoint {checkpoints / '100'} is of another run, with " in finished.stderr
    assert "seed 0 and not 1, mu_dtype float32 and not int8. Continue it with" in finished.stderr
    assert "step" not in finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plain_jax.py --steps 0", "--steps: must be at least 1, got 0"),
        ("flax_nnx.py --epochs 0", "--epochs: must be at least 1, got 0"),
        ("seven_bytes.py --epochs many", "--epochs: invalid int value: 'many'"),
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
        ("gpt.py --checkpoints /dev/null/here", "--checkpoints: "),
        ("gpt.py --release --logdir out", "--release: leaves no updates for the statistics"),
    ],
)
def test_a_wrong_value_is_one_line(arguments, message, end_of):
    script, *arguments = arguments.split()
    code, out, err = end_of(f"examples/{script}", *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "name", ["_adam", "_convert", "_master_weights", "_memory", "_offload", "_sharding"]
)
def test_docstrings(name):
    results = doctest.testmod(importlib.import_module(f"adam_jax.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
