"""The result of a pilot: the contents of `pilot.json`, which `pilot.html` shows.

A pilot trains several *arms* (the vanilla model, MoE++ at several tau, vanilla models with fewer
experts per token) with the same seeds. A seed decides initial weights and the order of the data, so
that arms are compared in pairs. All intervals are 95% t-intervals over seeds.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

ArmKind = Literal["vanilla", "moepp", "rival", "short"]
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
        name: Unique, as shown: "vanilla", "MoE++ tau 0.75", "vanilla top-1", "vanilla, 70% of the
            steps".
        kind: "vanilla"; "moepp"; `rival` is vanilla with fewer experts per token, the fair
            baseline; "short" is vanilla with fewer steps, which shows the value of tokens.
        tau: Tau of MoE++, else None.
        topk: Selections per token, K.
        steps: Steps of each of its runs.
        overrides: Settings that make it from CONFIG, for whoever wants to run it alone; empty where
            it is more than overrides (vanilla).
    """

    name: str
    kind: ArmKind
    tau: float | None
    topk: int
    steps: int
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
        time_ratio: Step time over vanilla's with the same seed; None for vanilla and "short".
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


class EqualSpeed(_PilotRecord):
    """A MoE++ arm against an equally fast vanilla model.

    With whole numbers of experts none is exactly as fast: its loss is interpolated by step time
    between the two vanilla arms that enclose it, seed by seed.

    Attributes:
        arm: Name of the MoE++ arm.
        slower: Vanilla arm at least as slow.
        faster: Vanilla arm at least as fast; the same as `slower` where the MoE++ arm is outside of
            all measured ones and the nearest is used.
        weight: Weight of `slower` in the interpolation, mean over seeds.
        enclosed: Whether the MoE++ arm is between two measured ones in every seed.
        loss_difference: MoE++ minus baseline, nats; below 0 MoE++ is better at equal speed.
    """

    arm: str
    slower: str
    faster: str
    weight: float
    enclosed: bool
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


class ArmVerdict(_PilotRecord):
    """Does one MoE++ arm pay?

    A model that learns less from a token needs more of them. `token_factor` says how many times as
    many for vanilla's loss, from the pilot's loss difference and from what tokens are worth to
    vanilla (its runs with fewer steps). Time to equal loss is token factor times time ratio: below
    1 MoE++ pays.

    Attributes:
        arm: Name of the MoE++ arm.
        token_factor: Tokens to vanilla's loss over vanilla's; None where fewer steps have not
            clearly cost vanilla loss, so that the value of tokens is unknown.
        time_to_loss: Time to equal loss at the pilot's measured speed; None likewise.
        target_time_to_loss: The same at the target's speed by the cost model, whose own error is
            widened into the interval; None likewise, without a target, or where it does not fit.
        at_pilot: The answer at the pilot's scale. It pays where it is sooner at vanilla's loss and,
            as far as a vanilla model of the same speed was measured, better than that one. It does
            not where either is clearly the other way round.
        at_target: The answer for the target.
        reasons: Plain sentences that give the numbers behind both.
    """

    arm: str
    token_factor: Interval | None
    time_to_loss: Interval | None
    target_time_to_loss: Interval | None
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


class PilotResult(_PilotRecord):
    """The whole result.

    Attributes:
        setting: How it was measured.
        arms: Vanilla first.
        token_value: Nats that vanilla gains when its tokens grow e-fold, from the "short" arm.
        equal_speed: Comparison of every MoE++ arm.
        target: The target; None without one.
        verdicts: Verdict of every MoE++ arm, the most favourable first.
        recommended: Name of the arm to go on with, or None where none has been shown to pay.
        answer: One plain sentence for the person who decides.
        caveats: Limits of this pilot.
    """

    setting: Setting
    arms: list[ArmOutcome]
    token_value: Interval
    equal_speed: list[EqualSpeed]
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
