"""Kills a training run again and again, and checks that it still reaches the same bits.

    uv run tests/endurance/kills.py
    uv run tests/endurance/kills.py --kills 100 --setting float32 --seed 1

A small GPT (`examples/gpt`) trains undisturbed. Then it trains again, is sent SIGKILL at a
random moment, is started anew and continues from its last checkpoint, until it was killed as often
as asked; after that it may finish. A process has three phases: it starts (imports, restores,
compiles, makes its first steps), it writes a checkpoint, it continues training. A third of the
moments are drawn from each phase. The files that a kill leaves on the disk show which phase it hit.
"""

import argparse
import collections
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

GPT = Path(__file__).parents[2] / "examples" / "gpt"
SAVE_EVERY = 50  # steps, as in examples/gpt
SMALL = "--layers 1 --width 64 --context 32"
SETTINGS = ["7 bytes", "float32"]
LOSSES = ("losses", "held_out")
STARTING = "before a process had begun to write its first checkpoint"
TRAINING = "between checkpoints"
WRITING = "while one was written"


class Training:
    """A process that trains and saves in a folder, where others may have been killed."""

    def __init__(self, folder, steps, setting, script=GPT):
        self.checkpoints = folder / "checkpoints" / setting.replace(" ", "-")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        self.first = self.newest()
        # Held open, or the file system might give their numbers to folders of this process.
        self.held = [os.open(path, os.O_RDONLY) for path in self.checkpoints.glob("*-tmp*")]
        self.left = self.unfinished()
        command = [sys.executable, script, *SMALL.split(), "--setting", setting]
        command += ["--steps", str(steps), "--output", folder / "gpt.png"]
        command += ["--checkpoints", folder / "checkpoints"]
        environment = {
            "JAX_PLATFORMS": "cpu",
            # Later processes reuse what one process has compiled.
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.began = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | environment, stdout=log, stderr=log
            )

    def newest(self):
        """Returns the number of steps at the last checkpoint."""
        names = os.listdir(self.checkpoints)
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def unfinished(self):
        """Returns the folders of unfinished checkpoints, by their numbers on the disk."""
        with os.scandir(self.checkpoints) as entries:
            return {entry.inode() for entry in entries if "-tmp" in entry.name}

    def is_writing(self):
        return not self.unfinished() <= self.left

    def seconds(self):
        return time.monotonic() - self.began

    def wait_until(self, condition):
        """Waits for the condition or the process's end. Returns the seconds since its start."""
        while self.process.poll() is None and not condition():
            time.sleep(0.002)
        return self.seconds()

    def finish(self):
        """Waits for the process to end, and raises if it failed."""
        code = self.process.wait()
        if code or self.continued_from() != self.first:
            raise RuntimeError(f"ended with {code}:\n{self.log.read_text(errors='replace')}")

    def kill(self):
        """Kills the process and returns the phase in which that happened."""
        if self.process.poll() is not None:
            raise RuntimeError(f"ended unkilled:\n{self.log.read_text(errors='replace')}")
        self.process.kill()
        self.process.wait()
        where = TRAINING if self.newest() > self.first else STARTING
        where = WRITING if self.is_writing() else where
        for descriptor in self.held:
            os.close(descriptor)
        return where

    def continued_from(self):
        """Returns the step from which its log reports that it continued, or 0."""
        found = re.search(r"continuing from step (\d+)", self.log.read_text(errors="replace"))
        return int(found[1]) if found else 0


def kill_in_a_phase(training, rng, lasts, ahead):
    """Kills a process at a random moment of one of its phases, given how long each phase lasts.

    Unless that phase is the start, it kills some checkpoints later, fewer than `ahead`.
    """
    phase, began = rng.choice([*lasts]), 0.0
    if phase != STARTING:
        lasts[STARTING] = training.wait_until(training.is_writing)
        step = training.first + SAVE_EVERY * rng.randrange(ahead)
        began = training.wait_until(lambda: training.newest() >= step and training.is_writing())
    moment = began + rng.uniform(0, lasts[phase])
    training.wait_until(lambda: training.seconds() >= moment)
    return training.kill()


def final(folder):
    """Returns the last checkpoint: parameters and state by their paths, and all losses."""
    items = ocp.args.Composite(training=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
    (checkpoints,) = (folder / "checkpoints").iterdir()
    with ocp.CheckpointManager(checkpoints) as manager:
        found = manager.restore(manager.latest_step(), args=items)
    leaves = jax.tree_util.tree_leaves_with_path(found["training"])
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    progress = found["record"]["progress"]
    return arrays | {name: np.array(progress[name]) for name in LOSSES}


def differences(arrays, desired):
    """Returns the names of arrays that are not bit-identical."""

    def bits(found, name):
        return (found[name].dtype, found[name].shape, found[name].tobytes()) if name in found else 0

    names = sorted(arrays.keys() | desired.keys())
    return [name for name in names if bits(arrays, name) != bits(desired, name)]


def train_and_kill(folder, kills, setting, seed):
    """Trains undisturbed in "whole", and in "killed" until that many kills, and then to the end.

    Returns how many kills hit each phase, and the steps from which processes have continued.
    """
    rng = random.Random(seed)
    steps = 2 * SAVE_EVERY * (kills + 1)  # two checkpoints for each process
    training = Training(folder / "whole", steps, setting)
    lasts = {STARTING: training.wait_until(training.is_writing)}
    written = training.wait_until(lambda: not training.is_writing())
    lasts[WRITING] = written - lasts[STARTING]
    training.finish()
    lasts[TRAINING] = (training.seconds() - written) / (steps // SAVE_EVERY - 1)

    hits, continued_from = collections.Counter(), set()
    for left in tqdm(range(kills, -1, -1), unit=" processes", leave=False, disable=None):
        training = Training(folder / "killed", steps, setting)
        if left:
            # The share of the remaining steps for each remaining process.
            ahead = max(1, (steps - training.first) // SAVE_EVERY // (left + 1))
            hits[kill_in_a_phase(training, rng, lasts, ahead)] += 1
        else:
            training.finish()
        continued_from.add(training.continued_from())
    return hits, continued_from - {0}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, metavar="N")
    parser.add_argument("--setting", choices=SETTINGS, default="7 bytes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        hits, continued_from = train_and_kill(folder, args.kills, args.setting, args.seed)
        arrays, desired = final(folder / "killed"), final(folder / "whole")
    print(
        f"killed {args.kills} times in {time.monotonic() - began:.0f} s: "
        + ", ".join(f"{hits[where]} {where}" for where in (STARTING, TRAINING, WRITING))
        + f"; continued from {len(continued_from)} different checkpoints"
    )
    if found := differences(arrays, desired):
        sys.exit(f"not the bits of the undisturbed run: {', '.join(found)}")
    state = [x for name, x in arrays.items() if name not in LOSSES]
    print(
        f"the bits of the undisturbed run: all of parameters and state ({len(state)} arrays, "
        f"{sum(x.nbytes for x in state):,} bytes), the losses of {len(arrays['losses'])} steps, "
        f"{len(arrays['held_out'])} held-out losses"
    )


if __name__ == "__main__":
    main()
