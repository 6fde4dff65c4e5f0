"""Kills a training again and again, and says whether it came to the same bits all the same.

    uv run tests/endurance/kills.py
    uv run tests/endurance/kills.py --kills 100 --setting float32 --seed 1

A small GPT (`examples/gpt`) trains undisturbed. Then it trains again, is sent SIGKILL at a
random moment, is started anew and continues from its last checkpoint, until it was killed as often
as asked; after that it may come to its end. What a process does falls into three parts: it starts
(imports, restores, compiles, makes its first steps), it writes a checkpoint, it trains on. A third
of the moments are drawn from the time of each. Where a kill has hit is told by what it left on the
disk.
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
    """One process that trains and saves in a folder, in which others may have been killed."""

    def __init__(self, folder, steps, setting, script=GPT):
        self.checkpoints = folder / "checkpoints" / setting.replace(" ", "-")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        self.first = self.newest()
        # Held open, lest the file system gives their numbers to folders of this process.
        self.held = [os.open(path, os.O_RDONLY) for path in self.checkpoints.glob("*-tmp*")]
        self.left = self.unfinished()
        command = [sys.executable, script, *SMALL.split(), "--setting", setting]
        command += ["--steps", str(steps), "--output", folder / "gpt.png"]
        command += ["--checkpoints", folder / "checkpoints"]
        environment = {
            "JAX_PLATFORMS": "cpu",
            # What one process has compiled the next one need not.
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.began = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | environment, stdout=log, stderr=log
            )

    def newest(self):
        """The number of steps after which the last checkpoint was written."""
        names = os.listdir(self.checkpoints)
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def unfinished(self):
        """The folders of checkpoints that are not finished, by their numbers on the disk."""
        with os.scandir(self.checkpoints) as entries:
            return {entry.inode() for entry in entries if "-tmp" in entry.name}

    def is_writing(self):
        return not self.unfinished() <= self.left

    def seconds(self):
        return time.monotonic() - self.began

    def wait_until(self, condition):
        """Waits for it, or for the end of the process; returns the seconds since its start."""
        while self.process.poll() is None and not condition():
            time.sleep(0.002)
        return self.seconds()

    def finish(self):
        """Waits for the end, which has to be a good one."""
        code = self.process.wait()
        if code or self.continued_from() != self.first:
            raise RuntimeError(f"ended with {code}:\n{self.log.read_text(errors='replace')}")

    def kill(self):
        """Kills the process and says where that has hit."""
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
        """The step that it says to have continued from, if it has come to that."""
        said = re.search(r"continuing from step (\d+)", self.log.read_text(errors="replace"))
        return int(said[1]) if said else 0


def kill_at_random(training, rng, lasts, ahead):
    """Kills a training at a moment of what a process does, given how long each of it lasts.

    If that is not its start, then some checkpoints later, fewer than `ahead`.
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
    """The last checkpoint: parameters and state by their paths, and all losses."""
    items = ocp.args.Composite(training=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
    (checkpoints,) = (folder / "checkpoints").iterdir()
    with ocp.CheckpointManager(checkpoints) as manager:
        found = manager.restore(manager.latest_step(), args=items)
    leaves = jax.tree_util.tree_leaves_with_path(found["training"])
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    progress = found["record"]["progress"]
    return arrays | {name: np.array(progress[name]) for name in LOSSES}


def differences(arrays, desired):
    """The names of what is not the same to the bit."""

    def bits(found, name):
        return (found[name].dtype, found[name].shape, found[name].tobytes()) if name in found else 0

    names = sorted(arrays.keys() | desired.keys())
    return [name for name in names if bits(arrays, name) != bits(desired, name)]


def train_and_kill(folder, kills, setting, seed):
    """Trains undisturbed in "whole", and in "killed" until it was killed so often and ended.

    Returns how many kills hit where, and the steps that trainings have continued from.
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
            # Of what is there to do, the part of each process that is left.
            ahead = max(1, (steps - training.first) // SAVE_EVERY // (left + 1))
            hits[kill_at_random(training, rng, lasts, ahead)] += 1
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
