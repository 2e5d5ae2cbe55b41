"""The detector of nvidia-resiliency-ext, by a stand-in: the real one needs CUPTI."""

import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moepp_megatron.training.resilience.kernel_stragglers import (
    KernelScores,
    KernelStragglerDetector,
)

MODULE = "nvidia_resiliency_ext.attribution.straggler"


class Detector:
    """Same class methods; keeps what was called."""

    calls: list[Any] = []
    scores: dict[int, float] = {}

    @classmethod
    def initialize(
        cls,
        scores_to_compute: Any = "all",
        gather_on_rank0: bool = True,
        profiling_interval: int = 1,
        report_time_interval: float = 60,
        node_name: str | None = None,
    ) -> None:
        cls.calls.append(("initialize", profiling_interval, gather_on_rank0))

    @classmethod
    def shutdown(cls) -> None:
        cls.calls.append("shutdown")

    @classmethod
    @contextmanager
    def detection_section(
        cls, name: str | None = None, profile_cuda: bool = True
    ) -> Iterator[None]:
        cls.calls.append("enter")
        yield
        cls.calls.append("leave")

    @classmethod
    def generate_report(cls) -> SimpleNamespace:
        cls.calls.append("report")
        nodes = {rank: f"node{rank}" for rank in cls.scores}
        return SimpleNamespace(gpu_relative_perf_scores=cls.scores, rank_to_node=nodes)


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> type[Detector]:
    module = ModuleType(MODULE)
    module.Detector = Detector  # type: ignore[attr-defined]
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.attribution"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(Detector, "calls", [])
    monkeypatch.setattr(Detector, "scores", {0: 1.0, 1: 0.9, 2: 0.4, 3: 0.95})
    return Detector


def test_slow_gpu_is_named_at_the_interval(detector: type[Detector], caplog) -> None:
    watch = KernelStragglerDetector(interval=2, threshold=2.0)
    watch.start()
    with caplog.at_level(logging.WARNING):
        watch.begin_step()
        assert watch.end_step(1) is None
        watch.begin_step()
        found = watch.end_step(2)
    watch.stop()
    assert (found.slowest, found.waiting_fraction) == (2, None)
    assert found.ratio == pytest.approx(0.95 / 0.4)
    assert "step 2: rank 2 on node node2 is a straggler" in caplog.text
    assert detector.calls == [
        ("initialize", 2, True),
        *["enter", "leave"] * 2,
        "report",
        "shutdown",
    ]


def test_equal_gpus_are_not_reported(detector: type[Detector], caplog, monkeypatch) -> None:
    monkeypatch.setattr(detector, "scores", {0: 1.0, 1: 0.98, 2: float("nan")})
    watch = KernelStragglerDetector(interval=1, threshold=1.5)
    watch.begin_step()
    assert watch.end_step(1) == KernelScores({0: 1.0, 1: 0.98})
    assert not caplog.records


def test_refused_step_and_early_end_leave_no_section_open(detector: type[Detector]) -> None:
    watch = KernelStragglerDetector(interval=5, threshold=1.5)
    watch.begin_step()
    watch.begin_step()
    watch.stop()
    assert detector.calls == ["enter", "leave", "enter", "leave", "shutdown"]


def test_other_ranks_get_no_scores(detector: type[Detector], monkeypatch) -> None:
    monkeypatch.setattr(detector, "scores", {})
    watch = KernelStragglerDetector(interval=1, threshold=1.5)
    watch.begin_step()
    assert watch.end_step(1) is None


def test_stand_in_has_the_signatures_of_the_real_one() -> None:
    real = pytest.importorskip(MODULE, reason="nvidia-resiliency-ext is not installed").Detector
    for name in ("initialize", "shutdown", "detection_section", "generate_report"):
        expected = list(inspect.signature(getattr(real, name)).parameters)
        assert list(inspect.signature(getattr(Detector, name)).parameters) == expected
