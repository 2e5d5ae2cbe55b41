"""Megatron-LM's command-line arguments and this project's settings (`Section.megatron_flags`).

Source: `megatron/training/arguments.py` and `megatron/training/config/` of NVIDIA/Megatron-LM, and
`TransformerConfig` of megatron-core 0.19; for zero experts scripts/ and zeda/Megatron-LM of
TsinghuaC3I/ZEDA.
"""

from collections.abc import Iterator

from moepp_megatron.config.sections import words
from moepp_megatron.config.yaml_file import parse_yaml


def _declared() -> Iterator[tuple[str, str, str]]:
    """The arguments that sections declare, their settings, and the value of one without a value."""
    for section, word in words("megatron_flags"):
        names, _, value = word.partition(":")
        name, _, key = names.partition("=")
        yield name, f"{section}.{key or name.replace('-', '_')}", value


_DECLARED = tuple(_declared())
SETTINGS = {name: setting for name, setting, value in _DECLARED if not value}
"""The setting of each argument with a value that means the same."""
SWITCHES = {
    name: (setting, parse_yaml(value, f"--{name}")) for name, setting, value in _DECLARED if value
}
"""The setting and its value of each argument without a value."""

ABSENT = {
    "model.tie_embeddings": True,
    "moe.balance_coeff": 0.0,
    "moe.dispatcher": "allgather",
    "parallel.use_distributed_optimizer": False,
    "optimizer.weight_decay": 0.01,
    "optimizer.adam_beta2": 0.999,
    "optimizer.decay_style": "linear",
    "training.log_interval": 100,
    "training.eval_iters": 100,
}
"""Megatron's defaults, where this project's differ."""

_MUON = {"optimizer.muon_momentum": 0.9, "optimizer.muon_tp_mode": "blockwise"}
_FP8 = {"precision.fp8_amax_history_len": 1, "precision.fp8_amax_compute_algo": "most_recent"}
ABSENT_WITH = (
    ("precision.fp8", None, {"precision.fp8_recipe": "delayed"}),
    ("precision.fp8_recipe", "delayed", _FP8),
    ("optimizer.kind", "muon", _MUON),
    ("moe.dispatcher", "flex", {"moe.flex_backend": "deepep"}),
    ("training.recompute_granularity", "selective", {"training.recompute_modules": ["core_attn"]}),
)
"""The same where a setting, in this order, has a value (None: any)."""

ALWAYS = {
    "swiglu": "true",
    "disable-bias-linear": "true",
    "normalization": "RMSNorm",
    "position-embedding-type": "rope",
    "attention-dropout": "0",
    "hidden-dropout": "0",
}
"""Arguments without which Megatron builds a model that this project has not, with their value."""

_SPEED = (
    "attention-backend auto-detect-ckpt-format ckpt-format cross-entropy-fusion-impl "
    "cross-entropy-loss-fusion data-cache-path disable-gloo-process-groups dist-ckpt-strictness "
    "distributed-backend distributed-timeout-minutes enable-experimental group-query-attention "
    "log-memory-to-tensorboard log-num-zeros-in-grad log-params-norm log-progress log-throughput "
    "log-timers-to-tensorboard log-validation-ppl-to-tensorboard make-vocab-size-divisible-by "
    "manual-gc manual-gc-interval max-position-embeddings moe-grouped-gemm moe-permute-fusion "
    "moe-router-fusion moe-router-dtype multi-latent-attention no-check-for-nan-in-loss-and-grad "
    "no-create-attention-mask-in-dataloader no-masked-softmax-fusion no-mmap-bin-files "
    "no-position-embedding no-rope-fusion tensorboard-dir "
    "tensorboard-log-interval tp-comm-overlap transformer-impl use-flash-attn use-mcore-models "
    "use-precision-aware-optimizer use-pytorch-profiler wandb-exp-name wandb-save-dir"
)
WITHOUT_A_SETTING = frozenset(_SPEED.split())
"""Arguments of speed, logging and files that need no setting here, or that others imply."""

DERIVED = {
    "train-samples": "`training.train_iters`: divided by `--global-batch-size`",
    "lr-decay-samples": "`optimizer.decay_iters`: divided by `--global-batch-size`",
    "lr-warmup-samples": "`optimizer.warmup_iters`: divided by `--global-batch-size`",
    "lr-wsd-decay-samples": "`optimizer.wsd_decay_iters`: divided by `--global-batch-size`",
    "step-batch-size-schedule": "`training.batch_ramp`: the same pairs, written as a list",
    "rampup-batch-size": "`training.batch_ramp`; megatron-core 0.19.2 itself ignores it",
    "lr-warmup-fraction": "`optimizer.warmup_iters`: this share of the steps of the decay",
    "num-layers-per-virtual-pipeline-stage": "`parallel.virtual_pipeline_model_parallel_size`: "
    "the layers of a stage divided by it",
    "moe-router-load-balancing-type": "`moe.balance_scope`: `microbatch` for aux_loss, `sequence` "
    "for seq_aux_loss, `global` for global_aux_loss; `moe.balance_loss`: `grouped` for ZEDA's "
    "grouped_aux_loss",
    "moe-aux-loss-coeff": "`moe.balance_coeff`: times all experts over `--moe-router-topk`, a "
    "factor that Megatron's loss has and the paper's has not; as it is for grouped_aux_loss",
    "num-zero-experts": "`moe.num_zero_experts`, or `moe.num_copy_experts` with "
    "`--zero-experts-type copy` (ZEDA's fork)",
    "zero-experts-type": "the setting that `--num-zero-experts` becomes (ZEDA's fork)",
    "moe-zero-expert-weight": "`moe.tau`: 1 over it (ZEDA's fork)",
    "moe-router-pre-softmax": "`moe.gate_normalization`: `none`; without it `selected`",
    "moe-enable-routing-replay": "`routes.record` or `routes.replay`",
    "moe-layer-freq": "`moe.layer_freq`: the same number or list",
    "data-path": "`data.path`, or `data.blend` of several prefixes with weights",
    "tokenizer-type": "`data.tokenizer`; by default the prepared data's",
    "tokenizer-model": "`data.tokenizer`; by default the prepared data's",
    "load": "`checkpoint.load`: what `moepp convert megatron-lm` makes of the checkpoint",
}
"""Arguments whose setting is worked out, or has to be given by hand, and how."""


def setting_of(option: str) -> str | None:
    """Map an option, as typed, to its setting, such as `moe.router_topk`, or to None."""
    name = option.lstrip("-").replace("_", "-")
    if name in SWITCHES:
        return SWITCHES[name][0]
    return SETTINGS.get(name)


def counterpart_of(option: str) -> str | None:
    """Same as `setting_of`, also for values to be worked out and names without `moe-`."""
    name = option.lstrip("-").replace("_", "-")
    for full in (name, f"moe-{name}", name.replace("moe-", "", 1)):
        derived = DERIVED.get(full, "")
        setting = derived.split("`")[1] if derived.startswith("`") else setting_of(full)
        if setting is not None:
            return setting
    return None
