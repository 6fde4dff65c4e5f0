"""Trains a small GPT on Python's source code: in float32, in 7 bytes per parameter and in 5.

    uv run examples/gpt
    uv run examples/gpt --setting "7 bytes" --steps 2000
    uv run examples/gpt --checkpoints out/checkpoints
    uv run examples/gpt --logdir out/logs
    uv run --with tensorboard tensorboard --logdir out/logs

The first command trains in four settings, all on the same data in the same order, prints what each
one learned and what it stores, and draws both. It takes eight minutes on two CPU cores. The
third one saves every 50 steps and, given again, continues: a run that was killed, at any moment and
however often, ends with the same bits as one that was not.

`5 bytes` takes 5.9 here: the gradients of one layer of three count, and those of the embedding.
The more layers, the fewer: with the sizes of GPT-2, twelve layers, it takes 5.75.

The text is the source of Python's standard library, byte by byte; every tenth file is held out.
Losses compare between runs under one version of Python, since each version has its own text.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
from checkpoints import CheckpointError
from experiment import add_options, experiment_of
from model import sample
from plot import bytes_by_part, draw, final_loss
from precision import DEFAULT, SETTINGS
from text import load_text
from train import Result, memory, train

import adam_jax

PROMPT = b"def "


class Parser(argparse.ArgumentParser):
    """Reports a wrong command in one line, without argparse's summary of usage."""

    def error(self, message: str) -> NoReturn:
        """Prints `message` and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def folder(text: str) -> Path:
    """Parses the name of a folder and creates it if it is missing."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write in {path}")
    return path


def png(text: str) -> Path:
    """Parses the name of a PNG file and creates its folder if it is missing."""
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {path}")
    folder(str(path.parent))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"is a folder: {path}")
    return path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line: a mistake shows now, not after training."""
    parser = Parser(prog="gpt", description="Train a small GPT on Python's source code.")
    names = ", ".join(f'"{name}"' for name in SETTINGS)
    parser.add_argument(
        "--setting",
        action="append",
        choices=SETTINGS,
        metavar="NAME",
        help=f"train in this one only, may be repeated: {names}",
    )
    add_options(parser)
    add = parser.add_argument
    add("--checkpoints", type=folder, metavar="DIR", help="to save in, and to continue from")
    add("--logdir", type=folder, metavar="DIR", help="for TensorBoard: losses and statistics")
    add("--output", type=png, default="out/gpt.png", metavar="PNG", help="default: %(default)s")
    return parser.parse_args(arguments)


def table(results: dict[str, Result], usages: dict[str, adam_jax.MemoryUsage]) -> str:
    """Writes a line for each setting: loss, bytes per parameter by part, and speed."""
    rows = [["setting", "held-out loss", *bytes_by_part(next(iter(usages.values())))]]
    rows[0] += ["bytes per parameter", "tokens/s"]
    for name, result in results.items():
        parts = bytes_by_part(usages[name]).values()
        total = usages[name].total / usages[name].size
        numbers = [f"{final_loss(result):.4f}", *(f"{part:.2f}" for part in (*parts, total))]
        rows.append([name, *numbers, f"{result.speed:,.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for first, *cells in rows
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains in each setting, compares them and lets the last model write."""
    args = parse_arguments(arguments)
    experiment, text = experiment_of(args), load_text()
    print(
        f"Python {platform.python_version()}'s standard library: {len(text[0]):,} bytes, "
        f"and {len(text[1]):,} held out"
    )
    results: dict[str, Result] = {}
    usages: dict[str, adam_jax.MemoryUsage] = {}
    for name in dict.fromkeys(args.setting or DEFAULT):
        setting = SETTINGS[name]
        usages[name] = usage = memory(experiment, setting)
        print(
            f"\n{name}: {usage.size:,} parameters, {usage.total / usage.size:.2f} bytes each",
            flush=True,
        )
        directory = name.replace(",", "").replace(" ", "-")
        saves, logs = (path and path / directory for path in (args.checkpoints, args.logdir))
        results[name] = train(experiment, setting, text, saves, logs)
        jax.clear_caches()
    draw(results, usages, args.output)
    *_, (name, result) = results.items()
    written = sample(result.model, PROMPT, experiment.context, experiment.seed)
    print(f"\nThe model trained in {name} writes:\n\n{written.decode(errors='replace')}\n")
    print(table(results, usages))
    print(f"figure: {args.output}")


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        # The last thing that is seen: when Orbax cannot read one array it goes on reading others,
        # in a loop that it has closed, and each ends with tracebacks, hundreds of lines in all.
        with open(os.dup(sys.stderr.fileno()), "w") as terminal, open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
            print(f"gpt: error: {error}", file=terminal)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as the shell reports a program that Ctrl-C ended
