"""Checkpoints from which a killed training run continues and ends with the same bits.

Orbax writes a checkpoint under another name and renames it when all of it is on disk: a process
that dies before that leaves the earlier ones. But Orbax keeps no checksum of arrays, and casts them
without warning to the dtypes that are asked for. So each checkpoint also has a digest of all bits,
and the settings of its run.
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

KEPT = 3  # if the last one is damaged, there are two earlier ones


class CheckpointError(Exception):
    """Names a checkpoint that a run cannot continue from, the reason and the remedy."""


class Checkpoints:
    """Writes the checkpoints of one run in the background; none without a directory.

    Each has the `training`, a tree of arrays, and in JSON its `progress`, whatever else the run
    needs to continue, and the `settings`, which a run must share to continue from it.
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
            self.manager.close()  # waits until all is written

    def save(self, step: int, training: Any, progress: dict[str, Any]) -> None:
        """Copies both before it returns: they may change while the copies are written."""
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
        """Returns the latest checkpoint in arrays like these, or these if there is none.

        Raises:
            CheckpointError: if it is damaged, or belongs to a run with other settings.
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
                    raise ValueError("its numbers differ from those that were saved")
        # The errors of Orbax and of the libraries below it have no type in common.
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint {path} is damaged, or of another program: {reason(error)}. "
                "Delete that directory, and the run "
                + (f"continues from step {before[-1]}." if before else "begins anew.")
            ) from error
        if others:
            raise CheckpointError(
                f"the checkpoint {path} belongs to another run, with {', '.join(others)}. Continue "
                "it with its own settings, or give this run another directory."
            )
        return training, record["progress"]


def digest(training: Any, progress: dict[str, Any]) -> str:
    """Hashes all arrays, their shapes and dtypes, and the progress as JSON."""
    hashed = hashlib.sha256(json.dumps(progress).encode())
    for leaf in map(np.asarray, jax.tree.leaves(training)):
        hashed.update(f"{leaf.dtype}{leaf.shape}".encode())
        hashed.update(leaf.tobytes())
    return hashed.hexdigest()


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Lists the settings that differ, each with both values."""
    names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    return [f"{name} {theirs.get(name)}, not {ours.get(name)}" for name in names]


def reason(error: BaseException) -> str:
    """Returns the first error of a chain, in a few lines at most."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300, placeholder=' ...')}"
