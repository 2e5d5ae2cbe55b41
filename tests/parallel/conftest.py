"""A corpus for runs on test ranks, and the runs of one process that layouts are held to."""

import json

import pytest

from moepp_megatron.data.prepare import PrepareSettings, prepare
from moepp_megatron.runtime.terminal import Console
from tests.parallel.training_runs import STEPS, assemble, train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "source.jsonl"
    # More than an epoch of the longest run: the order of an epoch does not depend on how much of it
    # is read.
    texts = [f"Document {i}: " + f"words {i * i} and lines; " * (i % 7 + 1) for i in range(400)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_settings = PrepareSettings(vocab_size=300, workers=1)
    prepare([str(source)], folder / "prepared", prepare_settings, Console(quiet=True))
    return folder / "prepared"


@pytest.fixture(scope="session")
def trained(ranks):
    """`trained(size, raw)`: the run of this many ranks with these settings; `how` as `train`."""

    def run(size, raw, steps=STEPS, *args, how=train):
        return assemble(ranks(size).run(how, raw, steps, *args))

    return run


@pytest.fixture(scope="session")
def alone(trained):
    """`alone(raw)`: the run of one process with these settings, made once; not to be changed."""
    runs = {}

    def run(raw, prepare=None, steps=STEPS):
        key = json.dumps([raw, steps, prepare and prepare.__qualname__], sort_keys=True)
        if key not in runs:
            runs[key] = trained(1, raw, steps, prepare)
        return runs[key]

    return run
