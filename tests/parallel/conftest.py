"""A corpus for runs on test ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from moepp_megatron.data.prepare import PrepareSettings, prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "source.jsonl"
    # More than an epoch of the longest run: the order of an epoch does not depend on how much of it
    # is read.
    texts = [f"Document {i}: " + f"words {i * i} and lines; " * (i % 7 + 1) for i in range(400)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_settings = PrepareSettings(vocab_size=300, workers=1)
    prepare([str(source)], folder / "prepared", prepare_settings, Console(quiet=True))
    return folder / "prepared"
