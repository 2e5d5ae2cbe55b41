"""Shows a running training: a live bar on a terminal, or plain lines in a log."""

import statistics
from collections import deque

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.runtime.terminal import Console

# Enough steps that one slow one (a checkpoint, an evaluation) does not move the estimate.
_STEP_TIME_WINDOW = 20


class ConsoleSink:
    """A progress bar on a terminal, one plain line for each record elsewhere."""

    def __init__(self, total_steps: int, phi: float, console: Console | None = None) -> None:
        """Open the sink."""
        self._total_steps = total_steps
        self._phi = phi
        self._console = console if console is not None else Console()
        self._step_times: deque[float] = deque(maxlen=_STEP_TIME_WINDOW)
        self._started = False
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]train"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                console=self._console,
                refresh_per_second=2,
            )
            self._task = self._progress.add_task("train", total=total_steps, status="starting")

    def write(self, record: StepMetrics) -> None:
        """Show the record."""
        self._step_times.append(record.step_time_s)
        if self._progress is not None:
            if not self._started:
                self._progress.start()
            for text in _evaluation_texts(record, "validation loss"):
                self.message(f"step {record.step}: {text}")
            self._progress.update(self._task, completed=record.step, status=self._status(record))
        else:
            self.message(f"step {record.step}/{self._total_steps} | {self._status(record)}")
        self._started = True

    def go_back(self, step: int) -> None:
        """Do nothing: the alert of the rollback has been printed, and lines cannot be removed."""

    def message(self, text: str) -> None:
        """Print a line; on a terminal it goes above the bar."""
        self._console.print_line(text)

    def close(self) -> None:
        """Leave the bar and release the terminal."""
        if self._progress is not None:
            self._progress.stop()

    def _status(self, record: StepMetrics) -> str:
        parts = [f"loss {record.loss:.4f}"]
        if self._progress is None:
            parts += _evaluation_texts(record, "valid loss")
            parts += [f"lr {record.lr:.2e}", f"grad norm {record.grad_norm:.3f}"]
        parts.append(f"FFN share {record.ffn_fraction:.3f} ({self._wanted(record)})")
        parts.append(f"{record.tokens_per_s:,.0f} tokens/s")
        parts.append(f"ETA {self._remaining(record.step)}")
        return " | ".join(parts)

    def _wanted(self, record: StepMetrics) -> str:
        if record.ffn_target is not None:
            return f"target {record.ffn_target:.3f}"
        return f"phi {self._phi:.3f}"

    def _remaining(self, step: int) -> str:
        # Own estimate from step times: rich's would count steps of an earlier attempt as progress.
        seconds = statistics.median(self._step_times) * max(0, self._total_steps - step)
        if seconds != seconds:
            return "unknown"
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d}"


def _evaluation_texts(record: StepMetrics, what: str) -> list[str]:
    """The validation losses and scores of a record, as a reader sees them."""
    whole = [] if record.valid_loss is None else [f"{what} {record.valid_loss:.4f}"]
    named = record.valid_set_loss or {}
    losses = [f"{what} of {name} {loss:.4f}" for name, loss in named.items()]
    return whole + losses + [f"{n} {score:.4f}" for n, score in (record.task_score or {}).items()]
