"""The data: the source of Python's standard library, which every reader has. No download."""

import os
import zlib
from pathlib import Path

import numpy as np


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes of the standard library's modules, and those of every tenth, held out."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    files = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    held_out = files[9::10]
    del files[9::10]
    return np.concatenate(files), np.concatenate(held_out)


def windows(text: np.ndarray, length: int) -> np.ndarray:
    """Cuts a text into rows of equal length and drops what is left."""
    return text[: len(text) // length * length].reshape(-1, length)


def described(text: np.ndarray) -> str:
    """Returns the size and a checksum: each version of Python has a text of its own."""
    return f"{len(text):,} bytes (CRC {zlib.crc32(text.tobytes()):08x})"
