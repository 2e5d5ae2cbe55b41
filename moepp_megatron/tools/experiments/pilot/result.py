"""The result of a pilot: the contents of `pilot.json`, which `pilot.html` shows.

A pilot trains several *arms* (the vanilla model, MoE++, vanilla narrowed to MoE++'s compute) with
the same seeds. A seed decides initial weights and the order of the data, so that arms are compared
in pairs. All intervals are 95% t-intervals; those of loss differences take the noise from all arms
together (statistics.py), those of speed are over sessions.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

ArmKind = Literal["vanilla", "moepp", "equal_time", "narrow", "short"]
Answer = Literal["pays", "does not pay", "undecided"]


class _PilotRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_PilotRecord):
    """A mean over seeds.

    Attributes:
        low: Lower end of the 95% interval; None with a single seed.
        high: Upper end.
    """

    mean: float
    low: float | None = None
    high: float | None = None


class Arm(_PilotRecord):
    """One model of the pilot.

    Attributes:
        name: Unique, as shown: "vanilla", "MoE++", "vanilla, 70% of the steps".
        kind: "vanilla"; "moepp"; `equal_time` is MoE++ trained for vanilla's time; `narrow` is
            vanilla with narrower experts and MoE++'s compute; "short" is vanilla with fewer steps,
            which shows the value of tokens.
        steps: Steps of each of its runs.
    """

    name: str
    kind: ArmKind
    steps: int


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
        valid_loss: Final validation loss, nats.
        loss_difference: Difference to vanilla with the same seed; None for vanilla.
        step_time_s: Median step of a run.
        time_ratio: Step time over vanilla's in the runs; None for vanilla and "short".
        ffn_share: FFN share of all selections, last quarter of the steps.
    """

    arm: Arm
    seeds: list[int]
    valid_loss: Interval
    loss_difference: Interval | None
    step_time_s: Interval
    time_ratio: Interval | None
    ffn_share: Interval
    curve: Curve


class Verdict(_PilotRecord):
    """Does MoE++ pay (verdict.py)?

    Attributes:
        loss_in_time: Loss after vanilla's time minus vanilla's, nats.
        loss_in_compute: Loss minus the narrowed vanilla model's, nats.
        time_to_loss: Time to vanilla's loss over vanilla's, from `loss_in_time`; None where fewer
            steps have not clearly cost vanilla loss, so that the value of tokens is unknown.
        speed: Step time over vanilla's in the sessions, which decided the steps of `equal_time`.
        speed_in_runs: The same in the training runs.
        speeds_agree: Whether these differ by no more than the limit (verdict.py).
    """

    answer: Answer
    loss_in_time: Interval
    loss_in_compute: Interval
    time_to_loss: Interval | None
    speed: Interval
    speed_in_runs: Interval
    speeds_agree: bool


class ArmSetting(_PilotRecord):
    """The conditions of the measurement.

    Attributes:
        device: Device of the ranks: a GPU's name, or the processor's.
        on_gpu: Whether it is a GPU.
        steps: Steps of a run.
        tokens: Tokens of a run.
        began: Day of the first run, ISO date.
        sessions: Sessions that timed MoE++.
        look: Number of the newest look; 0 before the first one, so that nothing is decided.
        next_seeds: Seeds of the next look.
        level: One-sided level that this look decides at.
    """

    command: str
    config: str
    tau: float
    nproc: int
    device: str
    on_gpu: bool
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
        verdict: The answer with its numbers.
        sentence: The answer for the person who decides.
    """

    setting: ArmSetting
    arms: list[ArmOutcome]
    token_value: Interval
    verdict: Verdict
    sentence: str
