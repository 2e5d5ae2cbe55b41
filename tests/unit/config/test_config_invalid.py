"""Every wrong configuration gives its own message: name with value, and remedy."""

from pathlib import Path

import pytest

from moepp_megatron.config import (
    ConfigError,
    Layout,
    check_config,
    check_world_size,
    checks,
    load_config,
)

DEDUP = "moe.dispatcher ('alltoall_dedup')"
SHARED, SHARED_NAME = "moe.constants_shared=true", "moe.constants_shared (true)"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
VANILLA = [
    "moe.num_zero_experts=0",
    "moe.num_copy_experts=0",
    "moe.num_constant_experts=0",
    "moe.gating_residual=false",
]
FP8 = ["precision.dtype=bf16", "precision.fp8=hybrid"]
FLEX = ["moe.dispatcher=flex", "parallel.expert_model_parallel_size=2"]
OVERLAP_NAME = "parallel.overlap_moe_expert_parallel_comm"
OVERLAP = [
    f"{OVERLAP_NAME}=true",
    "parallel.expert_model_parallel_size=2",
    "precision.dtype=bf16",
]
GRAPHS = ["training.cuda_graphs=[attn, moe_router]"]
GRAPHS_NAME = "training.cuda_graphs (['attn', 'moe_router'])"
BF16_ENDS = [*FP8, "precision.fp8_recipe=blockwise", "precision.first_last_layers_bf16=true"]
OVERLAPPED = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
LAYOUT = "parallel.pipeline_model_parallel_layout"
VPP = "parallel.virtual_pipeline_model_parallel_size"

LATENT = "model.latent_attention.kv_lora_rank=32"
LATENT_NAME = "model.latent_attention"
ALL_HEADS = "model.qk_layernorm_scope=all_heads"

MTP = "model.mtp_num_layers=1"

GUARD = "routing_guard.enabled=true"


def guard_rule(**keys: object) -> str:
    """An override with one rule of the routing guard."""
    rule = {"name": "mine", "metric": "ffn_fraction", "below": 0.2, **keys}
    text = ", ".join(f"{key}: {value}" for key, value in rule.items() if value is not None)
    return f"routing_guard.rules=[{{{text}}}]"


FIRST_FOLDER, FOLDER = "{path: data/a, weight: 3}", "{path: data/b, weight: 1}"
BLEND = f"data.blend=[{FIRST_FOLDER}, {FOLDER}]"
LAST = f"blend: [{FOLDER}]"

# (overrides on the minimal configuration, name with value, remedy)
INVALID = [
    # teacher
    (
        ["distillation.teacher=runs/t", "model.implementation=hybrid"],
        "model.implementation ('hybrid')",
        "use gpt",
    ),
    (
        ["distillation.teacher=runs/t", "distillation.weight=0", "distillation.text_weight=0"],
        "distillation.text_weight (0.0)",
        "leave one of them out",
    ),
    (["distillation.top_k=1000000"], "distillation.top_k (1000000)", "use fewer"),
    # blends and stages of data
    (
        [
            BLEND,
            f"data.stages=[{{from_step: 5, {LAST}}}]",
            "training.batch_ramp=[[0, 8], [1280, 16]]",
        ],
        "training.batch_ramp ([[0, 8], [1280, 16]])",
        "leave out one of the two",
    ),
    ([BLEND, "data.path=data/a"], "data.blend", "must be empty where data.path (data/a) is set"),
    ([f"data.stages=[{{from_step: 5, {LAST}}}]"], "data.stages", "set data.path or data.blend"),
    (["data.blend=[{path: a, weight: -1}]"], "data.blend[0].weight (-1)", "use 0 or more"),
    (["data.blend=[{path: a, weight: 0}]"], "data.blend ([0.0])", "use [{path: DIR, weight: 1}]"),
    (["data.blend=[{path: a}]"], "data.blend[0].weight (missing)", "must be given"),
    (
        [f"data.blend=[{FIRST_FOLDER}, {FIRST_FOLDER}]"],
        "data.blend[1].path ('data/a')",
        "add its weight",
    ),
    (
        ["data.blend=[{path: data/a, weight: 1}, {path: data/../data/a, weight: 1}]"],
        "data.blend[1].path",
        "must be another folder than those before it",
    ),
    (
        [BLEND, f"data.stages=[{{{LAST}}}]"],
        "data.stages[0] ({'from_step': None, 'from_tokens': None})",
        "must have one of from_step and from_tokens",
    ),
    (
        [BLEND, f"data.stages=[{{from_step: 5, from_tokens: 1e6, {LAST}}}]"],
        "data.stages[0]",
        "keep one of them",
    ),
    (
        [BLEND, f"data.stages=[{{from_step: 50, {LAST}}}, {{from_step: 50, {LAST}}}]"],
        "data.stages[1].from_step (50)",
        "must begin after step 50",
    ),
    # 20,480 tokens are 10 steps of 16 sequences of 128 tokens.
    (
        [BLEND, f"data.stages=[{{from_step: 10, {LAST}}}, {{from_tokens: 20480, {LAST}}}]"],
        "data.stages[1].from_tokens (20480.0)",
        "put the stages in order",
    ),
    (
        [BLEND, "data.stages=[{from_step: 5, blend: [{path: a, weight: 0}]}]"],
        "data.stages[0].blend ([0.0])",
        "at least one folder with a weight above 0",
    ),
    (
        [BLEND, "data.stages=[{from_step: 5, blend: [{path: a, weight: x}]}]"],
        "data.stages[0].blend[0].weight ('x')",
        "must be a number",
    ),
    (
        [BLEND, "data.stages=[{from_step: 5, blend: [{path: a, wieght: 1, weight: 2}]}]"],
        "data.stages[0].blend[0].wieght (1)",
        "did you mean weight?",
    ),
    (["data.validation={web: 3}"], "data.validation", "must be"),
    (["data.split='1,0,0'", BLEND], "data.split ('1,0,0')", "name sets in data.validation"),
    # routing guard
    (
        [guard_rule(metric="ffn_fractoin")],
        "routing_guard.rules[0].metric ('ffn_fractoin')",
        "use ffn_fraction",
    ),
    ([guard_rule(metric=None)], "routing_guard.rules[0].metric (null)", "use one of ffn_fraction"),
    ([guard_rule(metirc="loss")], "routing_guard.rules[0].metirc ('loss')", "did you mean metric?"),
    ([guard_rule(name=None)], "routing_guard.rules[0].name (missing)", "add name under"),
    ([guard_rule(below="low")], "routing_guard.rules[0].below ('low')", "without quotes"),
    ([guard_rule(action="panic")], "routing_guard.rules[0].action ('panic')", "must be one of"),
    ([guard_rule(for_steps=0)], "routing_guard.rules[0].for_steps (0)", "use 1 or more"),
    (["routing_guard.rules=[warn]"], "routing_guard.rules[0] ('warn')", "write it as {name: ...}"),
    (["routing_guard.rules=3"], "routing_guard.rules (3)", "write it as [a, b]"),
    ([guard_rule(above=0.1)], "routing_guard.rules[0].above (0.1)", "write for example below: 0.2"),
    ([guard_rule(below=None)], "routing_guard.rules[0].above (null)", "write for example"),
    ([guard_rule(clear=0.1)], "routing_guard.rules[0].clear (0.1)", "use 0.2 or leave it out"),
    (
        ["routing_guard.rules=[{name: data_shift}, {name: data_shift}]"],
        "routing_guard.rules[1].name ('data_shift')",
        "join the two",
    ),
    (
        [guard_rule(metric="gate_entropy"), "observe.health_interval=0"],
        "routing_guard.rules[0].metric ('gate_entropy')",
        "change observe.health_interval",
    ),
    (
        [guard_rule(metric="routing_shift"), "routing_guard.shift.window=0"],
        "routing_guard.rules[0].metric ('routing_shift')",
        "change routing_guard.shift.window",
    ),
    (
        [guard_rule(for_steps=15, of_steps=10)],
        "routing_guard.rules[0].of_steps (10)",
        "use 15, or leave it out",
    ),
    (["routing_guard=saef"], "routing_guard ('saef')", "use safe"),
    ([GUARD, *VANILLA], "routing_guard.enabled (true)", "add zero-computation experts"),
    (
        [GUARD, "moe.num_ffn_experts=1", "moe.router_topk=2"],
        "moe.router_topk (2)",
        "give rule collapse_to_zero_computation the action warn",
    ),
    (
        [GUARD, "moe.capacity_factor=1.1"],
        "moe.capacity_factor (1.1)",
        "give these rules the action warn",
    ),
    ([GUARD, *GRAPHS], GRAPHS_NAME, "take moe_router out"),
    (
        [GUARD, "model.implementation=hybrid", guard_rule(action="force_ffn")],
        "routing_guard.force_ffn.tokens ('high_loss')",
        "use all",
    ),
    (
        ["routing_guard.force_ffn.tokens=ids", "routing_guard.force_ffn.token_ids=[1, 512]"],
        "routing_guard.force_ffn.token_ids ([1, 512])",
        "take out 512",
    ),
    (
        ["routing_guard.force_ffn.tokens=ids"],
        "routing_guard.force_ffn.token_ids ([])",
        "name some",
    ),
    (
        [GUARD, "moe.balance_coeff=0"],
        "moe.balance_coeff (0.0)",
        "rules collapse_to_zero_computation, fall_of_ffn_experts, few_ffn_experts: tau acts",
    ),
    (
        [
            GUARD,
            guard_rule(action="rollback", for_steps=22),
            "checkpoint.save_interval=10",
            "checkpoint.keep=3",
        ],
        "checkpoint.keep (3)",
        "use 4, or null",
    ),
    (
        [GUARD, guard_rule(action="rollback")],
        "checkpoint.save_interval (0)",
        "give rule mine the action warn",
    ),
    (
        ["evaluation.tasks=[t.yaml]", *FP8],
        "evaluation.tasks (['t.yaml'])",
        "must have precision.fp8 (hybrid) null",
    ),
    (
        ["observe.webhook_url_env=https://example.com/secret"],
        "observe.webhook_url_env ('...')",
        "export MOEPP_WEBHOOK=ADDRESS",
    ),
    (
        ["observe.wandb.mode=disabled"],
        "observe.wandb.mode ('disabled')",
        "use online",
    ),
    (
        ["training.profile_steps=[99, 100, 101]"],
        "training.profile_steps ([99, 100, 101])",
        "use steps of this run",
    ),
    (["training.profile_steps=[0]"], "training.profile_steps ([0])", "use steps of this run"),
    (
        ["training.profile_steps=[10, 12]"],
        "training.profile_steps ([10, 12])",
        "use [10, 11]",
    ),
    # one field
    (["model.num_layers=0"], "model.num_layers (0)", "use 1 or more"),
    (["model.num_layers=4.5"], "model.num_layers (4.5)", "without quotes or decimals"),
    (["model.num_layers=4.0"], "model.num_layers (4.0)", "write 4"),
    (["model.hidden_size='64'"], "model.hidden_size ('64')", "without quotes or decimals"),
    (["model.hidden_size=null"], "model.hidden_size (null)", "without quotes or decimals"),
    (["model.seq_length=true"], "model.seq_length (true)", "without quotes or decimals"),
    (["model.vocab_size=1"], "model.vocab_size (1)", "use 2 or more"),
    (["model.tie_embeddings=1"], "model.tie_embeddings (1)", "write true or false"),
    (["model.norm_epsilon=1"], "model.norm_epsilon (1)", "such as the default 1e-05"),
    (["moe.tau=0"], "moe.tau (0)", "use a value above 0, such as the default 0.75"),
    (["moe.tau=fast"], "moe.tau ('fast')", "without quotes"),
    (["moe.constant_temperature=0"], "moe.constant_temperature (0)", "use a value above 0"),
    (["moe.constant_init=one"], "moe.constant_init ('one')", "must be one of normal, zero"),
    ([SHARED, *PP2], SHARED_NAME, "change parallel.pipeline_model_parallel_size"),
    ([SHARED, "model.implementation=hybrid"], SHARED_NAME, "change model.implementation"),
    (
        [
            SHARED,
            "parallel.expert_model_parallel_size=2",
            "precision.dtype=bf16",
            "parallel.overlap_moe_expert_parallel_comm=true",
        ],
        SHARED_NAME,
        "change parallel.overlap_moe_expert_parallel_comm",
    ),
    (["moe.tau=.nan"], "moe.tau (nan)", "write an ordinary number"),
    (["moe.num_ffn_experts=0"], "moe.num_ffn_experts (0)", "use 1 or more, such as the default 8"),
    (["moe.num_zero_experts=-1"], "moe.num_zero_experts (-1)", "use 0 or more"),
    (["moe.router_topk=0"], "moe.router_topk (0)", "use 1 or more, such as the default 2"),
    (["moe.balance_coeff=-0.1"], "moe.balance_coeff (-0.1)", "use 0.0 or more"),
    (["moe.capacity_factor=0"], "moe.capacity_factor (0)", "use a value above 0, or null"),
    (["moe.input_jitter_eps=1.0"], "moe.input_jitter_eps (1.0)", "use a value below 1.0, or null"),
    (["moe.dispatcher=all_gather"], "moe.dispatcher ('all_gather')", "use allgather"),
    (["moe.score_function=relu"], "moe.score_function ('relu')", "use softmax"),
    (["moe.gate_normalization=null"], "moe.gate_normalization (null)", "use none"),
    (["moe.fused=ture"], "moe.fused ('ture')", "must be one of auto, true, false; use true"),
    (["moe.layer_freq=often"], "moe.layer_freq ('often')", "write it as 1 or as [1, 0]"),
    (["precision.dtype=bfloat16"], "precision.dtype ('bfloat16')", "use bf16"),
    (["precision.fp8=e5m2"], "precision.fp8 ('e5m2')", "use e4m3"),
    (["optimizer.lr=0"], "optimizer.lr (0)", "use a value above 0"),
    (["optimizer.adam_beta2=1.0"], "optimizer.adam_beta2 (1.0)", "such as the default 0.95"),
    (["training.seed=-1"], "training.seed (-1)", "such as the default 1234"),
    (["training.log_interval=0"], "training.log_interval (0)", "such as the default 1"),
    (
        ["training.recompute_modules=moe"],
        "training.recompute_modules ('moe')",
        "write it as [a, b]",
    ),
    (["training.recompute_modules=[1]"], "training.recompute_modules ([1])", "put it in quotes"),
    (["run.dir=2024"], "run.dir (2024)", "put it in quotes"),
    (["run.name=''"], "run.name ('')", "give it a value"),
    (["data.split=98"], "data.split (98)", "put it in quotes"),
    (["data.path=[a, b]"], "data.path (['a', 'b'])", "give one value instead of a list"),
    (["run.name={a: b}"], "run.name ({'a': 'b'})", "give one value instead of a mapping"),
    (["model.num_layers=[2]"], "model.num_layers ([2])", "give one value instead of a list"),
    (["checkpoint.keep=0"], "checkpoint.keep (0)", "use 1 or more, or null"),
    ([f"{VPP}=1"], f"{VPP} (1)", "use 2 or more, or null"),
    # model
    (["model.hidden_size=60"], "model.hidden_size (60)", "use 56 or 64"),
    (["model.hidden_size=56"], "model.hidden_size (56)", "use 64"),
    (["model.kv_channels=7"], "model.kv_channels (7)", "use 8"),
    (["model.num_query_groups=3"], "model.num_query_groups (3)", "use one of 1, 2, 4, 8"),
    (
        [ALL_HEADS],
        "model.qk_layernorm_scope ('all_heads')",
        "use 'head', or set model.qk_layernorm to true",
    ),
    (
        [LATENT, f"{LATENT_NAME}.q_lora_rank=16", "model.qk_layernorm=true", ALL_HEADS],
        "model.qk_layernorm_scope ('all_heads')",
        "use 'head', or set model.latent_attention to null",
    ),
    (["model.latent_attention={}"], f"{LATENT_NAME}.kv_lora_rank (missing)", "add kv_lora_rank"),
    ([f"{LATENT_NAME}.kv_lora_rank=0"], f"{LATENT_NAME}.kv_lora_rank (0)", "use 1 or more"),
    ([LATENT, f"{LATENT_NAME}.rope_type=yaml"], f"{LATENT_NAME}.rope_type ('yaml')", "use yarn"),
    (
        [LATENT, f"{LATENT_NAME}.qk_pos_emb_head_dim=5"],
        f"{LATENT_NAME}.qk_pos_emb_head_dim (5)",
        "use 6",
    ),
    (
        [LATENT, f"{LATENT_NAME}.rope_type=yarn", f"{LATENT_NAME}.beta_slow=32.0"],
        f"{LATENT_NAME}.beta_slow (32.0)",
        "use 1.0 and 32.0",
    ),
    ([LATENT, "model.num_query_groups=2"], "model.num_query_groups (2)", "leave model.num_query"),
    ([LATENT, "model.kv_channels=16"], "model.kv_channels (16)", "leave model.kv_channels out"),
    ([LATENT, "model.qk_layernorm=true"], "model.qk_layernorm (true)", "or give model.latent"),
    ([LATENT, "model.implementation=hybrid"], "model.implementation ('hybrid')", "use 'gpt'"),
    ([LATENT, "model.qkv_bias=true"], "model.qkv_bias (true)", "use false, or set model.latent"),
    (
        ["moe.shared_expert_gate=true"],
        "moe.shared_expert_gate (true)",
        "use false, or give moe.shared_expert_ffn_hidden_size",
    ),
    (
        [LATENT, *FP8, "precision.fp8_param=true"],
        "precision.fp8_param (true)",
        "use false, or set model.latent_attention to null",
    ),
    (
        [
            LATENT,
            *FP8,
            "training.recompute_granularity=selective",
            "training.recompute_modules=[mla_up_proj]",
        ],
        "training.recompute_modules (['mla_up_proj'])",
        "leave mla_up_proj out, or set precision.fp8 to null",
    ),
    (
        ["model.latent_attention.kv_lora_rank=24", *FP8],
        f"{LATENT_NAME}.kv_lora_rank (24)",
        "use multiples of 16 for all widths of model.latent_attention",
    ),
    # multi-token prediction
    (
        [MTP, "model.implementation=hybrid"],
        "model.implementation ('hybrid')",
        "use 'gpt', or set model.mtp_num_layers to 0",
    ),
    ([MTP, SHARED], SHARED_NAME, "use false, or set model.mtp_num_layers to 0"),
    (
        [MTP, *PP2, "model.tie_embeddings=true"],
        "model.tie_embeddings (true)",
        "use false, or set model.mtp_num_layers to 0",
    ),
    ([MTP, *OVERLAP], f"{OVERLAP_NAME} (true)", "use false, or set model.mtp_num_layers to 0"),
    ([MTP, *GRAPHS], GRAPHS_NAME, "use [], or set model.mtp_num_layers to 0"),
    (
        [MTP, *FP8, "precision.fp8_param=true"],
        "precision.fp8_param (true)",
        "use false, or set model.mtp_num_layers to 0",
    ),
    (
        [
            MTP,
            "training.recompute_granularity=full",
            "training.recompute_method=uniform",
            "training.recompute_num_layers=2",
        ],
        "training.recompute_num_layers (2)",
        "use 1, or set model.mtp_num_layers to 0",
    ),
    ([MTP, *PP2, f"{LAYOUT}=Ett|ttL"], f"{LAYOUT} ('Ett|ttL')", "write it as often, before L"),
    ([MTP, *PP2, f"{LAYOUT}=Etttt|mL"], f"{LAYOUT} ('Etttt|mL')", "write tmL at the end"),
    ([*PP2, f"{LAYOUT}=Ett|ttmL"], f"{LAYOUT} ('Ett|ttmL')", "write it as often, before L"),
    # groups of experts
    (["moe.num_groups=3"], "moe.num_groups (3)", "use a divisor of it, or 1 for no groups"),
    (["moe.group_topk=2"], "moe.group_topk (2)", "use 1 or less"),
    (["moe.num_groups=4", "moe.group_topk=3"], "moe.group_topk (3)", "use 2 or less"),
    (
        ["moe.num_groups=4", "moe.router_topk=3"],
        "moe.group_topk (1)",
        "use more, or fewer moe.num_groups",
    ),
    (
        [*VANILLA, "moe.num_groups=4", "moe.gate_normalization=selected"],
        "moe.num_groups (4)",
        "use moe.gate_normalization none or moe.score_function sigmoid",
    ),
    (
        ["training.recompute_granularity=selective", "training.recompute_modules=[mla_up_proj]"],
        "training.recompute_modules (['mla_up_proj'])",
        "leave mla_up_proj out, or give model.latent_attention",
    ),
    # experts and routing
    (["moe.router_topk=13"], "moe.router_topk (13)", "use 12 or less"),
    (
        ["moe.router_topk=1", "moe.gate_normalization=selected"],
        "moe.gate_normalization ('selected')",
        "use none",
    ),
    (["moe.layer_freq=0"], "moe.layer_freq (0)", "use 1"),
    (["moe.layer_freq=[1, 0]"], "moe.layer_freq ([1, 0])", "write 4 entries of 0 or 1"),
    (["moe.layer_freq=[1, 2, 1, 1]"], "moe.layer_freq ([1, 2, 1, 1])", "write 1 for an MoE layer"),
    (["moe.layer_freq=[0, 0, 0, 0]"], "moe.layer_freq ([0, 0, 0, 0])", "set one entry to 1"),
    ([*VANILLA, "moe.two_layer_gate=true"], "moe.two_layer_gate (true)", "drop moe.two_layer_gate"),
    (
        [*VANILLA, "moe.expert_input_scale=2.0"],
        "moe.expert_input_scale (2.0)",
        "add zero-computation experts",
    ),
    (["moe.dispatcher=flex"], "moe.dispatcher ('flex')", "use alltoall"),
    (
        [*VANILLA, "moe.dispatcher=alltoall_dedup", "parallel.expert_model_parallel_size=2"],
        DEDUP,
        "add zero-computation experts",
    ),
    (
        [*FLEX, "model.hidden_size=36", "model.num_attention_heads=6"],
        "model.hidden_size (36) must be divisible by 8 for moe.dispatcher flex",
        "use 32 or 40",
    ),
    ([*FLEX, "moe.flex_num_sms=21"], "moe.flex_num_sms (21)", "use 20 or 22"),
    (["moe.flex_num_sms=0"], "moe.flex_num_sms (0)", "use 2 or more, or null"),
    (["moe.flex_backend=ncclep"], "moe.flex_backend ('ncclep')", "use"),
    (
        [*FLEX, "moe.flex_backend=hybridep", "model.seq_length=127"],
        "training.micro_batch_size (2) must give each rank a number of tokens (254)",
        "use 4, or moe.flex_backend deepep",
    ),
    # overlap of the all-to-all with other micro-batches
    (
        [*OVERLAP, "parallel.expert_model_parallel_size=1"],
        f"{OVERLAP_NAME} (true) must have parallel.expert_model_parallel_size (1) above 1",
        "to false",
    ),
    (
        [*OVERLAP, "precision.dtype=fp32"],
        f"{OVERLAP_NAME} (true) must have precision.dtype (fp32) bf16",
        "to false",
    ),
    (
        [*OVERLAP, "moe.dispatcher=allgather"],
        f"{OVERLAP_NAME} (true) must have moe.dispatcher (allgather) alltoall or flex",
        "to false",
    ),
    (
        [*OVERLAP, *PP2],
        f"{OVERLAP_NAME} (true) must have {VPP} (null) 2 or more",
        "to false",
    ),
    (
        [
            *OVERLAP,
            "training.recompute_granularity=full",
            "training.recompute_method=uniform",
            "training.recompute_num_layers=1",
        ],
        f"{OVERLAP_NAME} (true) must have training.recompute_granularity (full) null or selective",
        "to false",
    ),
    (
        [*OVERLAP, "training.recompute_granularity=selective"],
        f"{OVERLAP_NAME} (true) must have training.recompute_modules (['moe']) without moe",
        "to false",
    ),
    (
        [*OVERLAP, "model.implementation=hybrid"],
        f"{OVERLAP_NAME} (true) must have model.implementation (hybrid) gpt",
        "to false",
    ),
    # the loss
    (
        ["precision.cross_entropy=native", "precision.dtype=fp32"],
        "precision.cross_entropy ('native') must have precision.dtype (fp32) bf16, because",
        "use auto",
    ),
    # CUDA graphs
    (
        ["training.cuda_graphs=[moe]"],
        "training.cuda_graphs (['moe']) must hold only attn and moe_router, because of moe: an",
        "use [attn, moe_router]",
    ),
    (
        ["training.cuda_graphs=[attn, atn]"],
        "training.cuda_graphs (['attn', 'atn'])",
        "use [attn, moe_router]",
    ),
    (
        [*GRAPHS, "data.reset_attention_mask=true"],
        "data.reset_attention_mask (true) must be false with training.cuda_graphs (attn, moe_rout",
        "set training.cuda_graphs to [], or data.reset_attention_mask to false",
    ),
    (["training.cuda_graphs=attn"], "training.cuda_graphs ('attn')", "write it as [a, b]"),
    (
        [*GRAPHS, "training.recompute_granularity=selective"],
        f"{GRAPHS_NAME} must have training.recompute_granularity (selective) null",
        "to []",
    ),
    (
        [*GRAPHS, *OVERLAP],
        f"{GRAPHS_NAME} must have {OVERLAP_NAME} (true) false",
        "to []",
    ),
    (
        [*GRAPHS, "model.implementation=hybrid"],
        f"{GRAPHS_NAME} must have model.implementation (hybrid) gpt",
        "to []",
    ),
    (
        [*GRAPHS, *VANILLA],
        f"{GRAPHS_NAME} must have zero-computation experts or moe.gating_residual",
        "to []",
    ),
    ([*GRAPHS, *FP8], f"{GRAPHS_NAME} must have precision.fp8 (hybrid) null", "to []"),
    ([*GRAPHS, "moe.z_loss_coeff=0.1"], f"{GRAPHS_NAME} must have moe.z_loss_coeff (0.1)", "to []"),
    (
        [*GRAPHS, "moe.input_jitter_eps=0.1"],
        f"{GRAPHS_NAME} must have moe.input_jitter_eps (0.1) null",
        "to []",
    ),
    # layout
    (
        ["moe.num_ffn_experts=6", "parallel.expert_model_parallel_size=4"],
        "moe.num_ffn_experts (6) must be divisible by parallel.expert_model_parallel_size (4)",
        "use 4 or 8",
    ),
    (
        ["parallel.tensor_model_parallel_size=2"],
        "parallel.sequence_parallel (false)",
        "set parallel.sequence_parallel to true",
    ),
    (
        [*TP2, "model.num_attention_heads=1"],
        "model.num_attention_heads (1)",
        "use 2",
    ),
    ([*TP2, "model.vocab_size=511"], "model.vocab_size (511)", "use 510 or 512"),
    ([*TP2, "model.seq_length=127"], "model.seq_length (127)", "use 126 or 128"),
    (
        [*TP2, "moe.layer_freq=2", "model.ffn_hidden_size=129"],
        "model.ffn_hidden_size (129)",
        "use 128 or 130",
    ),
    (
        [*TP2, "moe.shared_expert_ffn_hidden_size=33"],
        "moe.shared_expert_ffn_hidden_size (33)",
        "use 32 or 34",
    ),
    (
        [
            "parallel.tensor_model_parallel_size=4",
            "parallel.sequence_parallel=true",
            "model.num_attention_heads=12",
            "model.hidden_size=96",
            "model.num_query_groups=6",
        ],
        "model.num_query_groups (6)",
        "use 4",
    ),
    (
        ["parallel.expert_tensor_parallel_size=3"],
        "model.ffn_hidden_size (128)",
        "use 126 or 129",
    ),
    (
        ["parallel.context_parallel_size=2", "model.seq_length=130"],
        "model.seq_length (130)",
        "use 128 or 132",
    ),
    (
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=false"],
        "parallel.overlap_param_gather (true)",
        "set parallel.overlap_grad_reduce to true",
    ),
    (
        [
            "parallel.overlap_param_gather=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.use_distributed_optimizer=false",
        ],
        "parallel.overlap_param_gather (true)",
        "set parallel.use_distributed_optimizer to true",
    ),
    ([f"{VPP}=2"], f"{VPP} (2)", "use null"),
    ([*PP2, "model.num_layers=5"], "model.num_layers (5)", "use 4 or 6"),
    ([*PP2, f"{VPP}=2", "model.num_layers=6"], "model.num_layers (6)", "use 4 or 8"),
    ([*PP2, f"{LAYOUT}=Ett|txL"], f"{LAYOUT} ('Ett|txL')", "write for example Ett|tt|ttL"),
    ([*PP2, f"{LAYOUT}=Et*99999999|L"], f"{LAYOUT} ('Et*99999999|L')", "write for example"),
    ([*PP2, f"{LAYOUT}=tt|ttL"], f"{LAYOUT} ('tt|ttL')", "write for example Ett|tt|ttL"),
    ([*PP2, f"{LAYOUT}=Ett|tL"], f"{LAYOUT} ('Ett|tL')", "write t 4 times in all"),
    ([*PP2, f"{LAYOUT}=Ett|t|tL"], f"{LAYOUT} ('Ett|t|tL')", "write 2 stages separated by |"),
    (
        [*PP2, f"{VPP}=2", f"{LAYOUT}=Ett|ttL"],
        f"{LAYOUT} ('Ett|ttL')",
        "write 4 stages separated by |",
    ),
    ([f"{LAYOUT}=Ett|ttL"], f"{LAYOUT} ('Ett|ttL')", "write 1 stages"),
    # precision, optimizer, training
    (["precision.fp8=e4m3"], "precision.fp8 ('e4m3')", "set precision.dtype to bf16"),
    (
        ["precision.fp8_recipe=delayed"],
        "precision.fp8_recipe ('delayed')",
        "set precision.fp8 to e4m3 or hybrid",
    ),
    ([*FP8, "model.hidden_size=72", "model.num_attention_heads=4"], "model.hidden_size (72)", "80"),
    ([*FP8, "moe.ffn_hidden_size=100"], "moe.ffn_hidden_size (100)", "use 96 or 112"),
    (
        [*FP8, "parallel.expert_tensor_parallel_size=4", "model.ffn_hidden_size=96"],
        "model.ffn_hidden_size (96)",
        "use 64 or 128",
    ),
    (
        [*FP8, *TP2, "moe.shared_expert_ffn_hidden_size=48"],
        "moe.shared_expert_ffn_hidden_size (48)",
        "use 32 or 64",
    ),
    (
        [*FP8, *TP2, "moe.layer_freq=2", "model.ffn_hidden_size=112", "moe.ffn_hidden_size=96"],
        "model.ffn_hidden_size (112)",
        "use 96 or 128",
    ),
    (
        [*FP8, "parallel.tensor_model_parallel_size=8", "parallel.sequence_parallel=true"],
        "model.num_attention_heads (8)",
        "use heads of 16 channels or more",
    ),
    ([*FP8, "model.seq_length=140"], "model.seq_length (140)", "use a multiple of 16"),
    ([*FP8, *TP2, "model.seq_length=148"], "model.seq_length (148)", "use a multiple of 32"),
    (
        ["precision.fp8_param=true"],
        "precision.fp8_param (true)",
        "or leave precision.fp8_param out",
    ),
    (
        ["precision.first_last_layers_bf16=true"],
        "precision.first_last_layers_bf16 (true)",
        "set precision.fp8 to e4m3 or hybrid",
    ),
    (
        [*FP8, "precision.fp8_recipe=mxfp8"],
        "precision.fp8_recipe ('mxfp8')",
        "use blockwise",
    ),
    ([*FP8, "precision.fp8_recipe=nvfp4"], "precision.fp8_recipe ('nvfp4')", "use null"),
    (
        [*FP8, "precision.fp8_param=true", "parallel.use_distributed_optimizer=false"],
        "precision.fp8_param (true)",
        "set parallel.use_distributed_optimizer to true",
    ),
    (
        [*FP8, "precision.first_last_layers_bf16=true"],
        "precision.first_last_layers_bf16 (true)",
        "use precision.fp8_recipe tensorwise or blockwise",
    ),
    (
        [*BF16_ENDS, *PP2, "precision.num_layers_at_end_in_bf16=3"],
        "precision.num_layers_at_end_in_bf16 (3)",
        "use 1",
    ),
    (
        [*BF16_ENDS, "precision.num_layers_at_start_in_bf16=3"],
        "precision.num_layers_at_start_in_bf16 (3)",
        "set precision.fp8 to null",
    ),
    (["precision.fp8_margin=-1"], "precision.fp8_margin (-1)", "use 0 or more"),
    (["precision.fp8_amax_history_len=0"], "precision.fp8_amax_history_len (0)", "use 1 or more"),
    (["optimizer.min_lr=0.1"], "optimizer.min_lr (0.1)", "a tenth of optimizer.lr"),
    (["optimizer.warmup_iters=100"], "optimizer.warmup_iters (100)", "use 10, or raise training"),
    (
        ["optimizer.warmup_iters=50", "optimizer.decay_iters=40"],
        "optimizer.warmup_iters (50)",
        "raise optimizer.decay_iters",
    ),
    (["optimizer.decay_style=WSD"], "optimizer.wsd_decay_iters (null)", "use 20"),
    (
        ["optimizer.decay_style=WSD", "optimizer.warmup_iters=60", "optimizer.wsd_decay_iters=41"],
        "optimizer.wsd_decay_iters (41)",
        "use 8",
    ),
    (
        ["optimizer.decay_style=inverse-square-root"],
        "optimizer.warmup_iters (0)",
        "use 1",
    ),
    (["optimizer.kind=muon"], "parallel.use_distributed_optimizer (true)", "to bf16"),
    (
        ["optimizer.kind=muon", "precision.dtype=bf16", *OVERLAPPED],
        "parallel.overlap_param_gather (true)",
        "optimizer.kind to adam",
    ),
    (
        ["optimizer.kind=lion", *FP8, "precision.fp8_param=true"],
        "precision.fp8_param (true)",
        "optimizer.kind to adam",
    ),
    (
        ["parallel.delay_wgrad_compute=true"],
        "parallel.delay_wgrad_compute (true)",
        "set that to true, or parallel.delay_wgrad_compute to false",
    ),
    (
        ["optimizer.kind=lion", "optimizer.exp_avg_dtype=bf16", "precision.dtype=bf16"],
        "optimizer.exp_avg_dtype ('bf16')",
        "set optimizer.kind to adam, or optimizer.exp_avg_dtype to fp32",
    ),
    (
        [
            "optimizer.exp_avg_dtype=bf16",
            "precision.dtype=bf16",
            "parallel.use_distributed_optimizer=false",
        ],
        "optimizer.exp_avg_dtype ('bf16')",
        "set that to true",
    ),
    (
        ["optimizer.exp_avg_sq_dtype=bf16"],
        "optimizer.exp_avg_sq_dtype ('bf16')",
        "set that to bf16, or optimizer.exp_avg_sq_dtype to fp32",
    ),
    (
        ["optimizer.exp_avg_dtype=bf16", *FP8, "precision.fp8_param=true"],
        "optimizer.exp_avg_dtype ('bf16')",
        "precision.fp8_recipe to tensorwise or blockwise",
    ),
    (
        [
            "optimizer.exp_avg_sq_dtype=bf16",
            "precision.dtype=bf16",
            "optimizer.adam_beta2=0.999",
        ],
        "optimizer.adam_beta2 (0.999)",
        "use 0.95, or set optimizer.exp_avg_sq_dtype to fp32",
    ),
    (
        ["optimizer.exp_avg_dtype=fp8"],
        "optimizer.exp_avg_dtype ('fp8')",
        "must be one of fp32, bf16; use fp32",
    ),
    (["training.batch_ramp=[]"], "training.batch_ramp ([])", "[1000000, 16]]"),
    (["training.batch_ramp=[[0, 8, 1]]"], "training.batch_ramp ([[0, 8, 1]])", "use for example"),
    (
        ["training.batch_ramp=[[0, 8], [127, 16]]"],
        "training.batch_ramp ([[0, 8], [127, 16]])",
        "use for example",
    ),
    (
        ["training.batch_ramp=[[0, 8], [1280, 12]]"],
        "training.batch_ramp ([[0, 8], [1280, 12]])",
        "use for example",
    ),
    (
        ["training.batch_ramp=[[0, 3], [1280, 16]]", "training.micro_batch_size=2"],
        "training.batch_ramp (3)",
        "training.micro_batch_size to 1",
    ),
    (["training.micro_batch_size=3"], "training.global_batch_size (16)", "use 15 or 18"),
    (
        ["training.recompute_granularity=full", "training.recompute_num_layers=1"],
        "training.recompute_method (null)",
        "use uniform or block",
    ),
    (
        ["training.recompute_granularity=full", "training.recompute_method=uniform"],
        "training.recompute_num_layers (null)",
        "use 1",
    ),
    (
        [
            "training.recompute_granularity=full",
            "training.recompute_method=block",
            "training.recompute_num_layers=5",
        ],
        "training.recompute_num_layers (5)",
        "use 1",
    ),
    (
        ["training.recompute_granularity=selective", "training.recompute_method=block"],
        "training.recompute_method ('block')",
        "set training.recompute_method to null",
    ),
    (
        ["training.recompute_granularity=selective", "training.recompute_modules=[attention]"],
        "training.recompute_modules (['attention'])",
        "use [moe]",
    ),
    (
        ["training.recompute_granularity=selective", "training.recompute_modules=[]"],
        "training.recompute_modules ([])",
        "use [moe]",
    ),
    (
        [*FP8, "training.recompute_granularity=selective", "training.recompute_modules=[moe_act]"],
        "training.recompute_modules (['moe_act'])",
        "set precision.fp8_recipe to tensorwise or blockwise",
    ),
    # data, checkpoint
    (["data.split=98,2"], "data.split ('98,2')", "use '98,2,0'"),
    (["data.split=98,-2,4"], "data.split ('98,-2,4')", "use '98,2,0'"),
    (["data.split=a,b,c"], "data.split ('a,b,c')", "use '98,2,0'"),
    (["data.split=0,1,1"], "data.split ('0,1,1')", "use '98,2,0'"),
    (["data.split=1,0,0"], "data.split ('1,0,0')", "set training.eval_iters to 0"),
    (
        ["checkpoint.async_save=true"],
        "checkpoint.async_save (true)",
        "set checkpoint.save_interval to a number of steps",
    ),
    # resilience
    (["resilience.guard=1"], "resilience.guard (1)", "write true or false"),
    (["resilience.guard_window=4"], "resilience.guard_window (4)", "such as the default 128"),
    (["resilience.guard_threshold=0"], "resilience.guard_threshold (0)", "use a value above 0"),
    (
        ["resilience.guard_max_consecutive_skips=0"],
        "resilience.guard_max_consecutive_skips (0)",
        "such as the default 5",
    ),
    (["resilience.guard_max_rollbacks=-1"], "resilience.guard_max_rollbacks (-1)", "use 0 or more"),
    (["resilience.divergence_interval=-1"], "resilience.divergence_interval (-1)", "use 0 or more"),
    (["resilience.hang_timeout_s=-1"], "resilience.hang_timeout_s (-1)", "use 0 or more"),
    (["resilience.hang_timeout_s=0.5"], "resilience.hang_timeout_s (0.5)", "use 600.0, or 0.0"),
    (
        ["resilience.hang_slow_phase_timeout_s=60"],
        "resilience.hang_slow_phase_timeout_s (60.0)",
        "use 600.0 or more",
    ),
    (["resilience.straggler_interval=-1"], "resilience.straggler_interval (-1)", "use 0 or more"),
    (
        ["resilience.straggler_threshold=1"],
        "resilience.straggler_threshold (1)",
        "use a value above 1",
    ),
    # slurm
    (["slurm.partition=a b"], "slurm.partition ('a b')", "use a name that this cluster has"),
    (['slurm.exclude="n1\\n#"'], "slurm.exclude ('n1\\n#')", "use a name that this cluster has"),
    (["slurm.time=soon"], "slurm.time ('soon')", 'write for example "4:00:00"'),
    (["slurm.time=4:00:00"], "slurm.time (14400)", "put it in quotes"),
    (["slurm.options=[-n2]"], "slurm.options ('-n2')", "write it as --name=value"),
    (['slurm.options=["--a=b\\nc"]'], "slurm.options ('--a=b\\nc')", "write it as --name=value"),
    (["slurm.min_nodes=3"], "slurm.min_nodes (3)", "use 1 or less, or null"),
    (["slurm.container=pyxis"], "slurm.container_image (null)", "or use slurm.container none"),
    (["slurm.container_image=x"], "slurm.container_image ('x')", "set slurm.container"),
    (
        ["slurm.container_mounts=['a:b,c']"],
        "slurm.container_mounts ('a:b,c')",
        "mount a folder whose name has none",
    ),
    # the budget, a section inside a section
    (["moe.budget.gain=0"], "moe.budget.gain (0)", "use a value above 0, or null"),
    (["moe.budget.controller=pid"], "moe.budget.controller ('pid')", "one of none, bias, tau"),
    (["moe.budget=3"], "moe.budget must be a mapping", "moe.budget.KEY=VALUE"),
    (["moe.budget.gian=1.0"], "unknown key moe.budget.gian", "did you mean moe.budget.gain?"),
    (["moe.controller=tau"], "unknown key moe.controller", "did you mean moe.budget.controller?"),
    (
        ["moe.budget.target_ffn_per_token=2.0"],
        "moe.budget.target_ffn_per_token (2.0)",
        "use for example 1.5",
    ),
    (
        ["moe.budget.start_ffn_per_token=2.5", "moe.budget.target_ffn_per_token=1.0"],
        "moe.budget.start_ffn_per_token (2.5)",
        "use for example 1.5",
    ),
    (
        [*VANILLA, "moe.budget.target_ffn_per_token=1.0"],
        "moe.budget.target_ffn_per_token (1.0)",
        "add zero-computation experts",
    ),
    (
        [
            "moe.router_topk=4",
            "moe.num_constant_experts=0",
            "moe.budget.target_ffn_per_token=2.0",
        ],
        "moe.budget.target_ffn_per_token (2.0)",
        "use for example 3.5",
    ),
    (
        ["moe.num_ffn_experts=2", "moe.router_topk=4", "moe.budget.target_ffn_per_token=2.5"],
        "moe.budget.target_ffn_per_token (2.5)",
        "use for example 1.5",
    ),
    (["moe.budget.response=0"], "moe.budget.response (0)", "use a value above 0"),
    (["moe.budget.response=1.5"], "moe.budget.response (1.5)", "use 1.0 or less"),
    (
        ["moe.budget.controller=tau", "moe.balance_coeff=0.0"],
        "moe.balance_coeff (0.0)",
        "use 0.01",
    ),
    (
        ["moe.budget.controller=tau", "moe.capacity_factor=1.1"],
        "moe.capacity_factor (1.1)",
        "use null",
    ),
    # names and form
    (
        ["moe.num_ffn_expert=4"],
        "unknown key moe.num_ffn_expert",
        "did you mean moe.num_ffn_experts?",
    ),
    (["model.tau=0.5"], "unknown key model.tau", "did you mean moe.tau?"),
    (["optimizer.name=adam"], "unknown key optimizer.name", "optimizer has lr, min_lr"),
    (["optimizer.algorithm=adam"], "unknown key optimizer.algorithm", "optimizer has lr, min_lr"),
    (["checkpoint.path=x"], "unknown key checkpoint.path", "checkpoint has dir"),
    (["checkpoint.lod=x"], "unknown key checkpoint.lod", "did you mean checkpoint.load?"),
    (
        ["moe.hidden_size=8"],
        "unknown key moe.hidden_size",
        "did you mean moe.ffn_hidden_size or model.hidden_size?",
    ),
    (
        ["evaluation.tasks=[tasks]", "training.cuda_graphs=[attn]"],
        "evaluation.tasks (['tasks'])",
        "evaluate the exported model with lm_eval run",
    ),
    (
        ["distillation.teacher=runs/teacher", "data.reset_attention_mask=true"],
        "data.reset_attention_mask (true)",
        "leave one of the two out",
    ),
    (
        ["distillation.teacher=runs/teacher", "model.mtp_num_layers=1"],
        "model.mtp_num_layers (1)",
        "leave one of the two out",
    ),
    (
        ["moe.top_k=1"],
        "unknown key moe.top_k",
        "did you mean moe.router_topk or distillation.top_k?",
    ),
    (["parallel.num_nodes=2"], "unknown key parallel.num_nodes", "parallel has tensor_model"),
    (["optimiser.lr=1.0"], "unknown section optimiser", "did you mean optimizer?"),
    (["cluster.nodes=2"], "unknown section cluster", "the sections are run, model"),
    (["tau=0.5"], "unknown section tau", "did you mean the key moe.tau?"),
    (["moe.tau"], "override 'moe.tau'", "write for example moe.tau=0.5"),
    (["moe=1"], "override 'moe=1'", "write for example moe.tau=0.5"),
    (["moe.tau="], "override 'moe.tau='", "write the value, or null"),
    (["moe.tau=[1"], "override 'moe.tau=[1', line 1", "not valid YAML"),
]


@pytest.mark.parametrize(("overrides", "name_and_value", "remedy"), INVALID)
def test_invalid_setting(
    minimal: Path, overrides: list[str], name_and_value: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, "one mistake gives one line"
    assert message.startswith(name_and_value)
    assert remedy in message.removeprefix(name_and_value)


# (overrides, ranks, name with value, remedy)
INVALID_WORLD_SIZE = [
    (
        ["training.profile_steps=[10]", "training.profile_ranks=[0, 4]"],
        4,
        "training.profile_ranks ([0, 4])",
        "use null for all",
    ),
    ([], 0, "world size (0)", "start 1 rank or more"),
    (TP2, 3, "world size (3)", "start 2 or 4 ranks"),
    ([*TP2, *PP2], 6, "world size (6)", "start 4 or 8 ranks"),
    (["parallel.context_parallel_size=4"], 2, "world size (2)", "start 4 ranks"),
    (["parallel.expert_model_parallel_size=4"], 6, "world size (6)", "start 4 or 8 ranks"),
    (
        ["parallel.expert_model_parallel_size=2", "parallel.expert_tensor_parallel_size=2"],
        2,
        "world size (2)",
        "start 4 ranks",
    ),
    ([], 3, "training.global_batch_size (16)", "use 12 or 18"),
    (["training.batch_ramp=[[0, 2], [1280, 16]]"], 4, "training.batch_ramp (2)", "use 8"),
    (
        [*PP2, f"{VPP}=2", "training.global_batch_size=6"],
        2,
        "training.global_batch_size (6)",
        "use 4 or 8",
    ),
    (
        [*PP2, f"{LAYOUT}=Et|t|t|tL", "training.global_batch_size=6"],
        2,
        "training.global_batch_size (6)",
        "use 4 or 8",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "world_size", "name_and_value", "remedy"), INVALID_WORLD_SIZE
)
def test_invalid_world_size(
    minimal: Path, overrides: list[str], world_size: int, name_and_value: str, remedy: str
) -> None:
    config = load_config(minimal, overrides)
    for check in (check_world_size, Layout.from_config):
        with pytest.raises(ConfigError) as caught:
            check(config, world_size)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert message.startswith(name_and_value)
        assert remedy in message.removeprefix(name_and_value)


def test_every_rule_is_broken_by_a_case_above(
    minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = set()

    def recording(rule):
        def recorded(*args):
            for problem in rule(*args):
                broken.add(rule.__name__)
                yield problem

        return recorded

    rules = (*checks.RULES, *checks.IGNORED, *checks.WORLD_SIZE_RULES, *checks.WORLD_SIZE_IGNORED)
    for name in ("RULES", "IGNORED", "WORLD_SIZE_RULES", "WORLD_SIZE_IGNORED"):
        monkeypatch.setattr(checks, name, tuple(map(recording, getattr(checks, name))))
    for overrides, *_ in INVALID:
        with pytest.raises(ConfigError):
            load_config(minimal, overrides)
    for overrides, world_size, *_ in INVALID_WORLD_SIZE:
        with pytest.raises(ConfigError):
            check_world_size(load_config(minimal, overrides), world_size)
    for overrides, *_ in IGNORED:
        check_config(load_config(minimal, overrides))
    check_world_size(load_config(minimal, ["parallel.overlap_grad_reduce=true"]), 1)
    assert {rule.__name__ for rule in rules} - broken == set()


# (text of the file, fragments of the message)
INVALID_FILES = [
    ("", ["bad.yaml", "is empty", "write sections"]),
    ("# only a comment\n", ["bad.yaml", "is empty"]),
    ("- a\n- b\n", ["bad.yaml", "not a list", "write sections"]),
    ("just text\n", ["bad.yaml", "not a single value"]),
    ("model:\n  num_layers: [1\n", ["bad.yaml, line 3", "not valid YAML"]),
    ("model:\n\tnum_layers: 1\n", ["bad.yaml, line 2", "not valid YAML"]),
    ("moe:\n  tau: 1.0\n  tau: 0.5\n", ["bad.yaml, line 3", "'tau' is given twice", "line 2"]),
    ("moe: {}\nmoe: {}\n", ["bad.yaml, line 2", "'moe' is given twice"]),
    ("run: {dir: !!python/object/apply:os.system [ls]}\n", ["bad.yaml, line 1", "not valid YAML"]),
    ("run: {name: 2024-99-99}\n", ["bad.yaml", "not valid YAML"]),
    ("a: &a [*a]\n", ["bad.yaml, line 1", "contains itself"]),
    ("moe: &m {x: *m}\n", ["bad.yaml, line 1", "contains itself"]),
    ("moe: 3\n", ["moe must be a mapping", "write moe: with indented keys"]),
    ("moe: [tau]\n", ["moe must be a mapping", "write moe: with indented keys"]),
    ("1: {}\n", ["unknown section 1"]),
    ("? [a, b]\n: 1\n", ["bad.yaml"]),
    ("moe: {on: 1}\n", ["unknown key moe.True"]),
    ("base: [a, b]\n", ["base (['a', 'b'])", "write base: other.yaml"]),
    ("base: nowhere.yaml\n", ["base ('nowhere.yaml')", "give a path relative"]),
    ('base: "a\\0b"\n', ["base ('a\\x00b')", "give a path relative"]),
    ("base: .\n", ["cannot be read", "give a readable file"]),
    ("base: bad.yaml\n", ["goes in a circle", "bad.yaml -> ", "remove one"]),
    ("[" * 10_000, ["bad.yaml"]),
    ("a\0b", ["bad.yaml", "not valid YAML"]),
]


@pytest.mark.parametrize(("text", "fragments"), INVALID_FILES)
def test_invalid_file(tmp_path: Path, text: str, fragments: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file; check the path"):
        load_config(tmp_path / "none.yaml")


def test_folder_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path)


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="must be UTF-8 text"):
        load_config(path)


def test_path_that_no_file_can_have() -> None:
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)


def test_home_of_an_unknown_user_is_no_crash(minimal: Path) -> None:
    config = load_config(minimal, ["run.dir=~no-such-user-here/run"])
    assert str(config.run.dir) == "~no-such-user-here/run"


def test_every_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "little.yaml"
    path.write_text("moe:\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[1].startswith("model.num_layers (missing) must be given: Transformer layers")
    assert "pass model.num_layers=VALUE" in lines[1]


def test_every_mistake_has_its_line(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["moe.router_topk=99", "optimizer.min_lr=1.0", "data.split=1"])
    assert len(str(caught.value).splitlines()) == 1, "data.split=1 is no text"
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["moe.router_topk=99", "optimizer.min_lr=1.0", "data.split='1'"])
    names = [line.split()[0] for line in str(caught.value).splitlines()]
    assert names == ["moe.router_topk", "optimizer.min_lr", "data.split"]


def test_message_stays_on_one_line_whatever_the_value(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ['moe.dispatcher="a\\nb' + "x" * 500 + '"'])
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 200


# (overrides, name with value, reason): settings without an effect
IGNORED = [
    (["evaluation.limit=5"], "evaluation.limit (5)", "without evaluation.tasks"),
    (
        ["data.path=a", "data.stages=[{from_step: 100, blend: [{path: b, weight: 1}]}]"],
        "data.stages[0] ('from step 100')",
        "the run ends at training.train_iters (100)",
    ),
    (["distillation.weight=2.0"], "distillation.weight (2.0)", "without distillation.teacher"),
    (
        [BLEND, f"data.stages=[{{from_step: 100, {LAST}}}]"],
        "data.stages[0] ('from step 100') has no effect",
        "the run ends at training.train_iters (100)",
    ),
    (
        ["training.eval_iters=0", "data.validation={web: data/v}"],
        "data.validation ({'web': ",
        "with training.eval_iters 0",
    ),
    (
        ["precision.grad_reduce_in_fp32=false"],
        "precision.grad_reduce_in_fp32 (false)",
        "with precision.dtype fp32",
    ),
    (
        ["parallel.high_priority_stream_groups=[ep,dp_cp]"],
        "parallel.high_priority_stream_groups (['ep', 'dp_cp'])",
        "on ep with parallel.expert_model_parallel_size 1; leave ep out",
    ),
    (
        ["data.reset_position_ids=true"],
        "data.reset_position_ids (true)",
        "on attention, which sees distances alone; only metrics by position see it",
    ),
    (
        ["training.profile_ranks=[0]"],
        "training.profile_ranks ([0])",
        "without training.profile_steps",
    ),
    (
        ["routing_guard.enabled=false", "routing_guard.dry_run=true"],
        "routing_guard.dry_run (true)",
        "with routing_guard.enabled false",
    ),
    (
        [GUARD, "routing_guard.force_ffn.share=0.2", "routing_guard.force_ffn.tokens=all"],
        "routing_guard.force_ffn.share (0.2)",
        "with routing_guard.force_ffn.tokens all",
    ),
    (
        ["moe.budget.gain=0.1"],
        "moe.budget.gain (0.1)",
        "without moe.budget.controller",
    ),
    (
        ["moe.budget.target_ffn_per_token=1.0", "moe.budget.decay=0.5"],
        "moe.budget.decay (0.5)",
        "without moe.budget.gain",
    ),
    (
        ["moe.budget.controller=bias", "moe.budget.gain=0.1", "moe.budget.response=0.2"],
        "moe.budget.response (0.2)",
        "with moe.budget.gain, which is fixed",
    ),
    (
        ["moe.budget.controller=tau", "moe.budget.response=0.2"],
        "moe.budget.response (0.2)",
        "with moe.budget.controller tau",
    ),
    (
        ["moe.balance_coeff=0.0", "moe.budget.controller=bias"],
        "moe.balance_coeff (0.0)",
        "evens out FFN experts",
    ),
    (
        ["moe.budget.ramp_steps=5"],
        "moe.budget.ramp_steps (5)",
        "without moe.budget.start_ffn_per_token",
    ),
    (
        ["moe.budget.start_ffn_per_token=2.0"],
        "moe.budget.start_ffn_per_token (2.0)",
        "without moe.budget.target_ffn_per_token or controller",
    ),
    (
        ["moe.tau=0.5", "moe.budget.target_ffn_per_token=1.0"],
        "moe.tau (0.5)",
        "with moe.budget.target_ffn_per_token",
    ),
    (
        ["moe.num_constant_experts=0", "moe.constant_temperature=2.0"],
        "moe.constant_temperature (2.0)",
        "with moe.num_constant_experts 0",
    ),
    ([*VANILLA, "moe.tau=0.5"], "moe.tau (0.5)", "without zero-computation experts"),
    (["moe.balance_coeff=0.0", "moe.tau=0.5"], "moe.tau (0.5)", "with moe.balance_coeff 0"),
    (
        ["moe.balance_coeff=0.0", "moe.balance_scope=global"],
        "moe.balance_scope ('global')",
        "with moe.balance_coeff 0",
    ),
    (
        ["moe.gate_normalization=nonzero", "moe.num_zero_experts=0"],
        "moe.gate_normalization ('nonzero')",
        "same as selected",
    ),
    ([*VANILLA, "moe.fused=true"], "moe.fused (true)", "vanilla MoE layer"),
    (["evaluation.limit=5"], "evaluation.limit (5)", "without evaluation.tasks"),
    (["moe.flex_backend=deepep"], "moe.flex_backend ('deepep')", "with moe.dispatcher alltoall"),
    (["moe.flex_num_sms=24"], "moe.flex_num_sms (24)", "with moe.dispatcher alltoall"),
    (["moe.dispatcher=alltoall_dedup"], DEDUP, "parallel.expert_model_parallel_size (1)"),
    (
        ["moe.dispatcher=alltoall_dedup", "parallel.expert_model_parallel_size=8"],
        DEDUP,
        "one FFN expert a rank",
    ),
    (
        [
            "moe.dispatcher=alltoall_dedup",
            "parallel.expert_model_parallel_size=2",
            "moe.router_topk=1",
        ],
        DEDUP,
        "moe.router_topk (1)",
    ),
    (["moe.layer_freq=4"], "moe.gating_residual (true)", "single MoE layer"),
    (
        ["model.mtp_loss_scaling_factor=0.3"],
        "model.mtp_loss_scaling_factor (0.3)",
        "model.mtp_num_layers 0",
    ),
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel (true)", "size 1"),
    (["training.recompute_num_layers=1"], "training.recompute_num_layers (1)", "without"),
    (
        [
            "training.recompute_granularity=full",
            "training.recompute_method=block",
            "training.recompute_num_layers=1",
            "training.recompute_modules=[mlp]",
        ],
        "training.recompute_modules (['mlp'])",
        "with training.recompute_granularity full",
    ),
    (
        [
            "training.recompute_granularity=selective",
            "training.recompute_modules=[moe, shared_experts]",
        ],
        "training.recompute_modules (['moe', 'shared_experts'])",
        "drop shared_experts",
    ),
    (
        [*FP8, "precision.fp8_recipe=tensorwise", "precision.fp8_margin=1"],
        "precision.fp8_margin (1)",
        "without precision.fp8_recipe delayed",
    ),
    (
        [*FP8, "precision.num_layers_at_start_in_bf16=2"],
        "precision.num_layers_at_start_in_bf16 (2)",
        "without precision.first_last_layers_bf16",
    ),
    (
        ["optimizer.decay_style=constant", "optimizer.min_lr=1e-4"],
        "optimizer.min_lr (0.0001)",
        "with optimizer.decay_style constant",
    ),
    (
        ["optimizer.wsd_decay_iters=5"],
        "optimizer.wsd_decay_iters (5)",
        "without optimizer.decay_style WSD",
    ),
    (["optimizer.lion_beta1=0.9"], "optimizer.lion_beta1 (0.9)", "without optimizer.kind lion"),
    (
        ["training.eval_iters=0", "training.eval_interval=5"],
        "training.eval_interval (5)",
        "with training.eval_iters 0",
    ),
    (["checkpoint.keep=3"], "checkpoint.keep (3)", "with checkpoint.save_interval 0"),
    (
        ["resilience.guard_max_rollbacks=1"],
        "resilience.guard_max_rollbacks (1)",
        "with checkpoint.save_interval 0",
    ),
    (
        ["resilience.guard=false", "resilience.guard_max_rollbacks=1"],
        "resilience.guard_max_rollbacks (1)",
        "with resilience.guard false",
    ),
    (
        ["resilience.hang_timeout_s=0.0", "resilience.hang_slow_phase_timeout_s=60.0"],
        "resilience.hang_slow_phase_timeout_s (60.0)",
        "with resilience.hang_timeout_s 0.0",
    ),
    (
        ["observe.wandb.entity=team"],
        "observe.wandb.entity ('team')",
        "without observe.wandb.project",
    ),
    (
        ["observe.wandb.mode=offline"],
        "observe.wandb.mode ('offline')",
        "without observe.wandb.project",
    ),
    (
        ["resilience.straggler_interval=0", "resilience.straggler_threshold=2.0"],
        "resilience.straggler_threshold (2.0)",
        "with resilience.straggler_interval 0",
    ),
]


@pytest.mark.parametrize(("overrides", "name_and_value", "reason"), IGNORED)
def test_ignored_setting_is_told(
    minimal: Path, overrides: list[str], name_and_value: str, reason: str
) -> None:
    (warning,) = check_config(load_config(minimal, overrides))
    assert warning.startswith(name_and_value)
    assert reason in warning


def test_overlap_on_one_rank_is_told(minimal: Path) -> None:
    config = load_config(minimal, ["parallel.overlap_grad_reduce=true"])
    (warning,) = check_world_size(config, 1)
    assert warning.startswith("parallel.overlap_grad_reduce (true) has no effect with one")
    assert check_world_size(config, 2) == []
