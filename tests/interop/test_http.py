"""The commands of docs/how_to/serve.md: an export of the quickstart's run answers over HTTP."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from moepp_megatron.data.tokenizer import Tokenizer
from tests import ROOT
from tests.commands import TIMEOUT_S, captured, moepp, slowdown, succeeded
from tests.interop.transformers_models import load_model, logprobs_of
from tests.ports import free_port

PROMPT, NEW_TOKENS = "def read(self", 24
LACKING = [
    name
    for name in ("accelerate", "fastapi", "openai", "uvicorn")
    if importlib.util.find_spec(name) is None
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs/quickstart, of a smaller model and text."""
    folder = tmp_path_factory.mktemp("served")
    line = json.dumps({"text": "def read(self, lines):\n    return sorted(lines)\n" * 20})
    (folder / "text.jsonl").write_text(f"{line}\n" * 60)
    small = ("model.num_layers=2", "model.seq_length=64", "model.hidden_size=48")
    short = ("training.train_iters=6", "training.global_batch_size=4", "optimizer.warmup_iters=1")
    alone = ("parallel.expert_model_parallel_size=1", "training.eval_interval=0")
    quickstart = ["train", ROOT / "configs/quickstart.yaml", *small, *short, *alone]
    for words in (["data", "prepare", "text.jsonl", "--out", "data/stdlib"], quickstart):
        succeeded(moepp(*words, cwd=folder))
        tokenizer = Tokenizer.load(folder / "data/stdlib/tokenizer.json")
        # As in the quickstart, the model has no tokens that the tokenizer lacks.
        quickstart.append(f"model.vocab_size={tokenizer.vocab_size}")
    return folder


@pytest.fixture(scope="module")
def answered(folder):
    """Return the text that the server wrote after the prompt."""
    if LACKING:
        pytest.skip(f"needs the packages {', '.join(LACKING)}")
    page = (ROOT / "docs/how_to/serve.md").read_text()
    block = re.search(r"```bash\n(.*?)```", page, re.DOTALL)
    assert block, "serve.md has no commands"
    install, *commands = block[1].splitlines()
    wanted = install.removeprefix("pip install '").removesuffix("'")
    assert f'"{wanted}",' in (ROOT / "pyproject.toml").read_text()
    assert len(commands) == 4
    script = "trap 'kill $!' EXIT\n" + "\n".join(commands).replace("8000", str(free_port()))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = succeeded(
        captured(
            ["bash", "-euc", script],
            cwd=folder,
            env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")},
            timeout=TIMEOUT_S * slowdown(),
        )
    )
    answer = json.loads(done.stdout[done.stdout.index('{"id"') :].splitlines()[0])
    assert answer["usage"]["completion_tokens"] == NEW_TOKENS
    return str(answer["choices"][0]["text"])


def by_transformers(folder):
    """By implementation of experts the new text, all tokens and the log-probability of each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    answers = {}
    for experts in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(experts)
        whole = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        text = tokenizer.decode(whole[0, ids["input_ids"].shape[1] :])
        answers[experts] = (text, whole[0].tolist(), logprobs_of(model, whole))
    return answers


def test_engine_transformers_and_server_write_the_same(folder, answered, plain):
    run = folder / "runs/quickstart"
    greedy = ["--temperature", 0, "--max-new-tokens", NEW_TOKENS]
    own = moepp("generate", run, "--prompt", PROMPT, *greedy)
    assert own.stdout == f"{PROMPT}{answered}\n", own.stderr
    for experts, (text, tokens, logprobs) in plain(by_transformers, folder / "exported").items():
        assert text == answered, experts
        np.savez(folder / "tokens.npz", input_ids=np.array([tokens]))
        succeeded(
            moepp("score", run, "--tokens", folder / "tokens.npz", "--out", folder / "out.npz")
        )
        scored = np.load(folder / "out.npz")["token_logprobs"][0]
        # fp32 on both sides.
        np.testing.assert_allclose(logprobs, scored, rtol=0, atol=1e-4)
