"""Folders whose tokens say where they come from: each source's documents are of one letter."""

import json

import numpy as np

from moepp_megatron.data.prepare import PrepareSettings, prepare
from moepp_megatron.runtime.terminal import Console

# Without merges: a token is a letter.
SETTINGS = PrepareSettings(vocab_size=257, workers=1)


def write_letters(path, letter, documents=60, seed=1):
    """A JSONL file of documents that repeat a letter, each behind numbers of its own."""
    lengths = np.random.RandomState(seed).randint(1, 40, documents)
    texts = [f"{number * 7919}{letter * int(n)}{n}" for number, n in enumerate(lengths)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines))
    return path


def prepare_letters(folder, name, **letters):
    """A prepared folder `name` with a data source for each keyword."""
    given = [
        f"{source}={write_letters(folder / f'{name}-{source}.jsonl', letter)}"
        for source, letter in letters.items()
    ]
    prepare(given, folder / name, SETTINGS, Console(quiet=True))
    return folder / name
