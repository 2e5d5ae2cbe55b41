"""Fine-tuning on conversations, from JSONL to an answer: the commands of the example, small."""

import json
import shlex
import subprocess
import sys

from moepp_megatron.file_names import CHAT_TEMPLATE_FILE
from tests import ROOT
from tests.commands import moepp

EXAMPLES = ROOT / "examples"
TINY = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.vocab_size=320",
    "training.train_iters=2",
    "training.eval_iters=1",
    "training.eval_interval=1",
    "training.global_batch_size=8",
    "optimizer.warmup_iters=1",
)


def commands():
    """Arguments of each `moepp` that the script calls."""
    script = (EXAMPLES / "fine_tune.sh").read_text().replace("\\\n", " ")
    lines = [line for line in script.splitlines() if line.startswith('"$MOEPP_BIN/moepp"')]
    return [shlex.split(line)[1:] for line in lines]


def run(*words):
    done = moepp(*words)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_example(tmp_path, corpus, monkeypatch):
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/stdlib").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    made = [sys.executable, "examples/make_chat.py", "data/chat.jsonl", "120"]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    one = "parallel.expert_model_parallel_size=1"
    within = ("data.reset_attention_mask=true", "data.eod_mask_loss=true")
    run("train", "configs/quickstart.yaml", *TINY, one, *within)

    prepare, train, generate = commands()
    printed = run(*prepare)
    assert "120" in printed
    assert "have loss" in printed
    assert train[-1] == "$@"
    # Two ranks, as the script.
    refused = moepp(*train[:-1], *TINY, "data.reset_attention_mask=false")
    assert refused.returncode == 2
    assert "data.reset_attention_mask (false) must be true with data.path" in refused.stderr
    run(*train[:-1], *TINY)
    folder = tmp_path / "runs/fine_tuned"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert records[1]["valid_loss"] < records[0]["valid_loss"]
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    assert (checkpoint / CHAT_TEMPLATE_FILE).read_bytes() == (EXAMPLES / "chat.jinja").read_bytes()

    answers = run(*generate, "--max-new-tokens", "4")
    assert answers.startswith("Question: In which module is deepcopy?\nAnswer:")
    assert "\n\nQuestion: Where is OrderedDict?\nAnswer:" in answers
    without = moepp("generate", "runs/quickstart", "--chat", "--prompt", "hm")
    assert without.returncode == 2
    assert "must have a chat template, in chat_template.jinja or tokenizer_conf" in without.stderr
