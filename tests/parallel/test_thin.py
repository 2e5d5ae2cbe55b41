"""examples/thin.sh: from a model of others to its cheaper export, by the commands."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests import ROOT
from tests.commands import moepp
from tests.parallel.checkpoint_runs import logged

EXAMPLE = ROOT / "examples/thin.sh"
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "router_aux_loss_coef": 0.02,
    "num_local_experts": 8,
}
SETTINGS = (
    *("training.global_batch_size=8", "training.micro_batch_size=4", "training.eval_iters=1"),
    *("training.log_interval=1", "data.num_workers=0", "precision.dtype=fp32"),
)
# `moepp` of the script asks the test to run it: that saves the imports of each command.
ENVIRONMENT = """
MOEPP_ROOT={root} MOEPP_BIN={bin}
"""
ASK = """#!/usr/bin/env bash
printf '%s\\0' "$@" >{bin}/words
read -r status <{bin}/status
exit "$status"
"""


@pytest.fixture
def thin(corpus, tmp_path):
    """The script on a Mixtral with so many experts per token: status, errors, commands."""
    import torch
    import transformers

    root, folder = tmp_path / "root", tmp_path / "root/bin"
    for name in ("examples", "launch", "bin"):
        (root / name).mkdir(parents=True)
    (root / "configs").symlink_to(EXAMPLE.parents[1] / "configs")
    shutil.copy(EXAMPLE, root / "examples")
    names = {"root": root, "bin": folder}
    (root / "launch/env.sh").write_text(ENVIRONMENT.format(**names))
    (folder / "moepp").write_text(ASK.format(**names))
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for name in ("moepp", "python"):
        (folder / name).chmod(0o755)
    for name in ("words", "status"):
        os.mkfifo(folder / name)

    def run(topk, *settings, **environment):
        source = tmp_path / f"top-{topk}"
        if not source.exists():
            torch.manual_seed(5)
            config = transformers.MixtralConfig(**SHAPE, num_experts_per_tok=topk)
            transformers.MixtralForCausalLM(config).save_pretrained(source)
            shutil.copy(corpus / "tokenizer.json", source)
            (source / "chat_template.jinja").write_text("{{ messages }}")
        words = [root / "examples/thin.sh", source, tmp_path / "out", corpus, *settings]
        given = {"STEPS": "12", "LR": "1e-3"} | environment
        script = subprocess.Popen(
            [*map(str, words), *SETTINGS],
            env=os.environ | given,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        commands = []
        # status stays open: closed after each answer, it would end the read of a script that had
        # already opened it for its next command.
        descriptor = os.open(folder / "words", os.O_RDONLY | os.O_NONBLOCK)
        with (
            os.fdopen(descriptor, "rb") as asked,
            open(folder / "status", "r+b", buffering=0) as told,
        ):
            while script.poll() is None:
                said = asked.read() or b""
                if not said:
                    time.sleep(0.02)
                    continue
                assert said.endswith(b"\0")
                arguments = said.decode().split("\0")[:-1]
                commands.append(" ".join(arguments[:2]))
                done = moepp(*arguments)
                assert done.returncode in (0, 2), f"{arguments}\n{done.stdout}{done.stderr}"
                told.write(b"%d\n" % done.returncode)
        assert script.stderr is not None
        return script.returncode, script.stderr.read(), commands

    return run


def test_from_a_model_to_its_export(thin, tmp_path):
    from tests.interop.transformers_models import load_model

    status, said, commands = thin(2, RECIPE="budget")
    assert (status, said) == (0, "")
    assert [command.split()[0] for command in commands] == [
        *("convert", "convert", "train", "train", "report", "convert")
    ]
    out = tmp_path / "out"
    assert logged(out / "budget", "step") == list(range(1, 13))
    # The start computes what the model does; its teacher is the model.
    assert abs(logged(out / "budget", "distillation_loss")[0]) < 1e-5
    shares = logged(out / "budget", "ffn_fraction")
    assert (shares[0], shares[-1]) == (1.0, pytest.approx(0.5, rel=0.2))
    assert "budget-before" in (out / "budget.html").read_text()
    exported = json.loads((out / "budget-hf/config.json").read_text())
    assert exported["max_position_embeddings"] == SHAPE["max_position_embeddings"]
    assert (out / "budget-hf/chat_template.jinja").read_text() == "{{ messages }}"
    assert load_model(out / "budget-hf").config.num_experts_per_tok == 2
    # The same command, when all is there: only asks the run and its report.
    status, said, commands = thin(2, RECIPE="budget")
    assert (status, [command.split()[0] for command in commands]) == (0, ["train", "report"])


def test_other_recipes(thin, tmp_path):
    from moepp_megatron.config import load_config

    assert thin(4, "training.global_batch_size=4", RECIPE="zeda")[0] == 0
    first, last = (
        load_config(tmp_path / "out" / name / "config.yaml") for name in ("zeda-first", "zeda")
    )
    assert (first.moe.tau, first.moe.balance_loss, first.moe.selection_bias) == (
        0.5,
        "grouped",
        False,
    )
    assert (first.distillation.teacher, last.distillation.text_weight) == (None, 0.0)
    assert (first.training.train_iters, last.training.train_iters) == (7, 5)
    assert last.optimizer.lr == 0.25e-3
    assert thin(4, RECIPE="topk")[0] == 0
    exported = json.loads((tmp_path / "out/topk-hf/config.json").read_text())
    assert (exported["model_type"], exported["num_experts_per_tok"]) == ("mixtral", 2)


@pytest.mark.parametrize(
    ("topk", "environment", "says"),
    [
        (2, {"RECIPE": "topk"}, "SHARE (0.5) of 2 experts per token leaves 1, and RECIPE=topk"),
        (4, {"RECIPE": "topk", "SHARE": "0.6"}, "leaves 2.4"),
        (2, {"RECIPE": "best"}, "RECIPE (best) must be topk, budget, zeda or control"),
        (2, {"RECIPE": "budget", "SHARE": "1"}, "SHARE (1) must be above 0 and below 1"),
    ],
)
def test_refused_before_anything_is_made(thin, tmp_path, topk, environment, says):
    status, said, commands = thin(topk, **environment)
    assert (status, commands, len(said.splitlines())) == (2, [], 1)
    assert says in said
    assert not (tmp_path / "out").exists()
