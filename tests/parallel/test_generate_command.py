"""`moepp generate` as a command, on a checkpoint of a run whose data are gone."""

import json
import shutil

import numpy as np
import pytest

from moepp_megatron.data.prepare import PrepareSettings, prepare
from moepp_megatron.interop.generate import GenerateRequest
from moepp_megatron.runtime.terminal import Console
from tests.commands import moepp, succeeded
from tests.parallel.checkpoint_runs import run_trainer, trainer_settings
from tests.parallel.planted_pickles import STATEFUL, plant
from tests.refusals import config_error

EOD = "<end of it>"
LENGTH = 64


@pytest.fixture(scope="module")
def checkpoint(ranks, corpus, tmp_path_factory):
    """Of a run on data whose end-of-document token nobody else has, and that are gone since."""
    folder = tmp_path_factory.mktemp("own-eod")
    text = (corpus / "tokenizer.json").read_text()
    (folder / "own.json").write_text(text.replace("<|endoftext|>", EOD))
    (folder / "source.jsonl").write_text(
        "".join(json.dumps({"text": f"Document {i}: " + "words " * 30}) + "\n" for i in range(200))
    )
    own = PrepareSettings(tokenizer=folder / "own.json", eod_token=EOD, workers=1)
    source = str(folder / "source.jsonl")
    prepare([source], folder / "data", own, Console(quiet=True))
    raw = trainer_settings(
        folder / "data",
        folder / "run",
        model={"seq_length": LENGTH, "num_layers": 4},
        training={"train_iters": 2, "micro_batch_size": 8},
        optimizer={"warmup_iters": 0},
        checkpoint={"save_interval": 2},
    )
    ranks(1).run(run_trainer, raw)
    shutil.rmtree(folder / "data")
    return folder / "run/checkpoints/step_00000002"


def test_same_text_in_every_layout(checkpoint):
    prompts = ["--prompt", "Document 7", "--prompt", "-- words"]
    drawn = ["--seed", 5, "--temperature", 1.5, "--top-p", 0.9, "--max-new-tokens", 12]
    alone = succeeded(moepp("generate", checkpoint.parent.parent, *prompts, *drawn))
    tp2 = "parallel.tensor_model_parallel_size=2"
    split = moepp("generate", checkpoint, tp2, "--nproc", 2, *prompts, *drawn)
    # megatron-core warns of what its tensor parallelism does not find in the environment.
    assert (split.returncode, split.stderr) == (0, "")
    assert split.stdout == alone.stdout
    first, second = alone.stdout.split("\n\n-- words")
    assert first.startswith("Document 7")
    assert len(first) > len("Document 7")
    assert len(second) > 0


def test_end_of_document_is_that_of_the_run(checkpoint):
    request = GenerateRequest.read(checkpoint, ["Document"])
    assert request.tokenizer.eod_token == EOD
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert config == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("generate", ".metadata"),
        ("generate", "__0_0.distcp"),
        ("score", "__0_0.distcp"),
        # What runs code only when the same bytes are read for the second time.
        ("generate", STATEFUL),
        ("score", STATEFUL),
        ("inspect", STATEFUL),
        ("convert", STATEFUL),
    ],
)
def test_planted_pickle_is_refused_and_not_executed(checkpoint, tmp_path, command, name):
    planted, exploded = tmp_path / "planted", tmp_path / "exploded"
    shutil.copytree(checkpoint, planted)
    plant(planted, name, exploded)
    np.savez(tmp_path / "tokens.npz", input_ids=np.ones((1, 8), int))
    (tmp_path / "text.txt").write_text("Document 7: words")
    arguments = {
        "generate": [planted, "--prompt", "Document"],
        "score": [planted, "--tokens", tmp_path / "tokens.npz", "--out", tmp_path / "out.npz"],
        "inspect": [planted, "--text", tmp_path / "text.txt", "--out", tmp_path / "out.html"],
        "convert": ["mcore-to-hf", planted, tmp_path / "hf"],
    }
    done = moepp(command, *arguments[command])
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    what = "changes what it did not make" if name == STATEFUL else "which no checkpoint contains"
    assert what in line
    assert "Traceback" not in done.stderr
    assert not exploded.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompts": [""]}, r"--prompt \(0 tokens\) must have between 1 and 63 tokens"),
        ({"prompts": ["ok", "x\n" * 64]}, r"tokens\) must have between 1 and 63 tokens"),
        ({"prompts": ["\udcff"]}, "must be UTF-8 text"),
        ({"max_new_tokens": 64}, r"--max-new-tokens \(64\) must be between 1 and 6\d: the longest"),
        ({"max_new_tokens": 0}, r"--max-new-tokens \(0\) must be between 1 and 6\d"),
        ({"overrides": ["moe.tau=0.5"]}, r"moe\.tau must be in section parallel or precision"),
        ({"overrides": ["parallel.tensor_model_parallel_size=2"]}, r"world size \(1\) must be"),
    ],
)
def test_wrong_requests_are_refused(checkpoint, arguments, named):
    with config_error(named):
        GenerateRequest.read(checkpoint, **{"prompts": ["Document"], **arguments})  # type: ignore[arg-type]


def test_room_decides_how_many_tokens_unless_told(checkpoint):
    request = GenerateRequest.read(checkpoint, ["Document"])
    assert len(request.prompts[0]) + request.max_new_tokens == LENGTH


def test_tokenizer_of_another_model_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "other")
    config = tmp_path / "other/config.yaml"
    config.write_text(config.read_text().replace("vocab_size: 320", "vocab_size: 200"))
    with config_error(r"must not have more than model.vocab_size \(200\)"):
        GenerateRequest.read(tmp_path / "other", ["Document"])
