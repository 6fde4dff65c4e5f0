"""The number of processes and devices changes no bit of data-parallel training with ZeRO-1.

Each run executes train_processes.py in separate processes, which jax.distributed connects.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from covering import first

pytestmark = pytest.mark.slow
TIMEOUT = 180  # seconds for one run, which takes about ten


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(directory, optimizer, *, processes, devices, victim=None):
    """Trains until all processes have ended. If one fails, it stops the others.

    Each has `devices` devices, and the victim kills itself before the eighth step. Returns the exit
    codes, None for a process that had to be stopped, and the processes' output.
    """
    directory.mkdir(exist_ok=True)
    script = Path(__file__).with_name("train_processes.py")
    command = [sys.executable, "-W", "error", script, directory, "--optimizer", optimizer]
    command += ["--processes", str(processes), "--port", str(free_port())]
    flags = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    children = []
    logs = [directory / f"process{i}.log" for i in range(processes)]

    def over():
        codes = [child.poll() for child in children]
        return any(codes) or None not in codes

    try:
        for i, log in enumerate(logs):
            more = ["--process", str(i), *(["--dies-at", "7"] if i == victim else [])]
            with log.open("w") as output:
                children.append(
                    subprocess.Popen(
                        [*command, *more], env=os.environ | flags, stdout=output, stderr=output
                    )
                )
        deadline = time.monotonic() + TIMEOUT
        while not over() and time.monotonic() < deadline:
            time.sleep(0.1)
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return codes, "\n".join(f"{log.name}:\n{log.read_text(errors='replace')}" for log in logs)


def train(directory, optimizer, *, processes, devices):
    """Returns each process's results at the end of a run."""
    codes, printed = run(directory, optimizer, processes=processes, devices=devices)
    assert codes == [0] * processes, printed
    results = []
    for i in range(processes):
        with np.load(directory / f"process{i}.npz") as file:
            results.append(dict(file))
    return results


def assert_same_bits(results, desired, *, first=0):
    """Asserts the same parameters, the same state, and the same losses from the first step on."""
    assert results.keys() == desired.keys()
    np.testing.assert_array_equal(results["losses"], desired["losses"][first:])
    for name in results:
        if name.startswith("["):
            np.testing.assert_array_equal(results[name], desired[name], err_msg=name)


@pytest.fixture(scope="module", params=first(1, ["int8", "float32"]))
def optimizer(request):
    return request.param


@pytest.fixture(scope="module")
def alone(optimizer, tmp_path_factory):
    """Returns the results of one process with four devices."""
    directory = tmp_path_factory.mktemp("alone")
    (results,) = train(directory, optimizer, processes=1, devices=4)
    return results


def test_two_processes_train_as_one_does(optimizer, alone, tmp_path):
    both = train(tmp_path, optimizer, processes=2, devices=2)
    for results in both:
        assert_same_bits(results, alone)
        large = [
            name for name in results if name.startswith("['state']") and results[name].size >= 4096
        ]
        # mu, nu and perhaps a remainder, of two leaves.
        assert len(large) == (6 if optimizer == "int8" else 4)
        for name in large:
            assert results[name].itemsize == (1 if optimizer == "int8" else 4)
            np.testing.assert_array_equal(
                results["held of " + name], [results[name].size // 4] * 2, err_msg=name
            )
        kernel = "['params']['kernel']"
        np.testing.assert_array_equal(results["held of " + kernel], [results[kernel].size] * 2)
    assert alone["losses"][-1] < alone["losses"][0]


def test_a_killed_run_continues_on_another_number_of_devices(optimizer, alone, tmp_path):
    # Process 0 coordinates the others, and writes the checkpoint's metadata.
    victim, devices = {"float32": (0, 1), "int8": (1, 8)}[optimizer]
    codes, printed = run(tmp_path, optimizer, processes=2, devices=2, victim=victim)
    assert codes[victim] == -signal.SIGKILL, printed
    assert not list(tmp_path.glob("*.npz"))  # the other process has not finished either
    (results,) = train(tmp_path, optimizer, processes=1, devices=devices)
    # From the later of two checkpoints, after six steps: the seventh is made again.
    assert_same_bits(results, alone, first=6)
