"""A Megatron-LM command line as a configuration."""

import contextlib
import re
from pathlib import Path

import pytest

from moepp_megatron.config import ConfigError, load_config, parse_config
from moepp_megatron.config.from_megatron import translate
from moepp_megatron.config.megatron_flags import (
    ABSENT,
    ALWAYS,
    DERIVED,
    SETTINGS,
    SWITCHES,
    setting_of,
)
from moepp_megatron.config.reference import section_references
from tests.refusals import config_error

SCRIPT = """\
#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
LAYERS=8
SAVE=${SAVE:-/checkpoints}
DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
)
MODEL_ARGS=(
    --num-layers $LAYERS --hidden-size 256   # a comment
    --ffn-hidden-size 512
    --num-attention-heads 8 --group-query-attention --num-query-groups 2
    --seq-length 128 --vocab-size 1024
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --attention-dropout 0.0 --hidden-dropout 0.0
    --untie-embeddings-and-output-weights
)
MOE_ARGS="--num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2"
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \\
    ${MODEL_ARGS[@]} --num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 \\
    --moe-router-load-balancing-type seq_aux_loss --moe-layer-freq "([0]*1+[1]*7)" \\
    --tensor-model-parallel-size $TP --pipeline-model-parallel-size 2 \\
    --num-layers-per-virtual-pipeline-stage 2 --bf16 --sequence-parallel \\
    --micro-batch-size 2 --global-batch-size 32 --train-samples 3200 --lr-warmup-samples 320 \\
    --lr 1e-3 --save $SAVE --data-path /data/c4 --no-load-rng --fancy-thing 3
"""


GROUPED = (
    "--num-zero-experts 2 --moe-router-load-balancing-type grouped_aux_loss "
    "--moe-aux-loss-coeff 0.1"
)


def _translated(text, tmp_path, name="train.sh"):
    path = tmp_path / name
    path.write_text(text)
    return translate(path, {"TP": "2"})


def test_a_script_becomes_a_configuration(tmp_path):
    found = _translated(SCRIPT, tmp_path)
    config = parse_config(found.content)
    assert (config.model.num_layers, config.model.num_query_groups) == (8, 2)
    assert config.parallel.tensor_model_parallel_size == 2
    # Two stages of two layers a chunk: 8 / (2 * 2).
    assert config.parallel.virtual_pipeline_model_parallel_size == 2
    # Megatron's default, where this project's is 1.
    assert config.parallel.expert_tensor_parallel_size == 2
    assert config.moe.is_vanilla
    assert config.moe.layer_freq == [0] + [1] * 7
    assert (config.moe.balance_scope, config.moe.balance_coeff) == ("sequence", 0.01 * 8 / 2)
    assert (config.training.train_iters, config.optimizer.warmup_iters) == (100, 10)
    assert config.optimizer.adam_beta2 == 0.999
    assert config.model.tie_embeddings is False
    assert config.precision.dtype == "bf16"
    assert str(config.checkpoint.dir) == "/checkpoints"


def test_what_has_no_counterpart_is_listed(tmp_path):
    notes = "\n".join(_translated(SCRIPT, tmp_path).notes)
    assert "--fancy-thing 3 has no counterpart" in notes
    assert "--no-load-rng has no counterpart" in notes
    assert "--data-path: set data.tokenizer to the tokenizer's file" in notes
    assert "nproc" not in notes


def test_a_model_of_another_kind_is_reported(tmp_path):
    script = SCRIPT.replace("--swiglu", "").replace("RMSNorm", "LayerNorm")
    notes = "\n".join(_translated(script, tmp_path).notes)
    assert "--swiglu is not given: this project's model has --swiglu" in notes
    assert "--normalization is LayerNorm: this project's model has --normalization" in notes


def test_a_variable_without_a_value_is_reported(tmp_path):
    path = tmp_path / "train.sh"
    path.write_text(SCRIPT)
    notes = "\n".join(translate(path, {}).notes)
    assert "--tensor-model-parallel-size $TP has a variable without a value" in notes


def test_schedules_and_optimizers_of_later_megatrons(tmp_path):
    path = tmp_path / "train.sh"
    more = (
        "--optimizer muon --muon-tp-mode duplicated --lr-decay-style WSD --lr-wsd-decay-iters 50 "
        "--lr-wsd-decay-style minus_sqrt --step-batch-size-schedule '0:128 1M:256'"
    )
    path.write_text(SCRIPT.replace("--no-load-rng", more))
    translated = translate(path, {"TP": "2"})
    optimizer = translated.content["optimizer"]
    assert (optimizer["kind"], optimizer["muon_tp_mode"]) == ("muon", "duplicated")
    assert (optimizer["decay_style"], optimizer["wsd_decay_style"]) == ("WSD", "minus_sqrt")
    assert optimizer["wsd_decay_iters"] == 50
    assert "--step-batch-size-schedule is not taken over" in "\n".join(translated.notes)


def test_blends(tmp_path):
    path = "--data-path /data/c4"
    assert _translated(SCRIPT, tmp_path).content["data"]["path"] == "/data/c4"
    text = SCRIPT.replace(path, "--data-path 0.3 /data/c4_text_document 7e-1 /data/wiki")
    config = parse_config(_translated(text, tmp_path).content)
    assert [(str(part.path), part.weight) for part in config.data.blend] == [
        ("/data/c4_text_document", 0.3),
        ("/data/wiki", 0.7),
    ]
    for unweighted in ("a b c", "a b"):
        found = _translated(SCRIPT.replace(path, f"--data-path {unweighted}"), tmp_path)
        assert "data" not in found.content
        assert "without weights, which Megatron reads whole" in "\n".join(found.notes)


@pytest.mark.parametrize(
    ("kinds", "coefficients", "taken", "told"),
    [
        ("aux_loss", "1e-2", ("microbatch", 1e-2), ""),
        ("seq_aux_loss global_aux_loss", "1e-4 0", ("sequence", 1e-4), ""),
        ("seq_aux_loss global_aux_loss", "0 1e-4", ("global", 1e-4), ""),
        (
            "aux_loss seq_aux_loss",
            "1e-2 1e-4",
            ("microbatch", 1e-2),
            "seq_aux_loss (--moe-aux-loss-coeff 0.0001) is left out: a layer has one balance loss",
        ),
        ("aux_loss", "1e-2 1e-4", ("microbatch", 1e-2), "2 numbers for 1 of"),
        ("none", "1e-2", (None, 0.0), ""),
        ("sinkhorn", "1e-2", (None, 0.0), "--moe-router-load-balancing-type sinkhorn has no"),
    ],
)
def test_lists_of_balance_losses(kinds, coefficients, taken, told, tmp_path):
    text = SCRIPT.replace("seq_aux_loss", kinds).replace("coeff 1e-2", f"coeff {coefficients}")
    found = _translated(text, tmp_path)
    moe = found.content["moe"]
    assert (moe.get("balance_scope"), moe["balance_coeff"]) == (taken[0], taken[1] * 8 / 2)
    notes = [note for note in found.notes if "balanc" in note or "aux" in note]
    assert told in "\n".join(notes)
    # megatron-core's own layer has no loss over the global batch; the schema says so.
    assert bool(notes) == bool(told) or taken[0] == "global"


@pytest.mark.parametrize(
    ("more", "experts", "balance"),
    [
        ("grouped_aux_loss --moe-zero-expert-weight 2.0", (4, 0), ("grouped", 1e-2, 0.5)),
        ("grouped_aux_loss --zero-experts-type copy", (0, 4), ("grouped", 1e-2, 1.0)),
        ("aux_loss --zero-experts-type zero", (4, 0), ("heterogeneous", 1e-2 * 12 / 2, 1.0)),
    ],
)
def test_zero_experts_of_zedas_fork(more, experts, balance, tmp_path):
    found = _translated(SCRIPT.replace("seq_aux_loss", f"{more} --num-zero-experts 4"), tmp_path)
    moe = parse_config(found.content).moe
    assert (moe.num_zero_experts, moe.num_copy_experts, moe.num_constant_experts) == (*experts, 0)
    assert (moe.balance_loss, moe.balance_coeff, moe.tau) == balance
    assert not [note for note in found.notes if "zero" in note or "aux" in note or "moe." in note]


BRANCHES = """\
SIZE=${1:-7B}
TP=1
if [ $SIZE = 0.5B ]; then
    NUM_LAYERS=24
elif [ $SIZE = 7B ]; then
    NUM_LAYERS=32
fi
export OTHER=1 SEQ=2048; SEQ=4096
[ -n "$X" ] && ADAM=0.9
: ${LR:=1e-4}
MOE="--num-experts 8 \\
    --moe-router-topk 2"
ARGS=(--num-layers $NUM_LAYERS --hidden-size 1024 --tensor-model-parallel-size $TP  # a comment
    --data-path "/my data/x" --adam-beta1 $ADAM "$@")
TP=8
if [ "$DEBUG" = 1 ]; then ARGS+=(--num-attention-heads 1); fi
while [ $# -gt 0 ]; do case $1 in --seq) SEQ=$2; shift 2;; esac; done
python tools/preprocess_data.py --seq-length 99999 --vocab-size 5 2>&1 | tee "log"
"""
CALLS = [
    "torchrun --nproc_per_node 8 pretrain_gpt.py ${ARGS[@]} $MOE --lr $LR --seq-length $SEQ > log",
    "python pretrain.py --vocab-size 3 --num-experts 3; "
    'CMD="cd $DIR && python $DIR/pretrain_moe.py ${ARGS[*]} $MOE --lr $LR --seq-length $SEQ"; '
    'srun sh -c "$CMD" 2>&1',
]


@pytest.mark.parametrize("call", CALLS)
def test_a_script_is_read_as_bash_would(call, tmp_path):
    found = _translated(f"{BRANCHES}{call}\nMOE=--lr python other.py --vocab-size 9", tmp_path)
    model = found.content["model"]
    assert (model["num_layers"], model["seq_length"], model["num_attention_heads"]) == (32, 4096, 1)
    assert found.content["moe"]["num_ffn_experts"] == 8
    assert found.content["optimizer"]["lr"] == 1e-4
    assert found.content["data"] == {"path": "/my data/x"}
    # TP is another one when ARGS is set, and given on the command line.
    assert found.content["parallel"]["tensor_model_parallel_size"] == 2
    assert "vocab_size" not in model
    notes = "\n".join(found.notes)
    for name, values in (
        ("NUM_LAYERS", "24; 32"),
        ("SEQ", "2048; 4096; $2"),
        ("ADAM", "0.9"),
        (
            "ARGS",
            "--num-layers 32 --hidden-size 1024 --tensor-model- [...]; --num-attention-heads 1",
        ),
    ):
        assert f"{name} is set in a branch or more than once ({values}" in notes
    for name in ("OTHER", "MOE", "TP", "LR", "preprocess", "log"):
        assert f"{name} is set" not in notes
    assert ("FILE has several commands with pretrain*.py" in notes) == (call == CALLS[1])


def test_of_an_option_that_is_given_twice_the_last_is_taken(tmp_path):
    found = _translated("pretrain_gpt.py --num-experts 4 --lr 1 --num-experts 8 --lr=1", tmp_path)
    assert found.content["moe"]["num_ffn_experts"] == 8
    assert "--num-experts has several values (4; 8): the last is taken" in found.notes
    assert "--lr has" not in "\n".join(found.notes)


def test_a_file_without_the_command_is_read_whole(tmp_path):
    text = 'MOE="--num-experts 4"\nA=(--num-layers 2 --hiden-size 8)\npython train.py --lr 8 $X'
    found = _translated(text, tmp_path)
    assert found.content["moe"]["num_ffn_experts"] == 4
    assert found.content["model"]["num_layers"] == 2
    notes = "\n".join(found.notes)
    assert "FILE has no command with pretrain*.py: every argument in it is read" in notes
    assert "--hiden-size 8 has no counterpart; did you mean --hidden-size?" in notes


def test_a_script_that_doubles_a_value_many_times_is_refused(tmp_path):
    text = "A=12345678\n" + "A=$A$A\n" * 40 + "pretrain_gpt.py --num-experts $A"
    with config_error("its values have more than 1000000 characters"):
        _translated(text, tmp_path)


def test_rules_are_listed_where_the_vocabulary_is_missing(tmp_path):
    script = SCRIPT.replace("--vocab-size 1024", "").replace("--sequence-parallel", "")
    notes = "\n".join(_translated(script, tmp_path).notes)
    assert "model.vocab_size (missing) must be given" in notes
    assert "parallel.sequence_parallel (false) must be true" in notes


@pytest.mark.parametrize(
    ("more", "setting", "value"),
    [
        ("--no-load-optim", "checkpoint.load_optimizer", False),
        ("--finetune", "checkpoint.load_optimizer", False),
        ("--fused-residual-rmsnorm", "megatron.fused_residual_rmsnorm", True),
        (
            "--offload-modules core_attn moe_act",
            "megatron.offload_modules",
            ["core_attn", "moe_act"],
        ),
        # Megatron's own defaults.
        ("", "model.ffn_hidden_size", 640),
        ("--group-query-attention", "model.num_query_groups", 1),
        ("--num-query-groups 2", "model.num_query_groups", None),
        ("--multi-latent-attention", "model.latent_attention.kv_lora_rank", 32),
        ("--multi-latent-attention", "model.latent_attention.rotary_scaling_factor", 1.0),
        ("--multi-latent-attention", "model.latent_attention.q_lora_rank", None),
        ("--optimizer muon", "optimizer.muon_tp_mode", "blockwise"),
        ("--fp8-format e4m3", "precision.fp8_amax_history_len", 1),
        ("--fp8-format e4m3 --fp8-recipe blockwise", "precision.fp8_amax_history_len", None),
        ("--moe-token-dispatcher-type flex", "moe.flex_backend", "deepep"),
        ("--recompute-granularity selective", "training.recompute_modules", ["core_attn"]),
    ],
)
def test_arguments_and_absent_arguments(more, setting, value, tmp_path):
    text = f"pretrain_gpt.py --num-experts 4 --swiglu --hidden-size 256 {more}"
    found = _translated(text, tmp_path).content
    for name in setting.split("."):
        found = found.get(name, {})
    assert (found or None) == (value or None)
    assert found != {} or value is None


DEEPSEEK_V3 = """\
--moe-router-score-function sigmoid --moe-router-enable-expert-bias \\
--moe-router-bias-update-rate 2e-3 --moe-router-topk-scaling-factor 2.5 \\
--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-pre-softmax"""


def test_the_recipe_of_deepseek_v3(tmp_path):
    script = SCRIPT.replace("--no-load-rng", DEEPSEEK_V3)
    found = _translated(script, tmp_path)
    moe = parse_config(found.content).moe
    assert (moe.selection_bias, moe.bias_update_rate, moe.gate_scale) == (True, 2e-3, 2.5)
    assert (moe.score_function, moe.gate_normalization) == ("sigmoid", "selected")
    assert not [note for note in found.notes if "router" in note]
    # Megatron's default rate, and a rate of no bias.
    shorter = script.replace("--moe-router-bias-update-rate 2e-3", "")
    assert _translated(shorter, tmp_path).content["moe"]["bias_update_rate"] == 1e-3
    without = script.replace("--moe-router-enable-expert-bias", "")
    assert "bias_update_rate" not in _translated(without, tmp_path).content["moe"]
    root = script.replace("function sigmoid", "function sqrtsoftplus")
    assert parse_config(_translated(root, tmp_path).content).moe.score_function == "sqrtsoftplus"


@pytest.mark.parametrize("value", ["", "abc", "1 2", "$NOWHERE", "-1", "0", "nan", "1e999", "[1"])
def test_no_value_of_any_argument_is_a_traceback(value, tmp_path, monkeypatch):
    # What a configuration is refused for is a note; asking takes most of the time.
    monkeypatch.setattr("moepp_megatron.config.from_megatron.parse_config", lambda content: None)
    for name in sorted({*SETTINGS, *SWITCHES, *DERIVED, *ALWAYS}):
        text = re.sub(rf"--{name} [^ )]+", "", SCRIPT).replace("--no-load-rng", f"--{name} {value}")
        with contextlib.suppress(ConfigError):
            found = _translated(text, tmp_path)
            found.to_yaml(tmp_path)


def test_yaml_of_arguments(tmp_path):
    text = """\
ENV_VARS:
  CUDA_DEVICE_MAX_CONNECTIONS: 1
MODEL_ARGS:
  --num-layers: 4
  --hidden-size: 64
  --ffn-hidden-size: 128
  --num-attention-heads: 4
  --seq-length: 32
  --vocab-size: 128
  --num-experts: 4
  --moe-router-pre-softmax: true
  --sequence-parallel: false
  --context-parallel-size: ${TP}
  --micro-batch-size: 1
  --global-batch-size: 8
  --train-iters: 10
  --lr: 1.2e-4
"""
    config = parse_config(_translated(text, tmp_path, "model.yaml").content)
    assert config.parallel.context_parallel_size == 2
    assert config.moe.gate_normalization == "none"
    assert config.parallel.sequence_parallel is False
    assert config.optimizer.lr == 1.2e-4


def test_what_is_written_is_read_back(tmp_path):
    found = _translated(SCRIPT, tmp_path)
    out = tmp_path / "mine.yaml"
    out.write_text(found.to_yaml(Path("train.sh")))
    assert load_config(out) == parse_config(found.content)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("--num-layers 4", "--num-experts among them"),
        ("--num-experts 4 --moe-layer-freq __import__('os')", "--moe-layer-freq"),
        ("--num-experts 4 --moe-layer-freq [0]*9999*9999*9999", "--moe-layer-freq"),
        (f"--num-experts 4 --moe-layer-freq {'1+' * 9999}1", "--moe-layer-freq"),
        ("--num-experts $E", "--num-experts \\(None\\) must be a whole number above 0"),
        ("--num-experts 4 --moe-aux-loss-coeff abc", r"--moe-aux-loss-coeff \(abc\) must be a"),
        ("--num-experts 4 --zero-experts-type identity", "must be zero or copy"),
        (f"--num-experts 4 {GROUPED} --moe-zero-expert-weight 0", r"weight \(0\) must be above 0"),
        ("echo 'open --num-experts 4", "all quotes closed"),
        ("--num-experts 4 --hybrid-layer-pattern M*E", "no Mamba or other layers here"),
        ("--num-experts 4 --hybrid-layer-pattern *EE", r"pattern \(\*EE\) must hold whole layers"),
        ("--num-experts 4 --hybrid-layer-pattern '*E|*E/*-'", "where the last layer is that"),
        ("--num-experts 4 --hybrid-layer-pattern +E", r"which are \*E or \*-"),
    ],
)
def test_what_is_no_such_file_is_refused(text, part, tmp_path):
    with config_error(part):
        _translated(text, tmp_path)


@pytest.mark.parametrize("pattern", ["*-*E*E|*E/*E", "[*-][*E]*E|[*E]/[*E]"])
def test_a_hybrid_pattern_of_whole_layers(pattern, tmp_path):
    text = f"pretrain_hybrid.py --num-experts 4 --num-layers 9 --hybrid-layer-pattern '{pattern}'"
    settings = _translated(text, tmp_path).content
    assert settings["model"]["num_layers"] == 4
    assert settings["model"]["mtp_num_layers"] == 1
    assert settings["moe"]["layer_freq"] == [0, 1, 1, 1]
    assert settings["parallel"]["pipeline_model_parallel_layout"] == "Ettt|tmL"


def test_every_setting_of_the_table_exists():
    known = {setting.name for section in section_references() for setting in section.settings}
    named = {*SETTINGS.values(), *(key for key, _ in SWITCHES.values()), *ABSENT}
    assert named <= known


def test_an_option_typed_by_habit_is_known():
    assert setting_of("--micro-batch-size") == "training.micro_batch_size"
    assert setting_of("--sequence_parallel") == "parallel.sequence_parallel"
    assert setting_of("--nproc") is None
