"""Every metric of a run: what it means, its unit, and the name that each place shows it under.

A new metric is one row here and the code that computes it. What follows from a row: the key in
`metrics.jsonl`, TensorBoard's tag, Prometheus' name and help, panels of their own at Grafana and
plots of their own in the report, what rules of the routing guard may look at, what the report says
is healthy, and the tables of the docs (`python -m benchmarks.pages`).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Labels = Literal[
    "",
    "layer",
    "layer,expert,kind",
    "expert,kind",
    "layer,ffn_experts",
    "metric,layer",
    "ffn_experts",
    "source",
    "source,expert,kind",
    "class",
    "set",
    "task",
]


@dataclass(frozen=True)
class Drawn:
    """A plot of one metric in the report.

    Attributes:
        title: Heading of the plot.
        axis: Label of the vertical axis.
        place: Its place in the section; by default after all that have one.
        caption: Text below it; by default the metric's meaning.
        section: Part of the page. Metrics of single MoE layers have a section of their own.
        level: A line to compare with, and its name.
        is_logarithmic: Whether the axis is.
        unless_zero: Whether it is left out where all values are 0.
        has_marks: Whether each value is a mark, of numbers that few records have.
    """

    title: str
    axis: str
    place: int = 99
    caption: str = ""
    section: Literal["training", "hardware", "names", "router"] = "training"
    level: tuple[str, float] | None = None
    is_logarithmic: bool = False
    unless_zero: bool = False
    has_marks: bool = False


@dataclass(frozen=True)
class Metric:
    """A row: one metric, and where it is shown.

    Attributes:
        meaning: What it says, in one sentence.
        unit: Unit of its values; "share" is a number from 0 to 1.
        group: TensorBoard's group, or the whole tag; for a list, what comes before an entry.
        prometheus: Its name there, always of a gauge; empty where `router_health` serves it.
        labels: Labels of its values of one run, in the order in which lists and objects
            hold them (an expert has its kind besides): `layer` is the transformer layer from 1,
            `kind` the kind of expert, `expert` an expert's name, `ffn_experts` how many FFN
            experts a token takes, `metric` a name of `IN_LAYERS`, `source` a data source,
            `class` a class of tokens, `set` a validation set, `task` a task of lm-eval and
            its metric; empty for a single number.
        guard: Whether its rules may look at it: "counted" in each MoE layer and every step from
            what its router wants, "measured" in each MoE
            layer and steps with router health, "whole" of the model, read by the guard itself.
        healthy: Its range, layer by layer, in a healthy run of the quickstart model.
        drawn: Its own plot in the report.
        panel: Title and legend of its own panel at Grafana.
    """

    meaning: str
    unit: str = ""
    group: str = "other"
    prometheus: str = ""
    labels: Labels = ""
    guard: Literal["", "counted", "measured", "whole"] = ""
    healthy: str = ""
    drawn: Drawn | None = None
    panel: tuple[str, str] | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """The labels by which its lists and objects are nested, the outermost first."""
        return tuple(label for label in self.labels.split(",") if label not in ("", "kind"))

    @property
    def is_distribution(self) -> bool:
        """True if its innermost lists are shares of a whole."""
        return self.unit == "share" and self.axes[-1:] in (("expert",), ("ffn_experts",))

    @property
    def with_unit(self) -> str:
        """The meaning and, where there is one to be said, the unit."""
        return f"{self.meaning}, {self.unit}" if self.unit not in ("", "share") else self.meaning

    @property
    def sentence(self) -> str:
        """The meaning as a sentence."""
        return f"{self.meaning[0].upper()}{self.meaning[1:]}."


def _null_to_nan(value: object) -> object:
    """JSON has no NaN or infinity: they are written as null and read back as NaN."""
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(_null_to_nan)]
MaybeFloat = float | None
Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
MaybeInt = Int | None


class Record(BaseModel):
    """The keys of one logged step, global over the batch and all ranks.

    Every value is that of the step itself. What may be missing has None.
    """

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="null")

    step: Annotated[Int, Metric("optimizer steps done, this one included", "", "", "moepp_step")]
    tokens: Annotated[
        Int, Metric("tokens trained on since the beginning of the run", "", "speed", "moepp_tokens")
    ]
    loss: Annotated[
        Number,
        Metric(
            "only the language-model loss, token mean over the global batch",
            "nats",
            "loss/train",
            "moepp_loss",
            guard="whole",
        ),
    ]
    lr: Annotated[
        Number,
        Metric(
            "learning rate",
            "",
            "optimizer",
            "moepp_learning_rate",
            drawn=Drawn("Learning rate", "learning rate", 6),
        ),
    ]
    grad_norm: Annotated[
        Number,
        Metric(
            "global gradient norm before clipping",
            "",
            "optimizer",
            "moepp_grad_norm",
            guard="whole",
            panel=("Gradient norm", "before clipping"),
            drawn=Drawn("Gradient norm", "norm", 6),
        ),
    ]
    step_time_s: Annotated[
        Number,
        Metric(
            "wall time of the step",
            "s",
            "speed",
            "moepp_step_time_seconds",
            panel=("Step time", "step"),
            drawn=Drawn("Step time", "seconds", 4),
        ),
    ]
    tokens_per_s: Annotated[
        Number,
        Metric(
            "tokens of the global batch over the step's time",
            "tokens/s",
            "speed",
            "moepp_tokens_per_second",
            panel=("Throughput", "tokens/s"),
            drawn=Drawn("Speed", "tokens/s", 4),
        ),
    ]
    balance_loss: Annotated[
        Number,
        Metric(
            "heterogeneous load-balance loss, without its coefficient: mean over MoE layers, and "
            "over "
            "micro-batches by their tokens without padding, as it is trained",
            "",
            "loss/balance",
            "moepp_balance_loss",
            drawn=Drawn("Balance loss", "balance loss", 5),
        ),
    ]
    ffn_fraction: Annotated[
        Number,
        Metric(
            "FFN experts' share of all selections, mean over MoE layers",
            "share",
            "router",
            "moepp_ffn_ratio",
            guard="counted",
            healthy="0.52 to 0.65",
        ),
    ]
    ffn_per_token: Annotated[
        Number,
        Metric(
            "FFN experts per token, mean over tokens and MoE layers",
            "",
            "router",
            "moepp_ffn_per_token",
        ),
    ]
    expert_share: Annotated[
        list[Number],
        Metric(
            "share of all selections that an expert takes, mean over MoE layers; they sum to 1",
            "share",
            "expert_share",
            "moepp_expert_share_ratio",
            "expert,kind",
            panel=("Share of each expert", "{{expert}}"),
        ),
    ]
    max_ffn_load: Annotated[
        Number,
        Metric(
            "busiest FFN expert's selections over the FFN experts' mean, of the layer where it is "
            "largest; all ranks wait for it; MaxVio (arXiv 2408.15664) is this less 1",
            "",
            "router",
            "moepp_max_ffn_load_ratio",
            guard="counted",
            healthy="1.20 to 2.22",
            panel=("Busiest FFN expert over the mean", "load"),
            drawn=Drawn("Busiest FFN expert", "load / mean load", 3, level=("even", 1.0)),
        ),
    ]
    dropped_fraction: Annotated[
        Number,
        Metric(
            "share of all selections that a capacity limit dropped",
            "share",
            "router",
            "moepp_dropped_ratio",
            drawn=Drawn("Dropped selections", "share", 7, unless_zero=True),
        ),
    ]
    a2a_bytes: Annotated[
        Int,
        Metric(
            "bytes of hidden vectors that leave their rank through the dispatcher, all ranks and "
            "MoE "
            "layers, forward",
            "bytes",
            "speed",
            "moepp_a2a_bytes",
            panel=("All-to-all", "a step, forward"),
        ),
    ]
    ffn_target: Annotated[
        MaybeFloat,
        Metric(
            "target of the FFN share from moe.budget; only with a budget",
            "share",
            "router",
            "moepp_ffn_target_ratio",
        ),
    ] = None
    tau: Annotated[
        MaybeFloat,
        Metric(
            "weight of zero-computation experts in the balance loss, mean over MoE layers; only "
            "with "
            "moe.budget",
            "",
            "router",
            "moepp_tau",
        ),
    ] = None
    distillation_loss: Annotated[
        MaybeFloat,
        Metric(
            "divergence of the model's predictions from the teacher's, without its weight, token "
            "mean "
            "over the global batch; only with distillation.teacher",
            "nats",
            "loss/distillation",
            "moepp_distillation_loss",
            drawn=Drawn("Divergence from the teacher", "nats", 6, is_logarithmic=True),
            panel=("Divergence from the teacher", "nats"),
        ),
    ] = None
    valid_loss: Annotated[
        MaybeFloat,
        Metric(
            "validation loss; only on evaluated steps",
            "nats",
            "loss/validation",
            "moepp_valid_loss",
        ),
    ] = None
    valid_set_loss: Annotated[
        dict[str, Number] | None,
        Metric(
            "validation loss of each set of data.validation; only on evaluated steps",
            "nats",
            "loss/validation_sets",
            "moepp_valid_set_loss",
            "set",
            panel=("Loss by validation set", "{{set}}"),
            drawn=Drawn("Loss by validation set", "loss (nats)", 0, section="names"),
        ),
    ] = None
    task_score: Annotated[
        dict[str, Number] | None,
        Metric(
            "score of a task of lm-eval by TASK/METRIC (evaluation.tasks); only on evaluated steps",
            "",
            "task",
            "moepp_task_score",
            "task",
            panel=("Scores of tasks", "{{task}}"),
            drawn=Drawn("Scores of tasks", "score", 4, section="names", has_marks=True),
        ),
    ] = None
    layer_expert_share: Annotated[
        list[list[Number]] | None,
        Metric(
            "share of a layer's selections that an expert takes; Prometheus has them by kind",
            "share",
            "expert_share",
            "moepp_layer_share_ratio",
            "layer,expert,kind",
            panel=("Share of each kind, by layer", "layer {{layer}} {{kind}}"),
        ),
    ] = None
    layer_ffn_fraction: Annotated[
        list[Number] | None,
        Metric(
            "FFN experts' share of a layer's selections",
            "share",
            "layer_ffn_fraction",
            "moepp_layer_ffn_ratio",
            "layer",
            panel=("FFN share of each MoE layer", "layer {{layer}}"),
        ),
    ] = None
    router_health: Annotated[
        dict[str, list[Number]] | None,
        Metric(
            "router health by its name, of each MoE layer; only on measured steps "
            "(observe.health_interval), as the next two",
            "",
            "router_health",
            "moepp_router_health",
            "metric,layer",
        ),
    ] = None
    layer_ffn_histogram: Annotated[
        list[list[Number]] | None,
        Metric(
            "share of a layer's tokens with 0, 1, ..., K FFN experts",
            "share",
            "ffn_experts_per_token",
            "moepp_layer_tokens_ratio",
            "layer,ffn_experts",
            panel=("FFN experts of a token, by layer", "layer {{layer}}: {{ffn_experts}}"),
        ),
    ] = None
    loss_by_ffn: Annotated[
        list[Number] | None,
        Metric(
            "mean language-model loss of the tokens with 0, 1, ..., K FFN experts on average "
            "over the "
            "last pipeline stage's MoE layers, rounded; NaN where there is none",
            "nats",
            "loss_by_ffn_experts",
            "moepp_loss_by_ffn",
            "ffn_experts",
            panel=("Loss of tokens by FFN experts taken", "{{ffn_experts}} FFN experts"),
            drawn=Drawn(
                "Loss by FFN experts of a token",
                "loss (nats)",
                0,
                "Mean language-model loss of the tokens with 0, 1, ... FFN experts on average "
                "over the "
                "MoE layers (of the last pipeline stage), rounded. Where the router has learned "
                "which "
                "tokens are hard, these get more.",
                section="router",
            ),
        ),
    ] = None
    class_ffn_per_token: Annotated[
        dict[str, Number] | None,
        Metric(
            "FFN experts per token of the tokens of a class, by frequency of the token id or by "
            "its "
            "characters, mean over MoE layers",
            "",
            "class_ffn_per_token",
            "moepp_class_ffn_per_token",
            "class",
            panel=("FFN experts of a token, by class", "{{class}}"),
            drawn=Drawn("FFN experts by kind of token", "FFN experts", 3, section="names"),
        ),
    ] = None
    source_tokens: Annotated[
        dict[str, Number] | None,
        Metric(
            "share of the tokens with a loss that come from a data source; like the next three "
            "only "
            "where the prepared data have several",
            "share",
            "source_tokens",
            "moepp_source_tokens_ratio",
            "source",
        ),
    ] = None
    source_loss: Annotated[
        dict[str, Number] | None,
        Metric(
            "mean language-model loss after the tokens of a data source",
            "nats",
            "source_loss",
            "moepp_source_loss",
            "source",
            panel=("Loss by data source", "{{source}}"),
            drawn=Drawn("Loss by data source", "loss (nats)", 1, section="names"),
        ),
    ] = None
    source_ffn_share: Annotated[
        dict[str, Number] | None,
        Metric(
            "FFN experts' share of the selections of a data source's tokens, mean over MoE layers",
            "share",
            "source_ffn_share",
            "moepp_source_ffn_ratio",
            "source",
            panel=("FFN share by data source", "{{source}}"),
            drawn=Drawn("FFN share by data source", "FFN share", 2, section="names"),
        ),
    ] = None
    source_expert_share: Annotated[
        dict[str, list[Number]] | None,
        Metric(
            "share of the selections of a data source's tokens that an expert takes, mean over MoE "
            "layers",
            "share",
            "source_expert_share",
            "moepp_source_expert_ratio",
            "source,expert,kind",
        ),
    ] = None
    z_loss: Annotated[
        MaybeFloat,
        Metric(
            "router z-loss, without its coefficient, mean as of balance_loss",
            "",
            "loss/z",
            "moepp_z_loss",
            drawn=Drawn("Router z-loss", "z-loss", 8),
        ),
    ] = None
    mtp_loss: Annotated[
        MaybeFloat,
        Metric(
            "loss of multi-token prediction: mean over its depths and the tokens that they "
            "predict, "
            "without its weight; not in `loss`",
            "nats/token",
            "loss/mtp",
            "moepp_mtp_loss",
            drawn=Drawn("Loss of multi-token prediction", "nats per token", 8),
        ),
    ] = None
    num_zeros: Annotated[
        MaybeInt,
        Metric("gradient elements that are exactly zero", "", "optimizer", "moepp_grad_zeros"),
    ] = None
    batch_size: Annotated[
        MaybeInt,
        Metric(
            "sequences of the step; only with `training.batch_ramp`",
            "",
            "optimizer",
            "moepp_batch_size",
            drawn=Drawn("Batch size", "sequences", 9),
        ),
    ] = None
    skipped_steps: Annotated[
        MaybeInt,
        Metric(
            "batches that the numerical guard refused since the run began; they are no steps and "
            "not "
            "in the tokens",
            "",
            "optimizer",
            "moepp_skipped_steps",
        ),
    ] = None
    static_fill: Annotated[
        MaybeFloat,
        Metric(
            "most FFN rows of a layer and micro-batch, over the size of `moe.static_rows`' buffer",
            "share",
            "router",
            "moepp_static_fill",
        ),
    ] = None
    repeated_steps: Annotated[
        MaybeInt,
        Metric(
            "steps of the run that overflowed `moe.static_rows`' buffer and ran again",
            "",
            "other",
            "moepp_repeated_steps",
        ),
    ] = None
    slowest_rank: Annotated[
        MaybeInt,
        Metric(
            "rank with the longest own time; only on steps where ranks are compared",
            "",
            "other",
            "moepp_slowest_rank",
        ),
    ] = None
    slowest_rank_ratio: Annotated[
        MaybeFloat,
        Metric(
            "the slowest rank's own time over the ranks' median",
            "",
            "speed",
            "moepp_slowest_rank_ratio",
        ),
    ] = None
    waiting_fraction: Annotated[
        MaybeFloat,
        Metric(
            "share of the step time that ranks wait for collectives, their mean; only on steps "
            "where "
            "ranks are compared",
            "share",
            "speed",
            "moepp_waiting_ratio",
        ),
    ] = None
    guard_actions: Annotated[
        MaybeInt,
        Metric(
            "times that the routing guard has acted so far, beyond warning; only with the guard",
            "",
            "router",
            "moepp_guard_actions",
        ),
    ] = None
    routing_shift: Annotated[
        MaybeFloat,
        Metric(
            "evidence that the use of the experts has changed, over its limit; only once it is "
            "judged",
            "",
            "router",
            "moepp_routing_shift",
            guard="whole",
        ),
    ] = None
    logit_shift: Annotated[
        MaybeFloat,
        Metric(
            "evidence that the size of the routers' logits has changed, over its limit; only "
            "once it "
            "is judged",
            "",
            "router",
            "moepp_logit_shift",
            guard="whole",
        ),
    ] = None
    loss_shift: Annotated[
        MaybeFloat,
        Metric(
            "evidence that the loss, or how much sequences differ in it, has left its course, "
            "over its "
            "limit; only once it is judged",
            "",
            "loss/shift",
            "moepp_loss_shift",
            guard="whole",
        ),
    ] = None
    token_shift: Annotated[
        MaybeFloat,
        Metric(
            "evidence that the token ids of the batches have changed, over its limit; only once "
            "it is "
            "judged",
            "",
            "tokens/shift",
            "moepp_token_shift",
            guard="whole",
        ),
    ] = None
    failed_saves: Annotated[
        MaybeInt,
        Metric(
            "checkpoints that could not be written so far; only where any are",
            "",
            "other",
            "moepp_failed_saves",
        ),
    ] = None
    mfu: Annotated[
        MaybeFloat,
        Metric(
            "model FLOP/s over the rated dense FLOP/s of all GPUs; skipped experts do not count",
            "share",
            "speed",
            "moepp_mfu_ratio",
            drawn=Drawn("Model FLOPs utilisation", "MFU", 0, section="hardware"),
        ),
    ] = None
    model_tflops: Annotated[
        MaybeFloat,
        Metric(
            "model FLOP/s of a rank; skipped experts do not count",
            "TFLOP/s",
            "speed",
            "moepp_model_tflops",
            drawn=Drawn("Model FLOP/s", "FLOP/s", 5, section="hardware"),
        ),
    ] = None
    energy_j: Annotated[
        MaybeFloat,
        Metric(
            "energy of all GPUs since the record before, evaluation and saving included; like the "
            "next two only where NVML reports it",
            "J",
            "hardware",
            "moepp_energy_joules",
        ),
    ] = None
    energy_per_token_j: Annotated[
        MaybeFloat,
        Metric(
            "energy of all GPUs since the record before, evaluation and saving included, per token",
            "J",
            "hardware",
            "moepp_energy_per_token_joules",
            panel=("Energy per token", "GPUs"),
            drawn=Drawn("Energy per token", "J", 1, section="hardware"),
        ),
    ] = None
    gpu_hours: Annotated[
        MaybeFloat,
        Metric(
            "time since the record before times the number of GPUs",
            "h",
            "hardware",
            "moepp_gpu_hours",
        ),
    ] = None
    gpu_power_w: Annotated[
        MaybeFloat,
        Metric(
            "power of a GPU, mean over GPUs and time since the record before",
            "W",
            "hardware",
            "moepp_gpu_power_watts",
            panel=("Power of a GPU", "mean"),
            drawn=Drawn("Power of a GPU", "W", 2, section="hardware"),
        ),
    ] = None
    gpu_utilization: Annotated[
        MaybeFloat,
        Metric(
            "share of the time in which a kernel ran, mean over GPUs",
            "share",
            "hardware",
            "moepp_gpu_utilization_ratio",
            drawn=Drawn("Utilisation of a GPU", "share", 3, section="hardware"),
        ),
    ] = None
    gpu_clock_mhz: Annotated[
        MaybeFloat,
        Metric(
            "clock of the multiprocessors, mean over GPUs",
            "MHz",
            "hardware",
            "moepp_gpu_clock_megahertz",
        ),
    ] = None
    gpu_memory_bytes: Annotated[
        MaybeInt,
        Metric(
            "most memory in use on any GPU, other processes included",
            "bytes",
            "hardware",
            "moepp_gpu_memory_bytes",
        ),
    ] = None
    gpu_temperature_c: Annotated[
        MaybeFloat,
        Metric(
            "highest temperature of any GPU",
            "degrees Celsius",
            "hardware",
            "moepp_gpu_temperature_celsius",
        ),
    ] = None
    nvlink_bytes_per_s: Annotated[
        MaybeFloat,
        Metric(
            "NVLink traffic of a GPU, sent and received",
            "bytes/s",
            "hardware",
            "moepp_nvlink_bytes_per_second",
            drawn=Drawn("NVLink traffic", "bytes/s", 4, section="hardware"),
        ),
    ] = None
    pcie_bytes_per_s: Annotated[
        MaybeFloat,
        Metric(
            "PCIe traffic of a GPU, sent and received, mean over GPUs",
            "bytes/s",
            "hardware",
            "moepp_pcie_bytes_per_second",
        ),
    ] = None
    cpu_utilization: Annotated[
        MaybeFloat,
        Metric(
            "share of all cores of a node in use, other processes included",
            "share",
            "hardware",
            "moepp_cpu_utilization_ratio",
            drawn=Drawn("CPU utilisation", "share", 6, section="hardware"),
        ),
    ] = None
    host_memory_bytes: Annotated[
        MaybeInt,
        Metric(
            "most host memory in use on any node without a GPU",
            "bytes",
            "hardware",
            "moepp_host_memory_bytes",
        ),
    ] = None


# Of every MoE layer. None is a key of the record: those that are measured are in its
# `router_health`, the others follow from its shares.
IN_LAYERS = {
    "ffn_to_target": Metric(
        "FFN share over its target from moe.budget or moe.tau", guard="counted"
    ),
    "min_ffn_load": Metric(
        "idlest FFN expert's selections over the FFN experts' mean; 0 is a dead expert",
        prometheus="moepp_layer_min_ffn_load_ratio",
        labels="layer",
        guard="counted",
        healthy="0.22 to 0.83",
        drawn=Drawn("Idlest FFN expert", "load / mean load", 6, level=("even", 1.0)),
    ),
    "max_expert_share": Metric("largest share of any expert", "share", guard="counted"),
    "gate_entropy": Metric(
        "how undecided the router is: entropy of the scores over the experts, at most log E",
        "nats",
        guard="measured",
        healthy="1.23 to 2.33",
        panel=("Entropy of the gates, nats", "layer {{layer}}"),
        drawn=Drawn(
            "Entropy of the gates",
            "share of log E",
            0,
            "Entropy of the scores over the experts as a share of its largest value: 100% is a "
            "router that does not care, 0% one that always takes the same experts.",
        ),
    ),
    "selection_margin": Metric(
        "score of the last selected expert less that of the next one: how little would change the "
        "selection",
        guard="measured",
        healthy="0.02 to 0.07",
        panel=("Margin of the selection", "layer {{layer}}"),
        drawn=Drawn("Selection margin", "score", 1),
    ),
    "logit_variance": Metric(
        "variance of the router's logits over tokens and experts, residual included",
        guard="measured",
        healthy="0.42 to 2.08",
        panel=("Variance of the logits", "layer {{layer}}"),
        drawn=Drawn(
            "Variance of the router logits",
            "variance",
            2,
            "With the gating residual and without it.",
        ),
    ),
    "own_logit_variance": Metric(
        "variance of the router's logits without the residual", guard="measured"
    ),
    "residual_ratio": Metric(
        "norm of the residual's part of the logits over that of the layer's own",
        guard="measured",
        healthy="0.14 to 0.30",
        panel=("Residual over the router's own logits", "layer {{layer}}"),
        drawn=Drawn(
            "Gating residual",
            "norm / norm",
            3,
            "Norm of the residual's part of the logits over that of the layer's own. The first MoE "
            "layer has none.",
        ),
    ),
    "row_cosine": Metric(
        "absolute cosine of two experts' rows of the router, mean over pairs",
        guard="measured",
        healthy="0.06 to 0.07",
    ),
    "row_cosine_max": Metric(
        "absolute cosine of the two most alike experts' rows of the router",
        guard="measured",
        healthy="0.17 to 0.24",
        panel=("Likeness of the router's rows, cosine", "layer {{layer}}"),
        drawn=Drawn(
            "Likeness of the router's rows",
            "|cosine|",
            4,
            "Absolute cosine of two rows of the router, mean and largest over all pairs: experts "
            "whose rows are alike get the same tokens.",
        ),
    ),
    "balance_gradient_ratio": Metric(
        "gradient of the balance loss (and z-loss) at the logits over that of the rest",
        guard="measured",
        healthy="0.006 to 0.015",
        drawn=Drawn(
            "Balance loss against language model",
            "gradient / gradient",
            5,
            is_logarithmic=True,
            level=("limit", 1.0),
        ),
    ),
    "constant_replaced": Metric(
        "share of the input that constant experts put their vector in the place of, weighted by "
        "their gates",
        "share",
        guard="measured",
        healthy="0.05 to 0.62",
        drawn=Drawn(
            "Constant experts: share of the input replaced",
            "share",
            7,
            "How much of a token its constant experts put their vector in the place of, weighted "
            "by their gates.",
        ),
    ),
    "constant_norm": Metric(
        "norm of the constant experts' vectors",
        guard="measured",
        healthy="0.69 to 0.73",
        drawn=Drawn("Constant experts: norm", "norm", 8),
    ),
}

# What rules of the routing guard judge besides, of the whole model.
_OF_GUARD: dict[str, Metric] = {
    "mean_ffn_to_target": Metric("mean over the layers of ffn_to_target", guard="whole"),
    "shift": Metric(
        "largest evidence, over its limit, of the change that is under way (docs/guard.md)",
        guard="whole",
    ),
    "router_fault": Metric(
        "evidence, over its limit, that routers have changed while token ids have not",
        guard="whole",
    ),
}


def _of_record() -> dict[str, Metric]:
    rows = {}
    for key, field in Record.model_fields.items():
        (rows[key],) = (each for each in field.metadata if isinstance(each, Metric))
    return rows


OF_RECORD = _of_record()
METRICS = {**OF_RECORD, **IN_LAYERS, **_OF_GUARD}
"""All rows by name."""
