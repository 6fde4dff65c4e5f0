"""Checkpoints from which a training goes on to the same bits, at whatever moment it was killed.

Orbax writes a checkpoint beside the others and gives it its name, the number of steps, when all of
it is on disk: a process that dies meanwhile leaves the ones before. But arrays have no checksum
there, and are cast without a word to the dtypes that they are asked for in. So a digest of all bits
is kept with each checkpoint, and so are the settings of the run that it belongs to.
"""

import copy
import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

KEPT = 3  # should the last one be damaged, there are those before


class CheckpointError(Exception):
    """Says which checkpoint a run cannot continue from, why, and what to do about it."""


class Checkpoints:
    """The last checkpoints of one run, written in the background; none without a directory.

    Of each there is the `training`, a tree of arrays; and in JSON its `progress`, whatever else
    there is to go on with, and the `settings`, which have to be the same when it is continued.
    """

    def __init__(self, directory: Path | None, settings: dict[str, Any]):
        self.settings, self.manager = settings, None
        if directory:
            options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
            self.manager = ocp.CheckpointManager(directory.resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if self.manager:
            self.manager.close()  # waits for what is being written

    def save(self, step: int, training: Any, progress: dict[str, Any]) -> None:
        """Both have been copied when this returns, and may change while they are written."""
        if self.manager:
            record = {
                "settings": self.settings,
                "progress": copy.deepcopy(progress),
                "digest": digest(training, progress),
            }
            arguments = ocp.args.Composite(
                training=ocp.args.StandardSave(training), record=ocp.args.JsonSave(record)
            )
            self.manager.save(step, args=arguments)

    def latest(self, training: Any, progress: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The latest training, in arrays like these, and its progress; these, if there is none.

        Raises:
            CheckpointError: if it is damaged, or not one of a run with these settings.
        """
        steps = sorted(self.manager.all_steps()) if self.manager else []
        if not self.manager or not steps:
            return training, progress
        *before, step = steps
        path = self.manager.directory / str(step)
        try:
            items = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = self.manager.restore(step, args=items)["record"]
            others = differences(record["settings"], self.settings)
            if not others:
                items = ocp.args.Composite(training=ocp.args.StandardRestore(training))
                training = self.manager.restore(step, args=items)["training"]
                if digest(training, record["progress"]) != record["digest"]:
                    raise ValueError("its numbers are not those that were saved")
        # Orbax and what it reads with have no type of error that they share.
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint {path} is damaged, or not one of this program: {reason(error)}. "
                "Delete that directory, and the run "
                + (f"continues from step {before[-1]}." if before else "begins anew.")
            ) from error
        if others:
            raise CheckpointError(
                f"the checkpoint {path} is of another run, with {', '.join(others)}. Continue it "
                "with its own settings, or give this run a directory of its own."
            )
        return training, record["progress"]


def digest(training: Any, progress: dict[str, Any]) -> str:
    """Of all arrays with their shapes and dtypes, and of the progress as JSON has it."""
    hashed = hashlib.sha256(json.dumps(progress).encode())
    for leaf in map(np.asarray, jax.tree.leaves(training)):
        hashed.update(f"{leaf.dtype}{leaf.shape}".encode())
        hashed.update(leaf.tobytes())
    return hashed.hexdigest()


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The settings that are not the same, each with both values."""
    names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    return [f"{name} {theirs.get(name)} and not {ours.get(name)}" for name in names]


def reason(error: BaseException) -> str:
    """What first went wrong, in a few lines at most."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300, placeholder=' ...')}"
