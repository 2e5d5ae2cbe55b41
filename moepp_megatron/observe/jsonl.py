"""`RUN/metrics.jsonl`: the records of a run's steps, without undone ones, in whole lines."""

import itertools
import logging
import mmap
import shutil
from array import array
from pathlib import Path

from pydantic import ValidationError

from moepp_megatron.file_names import UNDONE_FILE
from moepp_megatron.observe.line_file import LineFile
from moepp_megatron.observe.metrics import StepMetrics, counting, read_lines
from moepp_megatron.runtime.atomic import whole_file

logger = logging.getLogger(__name__)


class JsonlSink:
    """Appends each record to `metrics.jsonl` as one line, in one write."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Open the file, in a folder made if needed; raise OSError if that or rewriting fails.

        `resume_step` is the first step that will be written: records from there on are dropped (0
        starts over); None keeps every complete record. An unfinished last line is always dropped. A
        file with lines that are no records is copied under another name before they are dropped.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._repair(resume_step)
        self._file = LineFile(path)

    def _repair(self, resume_step: int | None) -> None:
        """Keep the lines of the records that count, as they are."""
        import numpy as np

        steps, spans, first, damaged = array("q"), array("q"), None, 0
        for line in read_lines(self.path):
            if line.record is None:
                first, damaged = first or line, damaged + 1
            else:
                steps.append(line.record.step)
                spans.extend((line.start, line.end))
        count = counting(np.asarray(steps))
        if first is not None:
            aside = _free_name(self.path)
            with whole_file(aside) as temporary:
                shutil.copyfile(self.path, temporary)
            logger.warning(
                "%s:%d: %s (%d such lines); %d records are kept, and the file as it was is now %s",
                self.path,
                first.number,
                first.reason.partition(";")[0],
                damaged,
                count.sum(),
                aside,
            )
        if resume_step is not None:
            count &= np.asarray(steps) < resume_step
        with whole_file(self.path) as name, name.open("wb") as to, self.path.open("rb") as source:
            for start, end in np.asarray(spans).reshape(-1, 2)[count]:
                source.seek(start)
                # The last line may lack its end.
                to.write(source.read(end - start).rstrip(b"\n") + b"\n")

    def write(self, record: StepMetrics) -> None:
        """Append the record; raises as `LineFile.append` does."""
        self._file.append(record.to_json_line().encode())

    def go_back(self, step: int) -> None:
        """Move the records of steps after `step` to `metrics.undone.jsonl`.

        So every reader of the file sees the steps that the model has been trained with. On OSError
        (the disk is full or gone) the records are still in the file.
        """
        content = self._file.read()
        end = _end_of(content, step)
        if end == len(content):
            return
        undone = LineFile(self.path.with_name(UNDONE_FILE))
        try:
            undone.append(content[end:])
        finally:
            undone.close()
        self._file.cut(end)

    def close(self) -> None:
        """Force the file to disk and close it; raises as `LineFile.close` does."""
        self._file.close()


def _end_of(content: bytes | mmap.mmap, step: int) -> int:
    """The offset at which the records up to `step` end; only later ones follow."""
    end = len(content)
    while end > 0:
        start = content.rfind(b"\n", 0, end - 1) + 1
        try:
            if StepMetrics.model_validate_json(content[start:end]).step <= step:
                break
        except ValidationError:
            break
        end = start
    return end


def _free_name(path: Path) -> Path:
    """An unused name for the damaged file."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
