"""Megatron-LM's command-line arguments and this project's settings: one table.

Source: `megatron/training/arguments.py` and `megatron/training/config/` of NVIDIA/Megatron-LM, and
`TransformerConfig` of megatron-core 0.19; for zero experts scripts/ and zeda/Megatron-LM of
TsinghuaC3I/ZEDA.
"""

from __future__ import annotations

from moepp_megatron.config.sections import declared

SETTINGS = {
    "num-layers": "model.num_layers",
    "hidden-size": "model.hidden_size",
    "ffn-hidden-size": "model.ffn_hidden_size",
    "num-attention-heads": "model.num_attention_heads",
    "num-query-groups": "model.num_query_groups",
    "kv-channels": "model.kv_channels",
    "seq-length": "model.seq_length",
    "vocab-size": "model.vocab_size",
    "padded-vocab-size": "model.vocab_size",
    "rotary-base": "model.rotary_base",
    "norm-epsilon": "model.norm_epsilon",
    "layernorm-epsilon": "model.norm_epsilon",
    "init-method-std": "model.init_method_std",
    "q-lora-rank": "model.latent_attention.q_lora_rank",
    "kv-lora-rank": "model.latent_attention.kv_lora_rank",
    "qk-head-dim": "model.latent_attention.qk_head_dim",
    "qk-pos-emb-head-dim": "model.latent_attention.qk_pos_emb_head_dim",
    "v-head-dim": "model.latent_attention.v_head_dim",
    "rope-type": "model.latent_attention.rope_type",
    "rotary-scaling-factor": "model.latent_attention.rotary_scaling_factor",
    "original-max-position-embeddings": "model.latent_attention.original_max_position_embeddings",
    "beta-fast": "model.latent_attention.beta_fast",
    "beta-slow": "model.latent_attention.beta_slow",
    "mscale": "model.latent_attention.mscale",
    "mscale-all-dim": "model.latent_attention.mscale_all_dim",
    "mtp-num-layers": "model.mtp_num_layers",
    "mtp-loss-scaling-factor": "model.mtp_loss_scaling_factor",
    "num-experts": "moe.num_ffn_experts",
    "moe-router-topk": "moe.router_topk",
    "moe-ffn-hidden-size": "moe.ffn_hidden_size",
    "moe-shared-expert-intermediate-size": "moe.shared_expert_ffn_hidden_size",
    "moe-router-score-function": "moe.score_function",
    "moe-router-topk-scaling-factor": "moe.gate_scale",
    "moe-router-num-groups": "moe.num_groups",
    "moe-router-group-topk": "moe.group_topk",
    "moe-router-bias-update-rate": "moe.bias_update_rate",
    "moe-z-loss-coeff": "moe.z_loss_coeff",
    "moe-input-jitter-eps": "moe.input_jitter_eps",
    "moe-expert-capacity-factor": "moe.capacity_factor",
    "moe-token-dispatcher-type": "moe.dispatcher",
    "moe-flex-dispatcher-backend": "moe.flex_backend",
    "tensor-model-parallel-size": "parallel.tensor_model_parallel_size",
    "pipeline-model-parallel-size": "parallel.pipeline_model_parallel_size",
    "num-virtual-stages-per-pipeline-rank": "parallel.virtual_pipeline_model_parallel_size",
    "pipeline-model-parallel-layout": "parallel.pipeline_model_parallel_layout",
    "expert-model-parallel-size": "parallel.expert_model_parallel_size",
    "expert-tensor-parallel-size": "parallel.expert_tensor_parallel_size",
    "context-parallel-size": "parallel.context_parallel_size",
    "fp8-format": "precision.fp8",
    "fp8-recipe": "precision.fp8_recipe",
    "fp8-margin": "precision.fp8_margin",
    "fp8-amax-history-len": "precision.fp8_amax_history_len",
    "fp8-amax-compute-algo": "precision.fp8_amax_compute_algo",
    "num-layers-at-start-in-bf16": "precision.num_layers_at_start_in_bf16",
    "num-layers-at-end-in-bf16": "precision.num_layers_at_end_in_bf16",
    "split": "data.split",
    "num-workers": "data.num_workers",
    "lr": "optimizer.lr",
    "min-lr": "optimizer.min_lr",
    "weight-decay": "optimizer.weight_decay",
    "clip-grad": "optimizer.clip_grad",
    "adam-beta1": "optimizer.adam_beta1",
    "adam-beta2": "optimizer.adam_beta2",
    "adam-eps": "optimizer.adam_eps",
    "exp-avg-dtype": "optimizer.exp_avg_dtype",
    "exp-avg-sq-dtype": "optimizer.exp_avg_sq_dtype",
    "lr-warmup-iters": "optimizer.warmup_iters",
    "lr-decay-iters": "optimizer.decay_iters",
    "lr-decay-style": "optimizer.decay_style",
    "lr-wsd-decay-iters": "optimizer.wsd_decay_iters",
    "lr-wsd-decay-style": "optimizer.wsd_decay_style",
    "optimizer": "optimizer.kind",
    "muon-momentum": "optimizer.muon_momentum",
    "muon-num-ns-steps": "optimizer.muon_num_ns_steps",
    "muon-scale-mode": "optimizer.muon_scale_mode",
    "muon-extra-scale-factor": "optimizer.muon_extra_scale_factor",
    "muon-fp32-matmul-prec": "optimizer.muon_fp32_matmul_prec",
    "muon-tp-mode": "optimizer.muon_tp_mode",
    "lion-beta1": "optimizer.lion_beta1",
    "lion-beta2": "optimizer.lion_beta2",
    "train-iters": "training.train_iters",
    "global-batch-size": "training.global_batch_size",
    "micro-batch-size": "training.micro_batch_size",
    "seed": "training.seed",
    "recompute-granularity": "training.recompute_granularity",
    "recompute-method": "training.recompute_method",
    "recompute-num-layers": "training.recompute_num_layers",
    "recompute-modules": "training.recompute_modules",
    "log-interval": "training.log_interval",
    "eval-interval": "training.eval_interval",
    "eval-iters": "training.eval_iters",
    "save": "checkpoint.dir",
    "save-interval": "checkpoint.save_interval",
    "wandb-project": "observe.wandb.project",
    **dict(declared("megatron_flags")),
    "offload-modules": "megatron.offload_modules",
    "min-offloaded-tensor-size": "megatron.min_offloaded_tensor_size",
}
"""The setting of each argument with a value that means the same."""

SWITCHES = {
    "qk-layernorm": ("model.qk_layernorm", True),
    "add-qkv-bias": ("model.qkv_bias", True),
    "untie-embeddings-and-output-weights": ("model.tie_embeddings", False),
    "moe-shared-expert-gate": ("moe.shared_expert_gate", True),
    "moe-router-enable-expert-bias": ("moe.selection_bias", True),
    "sequence-parallel": ("parallel.sequence_parallel", True),
    "use-distributed-optimizer": ("parallel.use_distributed_optimizer", True),
    "overlap-grad-reduce": ("parallel.overlap_grad_reduce", True),
    "overlap-param-gather": ("parallel.overlap_param_gather", True),
    "overlap-moe-expert-parallel-comm": ("parallel.overlap_moe_expert_parallel_comm", True),
    "delay-wgrad-compute": ("parallel.delay_wgrad_compute", True),
    "bf16": ("precision.dtype", "bf16"),
    "grad-reduce-in-bf16": ("precision.grad_reduce_in_fp32", False),
    "fp8-param-gather": ("precision.fp8_param", True),
    "first-last-layers-bf16": ("precision.first_last_layers_bf16", True),
    "deterministic-mode": ("training.deterministic", True),
    "reset-position-ids": ("data.reset_position_ids", True),
    "reset-attention-mask": ("data.reset_attention_mask", True),
    "eod-mask-loss": ("data.eod_mask_loss", True),
    "async-save": ("checkpoint.async_save", True),
    "recompute-activations": ("training.recompute_granularity", "selective"),
    "moe-enable-deepep": ("moe.flex_backend", "deepep"),
    "fine-grained-activation-offloading": ("megatron.fine_grained_activation_offloading", True),
    "high-priority-a2a-comm-stream": ("megatron.high_priority_a2a_comm_stream", True),
    "ep-overlap-early-attn-memory-release": ("megatron.ep_overlap_early_attn_memory_release", True),
    "moe-permute-fusion-into-hybridep": ("megatron.moe_permute_fusion_into_hybridep", True),
    "fused-residual-rmsnorm": ("megatron.fused_residual_rmsnorm", True),
    "no-load-optim": ("checkpoint.load_optimizer", False),
    "finetune": ("checkpoint.load_optimizer", False),
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
    "hybrid-layer-pattern": "`model.num_layers` and `moe.layer_freq`, if each layer is attention "
    "and experts (`*E`) or a dense FFN (`*-`); `|` and `/` become chunks and multi-token layers",
    "load": "`checkpoint.load`: what `moepp convert megatron-lm` makes of the checkpoint",
}
"""Arguments whose setting is worked out, or has to be given by hand, and how."""


def setting_of(option: str) -> str | None:
    """The setting, such as `moe.router_topk`, that a Megatron option is; None if there is none.

    Args:
        option: The option as it is typed, such as `--moe-router-topk`.
    """
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
