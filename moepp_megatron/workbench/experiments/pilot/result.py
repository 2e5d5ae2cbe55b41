"""The result of a pilot: the contents of `pilot.json`, which `pilot.html` shows.

A pilot trains several *arms* (the vanilla model, MoE++, and models that match one of them in time
or compute) with the same seeds. A seed decides initial weights and the order of the data, so that
arms are compared in pairs. All intervals are 95% t-intervals; those of loss differences take the
noise from all arms together (pooled.py), those of speed are over sessions.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

ArmKind = Literal["vanilla", "moepp", "more", "equal_time", "narrow", "short"]
Answer = Literal["pays", "does not pay", "undecided"]


class _PilotRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_PilotRecord):
    """A mean over seeds.

    Attributes:
        mean: The mean.
        low: Lower end of the 95% interval; None with a single seed.
        high: Upper end.
    """

    mean: float
    low: float | None = None
    high: float | None = None


class Arm(_PilotRecord):
    """One model of the pilot.

    Attributes:
        name: Unique, as shown: "vanilla", "MoE++ tau 0.75", "vanilla, 70% of the steps".
        kind: "vanilla"; "moepp"; `more` is MoE++ with more selections per token and vanilla's
            expected FLOPs; `equal_time` is a MoE++ arm that trains for vanilla's time; `narrow` is
            vanilla with narrower experts and a MoE++ arm's compute; "short" is vanilla with fewer
            steps, which shows the value of tokens.
        tau: Tau of MoE++, else None.
        topk: Selections per token, K.
        steps: Steps of each of its runs.
        matches: Name of the MoE++ arm that an `equal_time` or `narrow` arm belongs to.
        overrides: Settings that make it from CONFIG, for whoever wants to run it alone; empty where
            it is more than overrides (vanilla).
    """

    name: str
    kind: ArmKind
    tau: float | None
    topk: int
    steps: int
    matches: str | None = None
    overrides: list[str] = []


class Curve(_PilotRecord):
    """Mean training loss over seeds.

    Attributes:
        tokens: Tokens trained on.
        loss: Nats per token.
    """

    tokens: list[int]
    loss: list[float]


class ArmOutcome(_PilotRecord):
    """The outcome of an arm's runs.

    Attributes:
        arm: The arm.
        seeds: Finished seeds.
        valid_loss: Final validation loss, nats.
        loss_difference: Difference to vanilla with the same seed; None for vanilla.
        step_time_s: Median step of a run.
        time_ratio: Step time over vanilla's: of a MoE++ arm as timed in sessions of its own, of
            others in their runs; None for vanilla, "short" and an arm without sessions.
        tokens_per_s: Throughput of all ranks.
        ffn_share: FFN share of all selections, last quarter of the steps.
        a2a_bytes: All-to-all bytes of a step, forward, last quarter of the steps.
        energy_per_token_j: Energy per token, J; None if not measured.
        alerts: Times each alert rule was raised, all seeds together.
        health: Router health, last quarter of the steps, mean over layers and seeds.
        curve: Its training curve.
    """

    arm: Arm
    seeds: list[int]
    valid_loss: Interval
    loss_difference: Interval | None
    step_time_s: Interval
    time_ratio: Interval | None
    tokens_per_s: Interval
    ffn_share: Interval
    a2a_bytes: Interval
    energy_per_token_j: Interval | None
    alerts: dict[str, int]
    health: dict[str, float]
    curve: Curve


class EqualCompute(_PilotRecord):
    """Two arms whose tokens take the same expected FLOPs and that saw the same tokens.

    Attributes:
        arm: Name of the MoE++ arm.
        other: Name of the vanilla arm: narrowed to the MoE++ arm's compute, or vanilla itself
            beside MoE++ with more selections.
        loss_difference: MoE++ minus the other, nats; below 0 MoE++ is better.
    """

    arm: str
    other: str
    loss_difference: Interval


class TargetModel(_PilotRecord):
    """One model at the target size, by the cost model.

    Attributes:
        arm: Name of the pilot's arm that it represents.
        layout: Layout in words: "TP1 PP2 EP8, micro-batch 2".
        fits: Whether it fits the GPUs; else the other numbers are None.
        step_time_s: Time of a step.
        tokens_per_s_per_gpu: Throughput of a GPU.
        tflops_per_gpu: Model TFLOP/s.
        a2a_bytes: All-to-all bytes of a step.
        hours: Hours to train on the target's tokens.
        money: Hours times GPUs and price; None without a price.
        time_ratio: Step time over vanilla's.
    """

    arm: str
    layout: str
    fits: bool
    step_time_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    a2a_bytes: float | None = None
    hours: float | None = None
    money: float | None = None
    time_ratio: float | None = None


class PilotTarget(_PilotRecord):
    """The cluster and model that the decision is about.

    Attributes:
        name: Name of the target's configuration.
        gpus: Number of GPUs.
        gpu: Their kind.
        tokens: Tokens to train on.
        price_per_hour: Price of a GPU per hour; None where unknown.
        models: Vanilla and every MoE++ arm.
    """

    name: str
    gpus: int
    gpu: str
    tokens: float
    price_per_hour: float | None
    models: list[TargetModel]

    @property
    def title(self) -> str:
        """Such as "moepp_7b on 64 H100"."""
        return f"{self.name} on {self.gpus:,} {self.gpu}"

    def model_of(self, arm: str) -> TargetModel | None:
        """The model that stands for an arm, by its name."""
        return next((model for model in self.models if model.arm == arm), None)


class Stakes(_PilotRecord):
    """What a wrong decision costs, expected over what the runs leave open.

    Attributes:
        adopted: Share of vanilla's training time that MoE++ loses, if it is adopted.
        kept: Share that MoE++ would have saved, if vanilla is kept.
    """

    adopted: float
    kept: float


class ArmVerdict(_PilotRecord):
    """Does one MoE++ arm pay?

    It pays where, trained for vanilla's time, it has the lower loss, and where, trained on as many
    tokens, it has a lower loss than the narrowed vanilla model of the same compute. Both have to be
    clear at the level of the newest look (schedule.py). It does not pay where either is clearly the
    other way round.

    Attributes:
        arm: Name of the MoE++ arm.
        loss_in_time: Loss after vanilla's time minus vanilla's, nats.
        loss_in_compute: Loss minus the narrowed vanilla model's, nats.
        token_factor: Tokens to vanilla's loss over vanilla's, from the loss difference after the
            same tokens and from what tokens are worth to vanilla; None where fewer steps have not
            clearly cost vanilla loss, so that the value of tokens is unknown.
        time_to_loss: Time to vanilla's loss over vanilla's, from `loss_in_time`; None likewise.
        target_time_to_loss: Token factor times the target's step time over vanilla's by the cost
            model, whose own error is widened into the interval; None likewise, without a target, or
            where it does not fit.
        probability: How probable it is that both losses are below 0, taken alone, with no opinion
            beforehand; None with a single seed.
        stakes: What a wrong decision costs; None where that cannot be told.
        at_pilot: The answer at the pilot's scale.
        at_target: The answer for the target: `target_time_to_loss` in place of `loss_in_time`.
        reasons: Plain sentences that give the numbers behind both.
    """

    arm: str
    loss_in_time: Interval
    loss_in_compute: Interval
    token_factor: Interval | None
    time_to_loss: Interval | None
    target_time_to_loss: Interval | None
    probability: float | None
    stakes: Stakes | None
    at_pilot: Answer
    at_target: Answer | None
    reasons: list[str]


class Setting(_PilotRecord):
    """The conditions of the measurement.

    Attributes:
        command: The command line.
        config: Name of the configuration.
        nproc: Ranks.
        device: Device of the ranks: a GPU's name, or the processor's.
        cores: Processor cores.
        torch: Version of torch.
        megatron_core: Version of megatron-core.
        steps: Steps of a run.
        tokens: Tokens of a run.
        valid_tokens: Tokens of a validation.
        parameters: Parameters of the MoE++ model.
        began: Day of the first run, ISO date.
        sessions: Sessions that timed the MoE++ arms.
        look: Number of the newest look; 0 before the first one, so that nothing is decided.
        next_seeds: Seeds of the next look.
        level: One-sided level that this look decides at.
    """

    command: str
    config: str
    nproc: int
    device: str
    cores: int
    torch: str
    megatron_core: str
    steps: int
    tokens: int
    valid_tokens: int
    parameters: int
    began: str
    sessions: int
    look: int
    next_seeds: int
    level: float


class PilotResult(_PilotRecord):
    """The whole result.

    Attributes:
        setting: How it was measured.
        arms: Vanilla first.
        token_value: Nats that vanilla gains when its tokens grow e-fold, from the "short" arm.
        equal_compute: Pairs of the same compute.
        target: The target; None without one.
        verdicts: Verdict of every MoE++ arm, the most favourable first.
        recommended: Name of the arm to go on with, or None where none has been shown to pay.
        answer: One plain sentence for the person who decides.
        caveats: Limits of this pilot.
    """

    setting: Setting
    arms: list[ArmOutcome]
    token_value: Interval
    equal_compute: list[EqualCompute]
    target: PilotTarget | None
    verdicts: list[ArmVerdict]
    recommended: str | None
    answer: str
    caveats: list[str]

    @property
    def baseline(self) -> ArmOutcome | None:
        """Vanilla."""
        return next((outcome for outcome in self.arms if outcome.arm.kind == "vanilla"), None)

    @property
    def chosen(self) -> ArmVerdict | None:
        """The verdict to look at first: of the recommended arm, else the most favourable."""
        of_recommended = (one for one in self.verdicts if one.arm == self.recommended)
        return next(of_recommended, self.verdicts[0] if self.verdicts else None)

    @property
    def is_open(self) -> bool:
        """Whether nothing is recommended because the most favourable arm is undecided."""
        best = self.chosen
        if self.recommended is not None or best is None:
            return False
        return (best.at_target or best.at_pilot) == "undecided"

    def outcome_of(self, arm: str) -> ArmOutcome | None:
        """The arm's outcome by its name; None where no run of it has finished."""
        return next((outcome for outcome in self.arms if outcome.arm.name == arm), None)
