"""The recipes: each snippet runs as it is pasted, does what it promises, is short and is found."""

import importlib
import importlib.util
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser
from torch_stand_in import stand_in_for_torch

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
TEXT = PAGE.read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
SNIPPETS = {
    title: re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    for title, section in SECTIONS.items()
}
each_recipe = pytest.mark.parametrize("title", SECTIONS)


@each_recipe
def test_one_snippet_of_at_most_25_lines(title):
    (snippet,) = SNIPPETS[title]
    lines = snippet.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 100


def losses_in(printed):
    return [float(loss) for loss in re.findall(r"loss (\S+)", printed)]


def scalars_in(folder):
    """The values of each scalar in the only file of TensorBoard's there."""
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    (path,) = Path(folder).iterdir()
    contents, scalars = path.read_bytes(), {}
    while contents:  # length, its checksum, event, its checksum
        (length,) = struct.unpack("<Q", contents[:8])
        for value in event_pb2.Event.FromString(contents[12 : 12 + length]).summary.value:
            scalars.setdefault(value.tag, []).append(value.simple_value)
        contents = contents[16 + length :]
    return scalars


@pytest.mark.usefixtures("as_a_user")
@each_recipe
def test_it_does_what_it_promises(title, tmp_path, monkeypatch, capsys):
    """Runs the snippet by itself, and then the assertions that a comment has for it."""
    for package in ("equinox", "tensorboardX"):
        if package in SECTIONS[title]:
            pytest.importorskip(package)
    if "torch" in SNIPPETS[title][0] and not importlib.util.find_spec("torch"):
        torch = stand_in_for_torch({"weight": (3, 2), "bias": (3,)})
        monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.chdir(tmp_path)  # where snippets write files

    document = Document.parse(str(PAGE), PythonCodeBlockParser())
    start = TEXT.index(f"## {title}\n")
    end = start + len(SECTIONS[title])
    examples = [x for x in document.examples() if start < x.region.start < end]
    shown, assertions = examples
    shown.evaluate()
    document.namespace.update(
        losses_in=losses_in,
        printed=capsys.readouterr().out,
        scalars_in=scalars_in,
        section=SECTIONS[title],
        snippet=SNIPPETS[title][0],
    )
    assert re.search(r"^assert ", assertions.parsed, re.MULTILINE)
    assertions.evaluate()


@pytest.mark.parametrize("title", [x for x in SNIPPETS if "jax.make_mesh" in SNIPPETS[x][0]])
def test_on_one_device_too(title):
    code = SNIPPETS[title][0] + "\nassert mesh.size == 1\n"
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    losses = losses_in(finished.stdout)
    assert losses[-1] < 0.5 * losses[0]


# What users type into the search of the site, and the recipe that they should find.
QUERIES = {
    "swap optax mask": "Swap optax.adamw in Flax NNX, with a mask",
    "mask NNX": "Swap optax.adamw in Flax NNX, with a mask",
    "resume optax checkpoint": "Resume an optax checkpoint",
    "7 bytes": "7 bytes per parameter from a float32 model",
    "cast float32 checkpoint to bfloat16": "7 bytes per parameter from a float32 model",
    "load_master_params": "7 bytes per parameter from a float32 model",
    "7 bytes NNX": "7 bytes in Flax NNX",
    "5 bytes": "5 bytes per parameter: gradient release",
    "gradient release": "5 bytes per parameter: gradient release",
    "freeze layers": "Freeze layers: fine-tune a part of a model",
    "frozen parameters": "Freeze layers: fine-tune a part of a model",
    "fine-tune": "Freeze layers: fine-tune a part of a model",
    "LoRA": "LoRA: train adapters, freeze the base model",
    "adapters": "LoRA: train adapters, freeze the base model",
    "LoRA nnx": "LoRA in Flax NNX",
    "gradient accumulation": "Accumulate gradients over microbatches (gradient accumulation)",
    "accumulate gradients": "Accumulate gradients over microbatches (gradient accumulation)",
    "microbatch": "Accumulate gradients over microbatches (gradient accumulation)",
    "equinox": "Equinox: a training loop",
    "learning rate per layer": "Learning rate per layer or subtree in Flax NNX",
    "learning rate per subtree": "Learning rate per layer or subtree in Flax NNX",
    "layer-wise learning rate": "Learning rate per layer or subtree in Flax NNX",
    "ZeRO-1 default mesh": "ZeRO-1: shard the optimizer state over devices",
    "ZeRO-1": "ZeRO-1: shard the optimizer state over devices",
    "shard optimizer state": "ZeRO-1: shard the optimizer state over devices",
    "data-parallel": "ZeRO-1: shard the optimizer state over devices",
    "FSDP": "FSDP: shard parameters, gradients and state",
    "ZeRO-3": "FSDP: shard parameters, gradients and state",
    "resume": "Resume after a crash (Orbax checkpoint)",
    "orbax checkpoint": "Resume after a crash (Orbax checkpoint)",
    "TensorBoard": "TensorBoard: log statistics of each step with nnx.Optimizer",
    "statistics TensorBoard": "TensorBoard: log statistics of each step with nnx.Optimizer",
    "log statistics": "TensorBoard: log statistics of each step with nnx.Optimizer",
    "hyperparameter sweep": "Hyperparameter sweep with vmap",
    "vmap": "Hyperparameter sweep with vmap",
    "memory of a 7B model": "Estimate the memory that a model needs",
    "memory 7B": "Estimate the memory that a model needs",
    "estimate memory": "Estimate the memory that a model needs",
    "torch": "From torch to JAX and back (PyTorch)",
    "PyTorch": "From torch to JAX and back (PyTorch)",
    "loss spike": "Skip loss spikes and NaN",
    "skip NaN": "Skip loss spikes and NaN",
    "decoupled weight decay": "Weight decay independent of the learning rate",
    "independent weight decay": "Weight decay independent of the learning rate",
    "embedding": "A separate format for the embedding",
}


@pytest.mark.parametrize("query", QUERIES)
def test_it_has_the_words_that_users_type(query):
    """In its title or its sentences, as they are or as the beginning of a word."""
    title = QUERIES[query]
    prose = re.sub(r"^```.*?^```|<!---.*?--->", "", SECTIONS[title], flags=re.DOTALL | re.MULTILINE)
    for word in query.split():
        assert re.search(rf"\b{re.escape(word)}", f"{title}\n{prose}", re.IGNORECASE), word


def test_each_recipe_has_a_query():
    assert set(QUERIES.values()) == set(SECTIONS)
