"""What recording a step costs it, and what the recorder costs when it is off: steps in turn.

Run under torchrun, from the repository's root:

    torchrun --standalone --nproc-per-node 2 -m benchmarks.profile_cost

The model is that of configs/quickstart.yaml on random tokens. A round is one step without any
recorder, one with a recorder that has no steps to record ("off", as every run has), and one that
is recorded. Starting, stopping and writing a recording happen between steps and are timed apart.
Prints milliseconds per step, median (quartiles), and the ratios to the plain step of the same
round, by wall time and by the processor time of rank 0.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.quickstart_steps import (
    Kind,
    QuickstartSteps,
    in_turns,
    on_ranks,
    quartiles,
    table,
)


class Recorded:
    """A step with a recorder of its own.

    Args:
        steps: Takes the step.
        config: Of the recorder: says whether step 1 is recorded.
    """

    def __init__(self, steps: QuickstartSteps, config: object) -> None:
        self._steps, self._config = steps, config

    def open(self) -> None:
        """A new recorder, which starts to record if it is to."""
        from moepp_megatron.training.profiler import StepRecorder

        self._recorder = StepRecorder(self._config, self._steps.layout, self._steps.model)
        self._recorder.begin_step(1)

    def step(self) -> None:
        """The step."""
        self._steps.take()
        self._recorder.end_step()

    def close(self) -> None:
        """Write what was recorded."""
        self._recorder.close()

    def as_kind(self) -> Kind:
        """To be timed."""
        return Kind(self.step, self.open, self.close)


def measure(rounds: int, folder: Path) -> list[str]:
    """Plain, off and recorded steps."""
    from moepp_megatron.config import load_config

    steps = QuickstartSteps.build(folder)
    quickstart = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    config = load_config(quickstart, [f"run.dir={folder}", "training.profile_steps=[1]"])
    kinds = {
        "plain": Kind(steps.take),
        "off": Recorded(steps, steps.config).as_kind(),
        "recorded": Recorded(steps, config).as_kind(),
    }
    times = in_turns(kinds, rounds)
    size = sum(path.stat().st_size for path in Path(folder, "profile").glob("rank0*"))
    recorded = times["recorded"]
    return [
        table(times, "plain"),
        f"start {quartiles(recorded.before)} ms, end and write {quartiles(recorded.after)} ms, "
        f"a rank's files {size / 1024:.0f} KiB",
    ]


if __name__ == "__main__":
    on_ranks(__doc__, default_rounds=20, measure=measure)
