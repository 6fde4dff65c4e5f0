"""Checks that the site's search lists the right section first for what users type.

It runs the site's own search in V8: the worker of Material for MkDocs and `search.js` before it, on
the index of the build.
After `uv run --group docs mkdocs build --strict`:

    uv run --group docs docs/check_search.py
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from py_mini_racer import MiniRacer

# What users type, and how the address of the section begins that answers it.
QUERIES = {
    "swap optax in NNX with a mask": "recipes/#swap-optax",
    "resume an optax checkpoint": "recipes/#resume-an-optax-checkpoint",
    "7 bytes": "recipes/#7-bytes",
    "learning rate per subtree NNX": "recipes/#learning-rate-per",
    "freeze": "recipes/#freeze",
    "LoRA": "recipes/#lora",
    "ZeRO-1 default mesh": "recipes/#zero-1",
    "statistics TensorBoard": "recipes/#tensorboard",
    "accumulate gradients": "recipes/#accumulate-gradients",
    "memory of a 7B model": "recipes/#estimate-the-memory",
    "log learning rate": "faq/#how-do-i-log",
    "is eps inside the square root": "faq/#is-eps-inside",
    "frozen parameters move": "faq/#why-do-frozen",
    "cite": "faq/#how-do-i-cite",
    "adamaxw": "api/#adam_jax.adamaxw",
    "load_master_params": "api/#adam_jax.load_master_params",
    "state_shardings": "api/#adam_jax.state_shardings",
}
# What the worker uses of a browser. Its warnings are of queries that it fails on.
BROWSER = """
var self = globalThis, answer, warnings = [];
var console = {warn(text) { warnings.push(String(text)) }};
var addEventListener = (type, listener) => { self.listener = listener };
var postMessage = message => { answer = JSON.stringify(message) };
class Worker {}
Worker.prototype.postMessage = data => listener({data});
"""
SETUP, QUERY = 0, 2  # kinds of messages


def search_of(site: Path) -> Callable[[str], list[list[dict[str, Any]]]]:
    """Returns the search of a built site, which lists the pages for a query, each as sections."""
    (worker,) = (site / "assets" / "javascripts" / "workers").glob("search.*.min.js")
    engine = MiniRacer()
    engine.eval(BROWSER + worker.read_text())
    engine.eval((site / "search.js").read_text())

    def answer(kind: int, data: Any) -> Any:
        message = json.dumps({"type": kind, "data": data})
        engine.eval(f"answer = undefined; new Worker().postMessage({message})")
        warnings = json.loads(str(engine.eval("JSON.stringify(warnings)")))
        if warnings:
            raise ValueError(f"{data}: {warnings}")
        return json.loads(str(engine.eval("answer")))

    index = json.loads((site / "search" / "search_index.json").read_text())
    answer(SETUP, index | {"options": {"suggest": False}})
    return lambda query: answer(QUERY, query)["data"]["items"]


def first(pages: list[list[dict[str, Any]]]) -> str:
    """Returns the address of the section that the search lists first."""
    sections = [found["location"] for found in pages[0]] if pages else [""]
    # A page itself stands above its sections.
    return next((location for location in sections if "#" in location), sections[0])


def main() -> int:
    """Prints what is listed first for each query; returns how many of these are wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", nargs="?", type=Path, default=Path("out") / "site")
    parser.add_argument("--query", help="list what is found for this instead")
    arguments = parser.parse_args()
    search = search_of(arguments.site)
    if arguments.query:
        for page in search(arguments.query):
            print(*(f"{found['score']:8.0f} {found['location']}" for found in page), sep="\n")
        return 0
    wrong = 0
    for query, desired in QUERIES.items():
        found = first(search(query))
        wrong += not found.startswith(desired)
        print(f"{query}: {found}" + ("" if found.startswith(desired) else f", not {desired}"))
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
