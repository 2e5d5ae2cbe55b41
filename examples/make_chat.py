#!/usr/bin/env python3
"""Writes conversations about Python's library, in the form that `moepp data prepare --chat` reads.

    .venv/bin/python examples/make_chat.py data/chat.jsonl [CONVERSATIONS]

Each line is one conversation, `{"messages": [{"role": "user", "content": "..."}, ...]}`.
"""

import contextlib
import importlib
import inspect
import json
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

# They open a window or a browser, print, or are whole programs.
_LEFT_OUT = {"antigravity", "idlelib", "this", "tkinter", "turtle", "turtledemo"}


def names() -> Iterator[tuple[str, str, bool]]:
    """Name, module and whether it is a class, of what the library's modules say is public."""
    for module_name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        if module_name.startswith("_"):
            continue
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(module_name)
            for name in sorted(getattr(module, "__all__", ())):
                value = getattr(module, name, None)
                if callable(value):
                    yield name, module_name, inspect.isclass(value)


def conversation(name: str, module: str, is_class: bool, random_numbers: random.Random) -> list:
    """A question and its answer; every other time one more of each."""
    question = random_numbers.choice(
        [f"In which module is {name}?", f"Where is {name}?", f"What do I import to use {name}?"]
    )
    turns = [("user", question), ("assistant", f"{name} is in the module {module}.")]
    if random_numbers.random() < 0.5:
        kind = "class" if is_class else "function"
        turns += [("user", "Is it a class or a function?"), ("assistant", f"{name} is a {kind}.")]
    return [{"role": role, "content": content} for role, content in turns]


def main() -> None:
    """Write the file."""
    path = Path(sys.argv[1])
    numbers = random.Random(1234)
    found = list(names())
    numbers.shuffle(found)
    chosen = found[: int(sys.argv[2])] if len(sys.argv) > 2 else found
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for name, module, is_class in chosen:
            messages = conversation(name, module, is_class, numbers)
            file.write(json.dumps({"messages": messages}) + "\n")
    print(f"{path}: {len(chosen)} conversations")


if __name__ == "__main__":
    main()
