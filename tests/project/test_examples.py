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


def rows(stdout):
    """The table at the end of what the GPT prints: numbers by setting and column."""
    table = stdout[stdout.index("\nsetting ") :].strip().splitlines()[:-1]
    (_, *columns), *lines = (re.split("  +", line) for line in table)
    return {
        name: dict(zip(columns, (float(x.replace(",", "")) for x in numbers), strict=True))
        for name, *numbers in lines
    }


def check_logs(logdir, row, setting):
    """TensorBoard shows losses that fall, and how steps went where there are updates."""
    logged = scalars(logdir / setting.replace(",", "").replace(" ", "-"))
    assert logged["loss/training", 100] < logged["loss/training", 10]
    assert abs(logged["loss/held_out", 100] - row["held-out loss"]) < 1e-4
    assert (("remainder_use", 100) in logged) == (setting == "7 bytes")
    if setting != "5 bytes":
        assert 0 < logged["update_rms/blocks/dense_in/kernel", 50] < 0.02  # the rate is 0.01
        assert 0 < logged["signal_to_noise", 100] < 2


# How often each byte occurs, and nothing else, is worth a loss of 3.14.
LEARNED = 3


@pytest.mark.slow
def test_gpt_learns_in_one_setting_and_plots(tmp_path):
    plot, logdir = tmp_path / "plots" / "gpt.png", tmp_path / "logs"
    tiny = "--steps 100 --layers 1 --width 64 --context 32 --learning-rate 0.01"
    paths = ["--output", str(plot), "--logdir", str(logdir)]
    finished = run(f"examples/gpt {tiny}", "--setting", "7 bytes", *paths)
    assert finished.returncode == 0, finished.stderr
    assert "The model trained in 7 bytes writes:\n\ndef " in finished.stdout
    ((name, row),) = rows(finished.stdout).items()
    assert name == "7 bytes"
    assert row["held-out loss"] < LEARNED
    assert 7 < row["bytes per parameter"] < 7.5
    check_logs(logdir, row, name)
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")
    assert plot.stat().st_size > 10_000


@pytest.mark.full
def test_gpt_learns_in_few_bytes_as_in_float32(tmp_path):
    tiny = "--steps 100 --layers 2 --width 64 --context 32 --learning-rate 0.01"
    paths = ["--output", str(tmp_path / "gpt.png"), "--logdir", str(tmp_path / "logs")]
    finished = run(f"examples/gpt {tiny}", *paths)
    assert finished.returncode == 0, finished.stderr
    found = rows(finished.stdout)
    assert [*found] == ["float32", "optax.adamw, all bfloat16", "7 bytes", "5 bytes"]
    float32, _, seven, five = found.values()
    assert float32["bytes per parameter"] == 16
    # All but a sixth of the parameters are in two layers, whose gradients are there one at a time.
    assert 0.5 < five["gradients"] / seven["gradients"] < 0.7
    for name, row in found.items():
        assert row["held-out loss"] < LEARNED
        parts = [row[x] for x in ("weights", "gradients", "mu", "nu", "scales", "remainder")]
        assert sum(parts) == pytest.approx(row["bytes per parameter"], abs=0.03)
        check_logs(tmp_path / "logs", row, name)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_figure_says_what_was_found(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "gpt")
    import plot
    import train
    from experiment import Experiment
    from precision import ALL_BFLOAT16, DEFAULT, SETTINGS

    usages = {name: train.memory(Experiment(), SETTINGS[name]) for name in DEFAULT}
    totals = {name: usage.total / usage.size for name, usage in usages.items()}
    # Leaves of less than 4096 elements have float32 moments. Of the parameters, 0.05 of 0.64
    # million are in no layer, and three layers share the others.
    gradients = 2 * (0.08 + 0.92 / 3)
    assert [*totals.values()] == pytest.approx([16, 8, 7.1, 5.1 + gradients], abs=0.05)
    for name, usage in usages.items():
        assert sum(plot.bytes_by_part(usage).values()) == pytest.approx(totals[name], abs=1e-3)
    assert plot.memory_message(totals) == "7.1 and 5.9 bytes per parameter instead of 16.0"
    assert plot.memory_message({"7 bytes": 7.1}) == "Memory"

    ends = {"float32": 1.80, ALL_BFLOAT16: 1.84, "7 bytes": 1.79, "5 bytes": 1.81}
    same, behind = "7 bytes and 5 bytes learn as float32 does", "all bfloat16 falls behind"
    assert plot.message(ends) == f"{same};\n{behind}"
    assert plot.message({"float32": 1.8, "7 bytes": 1.7}) == "7 bytes end below float32"
    assert plot.message({"float32": 1.8}) == plot.message({"7 bytes": 1.8}) == "Training loss"


def losses(stdout):
    """Of each stage, in training and held out."""
    found = re.findall(r"^step .*: training loss (.*), held-out loss (.*)$", stdout, re.MULTILINE)
    return np.array(found, float)


@pytest.mark.full
@pytest.mark.parametrize(
    ("plain", "released", "tolerance"),
    # Printed with 4 digits. Programs whose matrix products are in bfloat16 differ by up to 0.004.
    [("float32", "float32, released", 1.01e-4), ("7 bytes", "5 bytes", 0.01)],
)
def test_gpt_releases_gradients_with_the_same_losses(tmp_path, plain, released, tolerance):
    tiny = "--steps 5 --layers 2 --width 32 --context 32 --learning-rate 0.01"
    settings = ["--setting", plain, "--setting", released]
    finished = run(f"examples/gpt {tiny} --output {tmp_path}/gpt.png", *settings)
    assert finished.returncode == 0, finished.stderr
    gradients = [row["gradients"] for row in rows(finished.stdout).values()]
    # Of the parameters 3/4 are in two layers, whose gradients are there one at a time.
    assert 0.4 < gradients[1] / gradients[0] < 0.8
    found = losses(finished.stdout)
    assert found.shape == (10, 2)  # of each step
    np.testing.assert_allclose(found[5:], found[:5], 0, tolerance)


def train_and_save(checkpoints, output, more=""):
    tiny = "--setting float32 --steps 100 --layers 1 --width 32 --context 16 --batch-size 4"
    paths = ["--checkpoints", str(checkpoints), "--output", str(output)]
    return run(f"examples/gpt {tiny} {more}", *paths)


of_one_run = pytest.mark.xdist_group("gpt")  # which one worker makes, once


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoints of a training run, after 50 and 100 steps, and what it printed."""
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
    shutil.rmtree(checkpoints / "float32" / "100")
    finished = train_and_save(checkpoints, tmp_path / "gpt.png")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    lines = finished.stdout.splitlines()
    assert lines[3] == "continuing from step 50"
    assert lines[4].startswith("step    60: ")
    # The losses and the sample are those of the whole run; the speed may differ.
    *desired, desired_row, _ = saved[1].splitlines()
    *actual, actual_row, _ = lines[4:]
    assert actual == desired[8:]
    assert actual_row.rpartition("  ")[0].split() == desired_row.rpartition("  ")[0].split()


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
def test_gpt_names_a_damaged_checkpoint(damage, checkpoints, tmp_path):
    damage(checkpoints / "float32" / "100")
    finished = train_and_save(checkpoints, tmp_path / "gpt.png")
    assert finished.returncode == 1
    # Whatever Orbax may print first.
    line = finished.stderr.splitlines()[-1]
    assert f"gpt: error: the checkpoint {checkpoints / 'float32' / '100'} is damaged, or" in line
    assert line.endswith("Delete that directory, and the run continues from step 50.")
    assert "step" not in finished.stdout


@of_one_run
@pytest.mark.slow
def test_gpt_refuses_the_checkpoint_of_another_run(checkpoints, tmp_path):
    finished = train_and_save(checkpoints, tmp_path / "gpt.png", "--seed 1 --variant adam")
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1
    assert (
        f"the checkpoint {checkpoints / 'float32' / '100'} belongs to another run, with "
        in finished.stderr
    )
    assert "variant adamw, not adam, seed 0, not 1. Continue it with" in finished.stderr
    assert "step" not in finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plain_jax.py --steps 0", "--steps: must be at least 1, got 0"),
        ("flax_nnx.py --epochs 0", "--epochs: must be at least 1, got 0"),
        ("seven_bytes.py --epochs many", "--epochs: invalid int value: 'many'"),
        ("embeddings.py --rows 0", "--rows: must be positive, got 0"),
        ("embeddings.py --output /dev/null/it.png", "--output: "),
        ("gpt --setting float64", "--setting: invalid choice: 'float64'"),
        ("gpt --variant adamax", "--variant: invalid choice: 'adamax'"),
        ("gpt --steps 0", "--steps: must be at least 1, got 0"),
        ("gpt --width 100", "--width: must be a multiple of 32, got 100"),
        ("gpt --learning-rate -1", "--learning-rate: must be positive, got -1.0"),
        ("gpt --seed -1", "--seed: must be from 0 to 2^32 - 1, got -1"),
        ("gpt --checkpoints /dev/null/here", "--checkpoints: "),
        ("gpt --output gpt.pdf", "--output: must end in .png, got gpt.pdf"),
        ("gpt --output /dev/null/gpt.png", "--output: "),
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
    "name",
    [
        "_accumulation",
        "_adam",
        "_adamax",
        "_amsgrad",
        "_averaging",
        "_clipping",
        "_convert",
        "_landing",
        "_master_weights",
        "_memory",
        "_offload",
        "_release",
        "_row_sparse",
        "_sharding",
        "_statistics",
        "_torch",
    ],
)
def test_docstrings(name):
    results = doctest.testmod(importlib.import_module(f"adam_jax.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
