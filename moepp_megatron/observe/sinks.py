"""Where records go: the file, TensorBoard, and the fan-out that protects training."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from moepp_megatron.observe.atomic import write_atomic
from moepp_megatron.observe.console import ConsoleSink
from moepp_megatron.observe.expert_names import ExpertCounts
from moepp_megatron.observe.metrics import StepMetrics, parse_metrics
from moepp_megatron.observe.patient import PatientSink
from moepp_megatron.observe.sink import Sink

logger = logging.getLogger(__name__)

__all__ = ["ConsoleSink", "JsonlSink", "Sink", "Sinks", "TensorBoardSink", "open_sinks"]


class JsonlSink:
    """Appends each record to ``metrics.jsonl`` as one line, in one write."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Opens the sink.

        Args:
            path: The file; its folder is made if needed.
            resume_step: The first step that will be written from now on: records from there
                on are dropped (0 starts over). None keeps every complete record. An unfinished
                last line is dropped either way.

        Raises:
            MetricsError: An existing file has a damaged line before its last.
            OSError: The file cannot be opened or rewritten.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._repair(resume_step)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def _repair(self, resume_step: int | None) -> None:
        content = self.path.read_bytes()
        if resume_step == 0:
            kept = []
        else:
            records = parse_metrics(content, str(self.path))
            kept = [r for r in records if resume_step is None or r.step < resume_step]
        repaired = "".join(record.to_json_line() for record in kept).encode()
        if repaired != content:
            write_atomic(self.path, repaired)

    def write(self, record: StepMetrics) -> None:
        """Appends the record.

        Raises:
            OSError: The disk is full or gone; the file then still ends with a complete line.
        """
        line = record.to_json_line().encode()
        end = os.fstat(self._fd).st_size
        written = os.write(self._fd, line)
        if written != len(line):
            os.ftruncate(self._fd, end)
            raise OSError(
                f"{self.path}: only {written} of {len(line)} bytes could be written; "
                "free disk space and resume the run"
            )

    def close(self) -> None:
        """Forces the file to disk and closes it; a second call does nothing."""
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1


class TensorBoardSink:
    """Writes scalars to a TensorBoard event folder."""

    GROUPS = {
        "loss": "loss/train",
        "valid_loss": "loss/validation",
        "balance_loss": "loss/balance",
        "z_loss": "loss/z",
        "lr": "optimizer/lr",
        "grad_norm": "optimizer/grad_norm",
        "num_zeros": "optimizer/num_zeros",
        "step_time_s": "speed/step_time_s",
        "tokens_per_s": "speed/tokens_per_s",
        "a2a_bytes": "speed/a2a_bytes",
        "slowest_rank_ratio": "speed/slowest_rank_ratio",
        "waiting_fraction": "speed/waiting_fraction",
        "skipped_steps": "optimizer/skipped_steps",
        "mfu": "speed/mfu",
        "model_tflops": "speed/model_tflops",
        "energy_j": "hardware/energy_j",
        "energy_per_token_j": "hardware/energy_per_token_j",
        "gpu_hours": "hardware/gpu_hours",
        "gpu_power_w": "hardware/gpu_power_w",
        "gpu_utilization": "hardware/gpu_utilization",
        "gpu_clock_mhz": "hardware/gpu_clock_mhz",
        "gpu_memory_bytes": "hardware/gpu_memory_bytes",
        "gpu_temperature_c": "hardware/gpu_temperature_c",
        "nvlink_bytes_per_s": "hardware/nvlink_bytes_per_s",
        "pcie_bytes_per_s": "hardware/pcie_bytes_per_s",
        "cpu_utilization": "hardware/cpu_utilization",
        "host_memory_bytes": "hardware/host_memory_bytes",
        "tokens": "speed/tokens",
        "ffn_fraction": "router/ffn_fraction",
        "ffn_target": "router/ffn_target",
        "tau": "router/tau",
        "ffn_per_token": "router/ffn_per_token",
        "max_ffn_load": "router/max_ffn_load",
        "dropped_fraction": "router/dropped_fraction",
    }

    def __init__(self, folder: Path, experts: ExpertCounts, resume_step: int | None = None) -> None:
        """Opens the sink.

        Args:
            folder: ``RUN/tensorboard``.
            experts: Names the entries of ``expert_share``.
            resume_step: The first step that will be written from now on; TensorBoard hides
                events of an earlier attempt from there on.

        Raises:
            ImportError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard output needs the tensorboard package; pip install tensorboard"
            ) from error
        self._names = experts.names
        self._writer = SummaryWriter(str(folder), purge_step=resume_step)

    def write(self, record: StepMetrics) -> None:
        """Writes every number of the record, and the shares by expert and by MoE layer."""
        for key, value in record.model_dump(exclude_none=True).items():
            if isinstance(value, int | float) and key != "step":
                self._scalar(self.GROUPS.get(key, f"other/{key}"), value, record.step)
        for name, share in zip(self._names, record.expert_share, strict=True):
            self._scalar(f"expert_share/{name.replace(' ', '_')}", share, record.step)
        for layer, fraction in enumerate(record.layer_ffn_fraction or ()):
            self._scalar(f"layer_ffn_fraction/moe_layer_{layer}", fraction, record.step)

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class Sinks:
    """Hands each record to every sink; an optional sink that fails is left out from then on."""

    def __init__(self, required: Sequence[Sink], optional: Sequence[Sink] = ()) -> None:
        """Takes open sinks, which it closes.

        Args:
            required: Sinks whose failure must stop the run, since the record would be lost.
            optional: Sinks that are a convenience.
        """
        self._required = list(required)
        self._optional = list(optional)

    def write(self, record: StepMetrics) -> None:
        """Hands the record to every sink, required ones first.

        Raises:
            Exception: Whatever a required sink raises.
        """
        for sink in self._required:
            sink.write(record)
        for sink in list(self._optional):
            try:
                sink.write(record)
            except Exception as error:  # a view must not end a training run
                self._optional.remove(sink)
                logger.warning(
                    "%s failed at step %d and is off from here on: %s",
                    type(sink).__name__,
                    record.step,
                    error,
                )

    def close(self) -> None:
        """Closes every sink, whatever the others do; a required sink's error is raised last."""
        failure: Exception | None = None
        for sink in [*self._optional, *self._required]:
            try:
                sink.close()
            except Exception as error:  # the other sinks must be closed too
                if sink in self._required:
                    failure = error
                else:
                    logger.warning("%s could not be closed: %s", type(sink).__name__, error)
        if failure is not None:
            raise failure


def open_sinks(
    run_dir: Path,
    experts: ExpertCounts,
    *,
    phi: float,
    total_steps: int,
    resume_step: int | None = None,
    print_every: int = 1,
) -> Sinks:
    """The sinks of a training run: ``metrics.jsonl``, the console, and TensorBoard if installed.

    Args:
        run_dir: The run's folder.
        experts: Counts of the run's MoE layers.
        phi: The FFN share that is wanted; the console shows it.
        total_steps: ``training.train_iters``.
        resume_step: The first step that will be written; see ``JsonlSink``.
        print_every: In a log without a terminal, print the records of steps divisible by this
            (and the first, the last and evaluated ones).
    """
    jsonl = JsonlSink(run_dir / "metrics.jsonl", resume_step)
    optional: list[Sink] = [ConsoleSink(total_steps, phi=phi, print_every=print_every)]
    try:
        optional.append(TensorBoardSink(run_dir / "tensorboard", experts, resume_step))
    except Exception as error:  # a view must not keep a run from starting
        logger.warning("no TensorBoard output: %s", error)
    return Sinks([PatientSink(jsonl)], optional)
