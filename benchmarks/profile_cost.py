"""What recording a step costs it, and what the recorder costs when it is off: steps in turn.

Run under torchrun, from the repository's root:

    torchrun --standalone --nproc-per-node 2 -m benchmarks.profile_cost

The model is that of configs/quickstart.yaml on random tokens. A round is one step without any
recorder, one with a recorder that has no steps to record ("off", as every run has), and one that
is recorded. Starting, stopping and writing a recording happen between steps and are timed apart.
Prints milliseconds a step, median (quartiles), and the ratios to the plain step of the same round,
by wall time and by the processor time of rank 0.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import torch.distributed as dist

from benchmarks.quickstart_steps import Kind, QuickstartSteps, Times, in_turns, quartiles, table


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


def measure(rounds: int, folder: Path) -> dict[str, Times]:
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
    return in_turns(kinds, rounds)


def main() -> None:
    """Measure and print."""
    from moepp_megatron.runtime.distributed import start, stop
    from moepp_megatron.runtime.quiet import quiet
    from moepp_megatron.runtime.rank import RankEnvironment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    quiet()
    logging.disable()
    start(RankEnvironment.read())
    with tempfile.TemporaryDirectory() as folder:
        times = measure(rounds, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder, "profile").glob("rank0*"))
    if dist.get_rank() == 0:
        print(table(times, "plain"))
        recorded = times["recorded"]
        print(
            f"start {quartiles(recorded.before)} ms, end and write {quartiles(recorded.after)} ms, "
            f"a rank's files {size / 1024:.0f} KiB"
        )
    stop()


if __name__ == "__main__":
    main()
