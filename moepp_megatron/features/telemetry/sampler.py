"""One background thread per node that samples its devices."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from moepp_megatron.features.telemetry.sources import TelemetrySource
from moepp_megatron.features.telemetry.usage import DeviceSample, Usage

logger = logging.getLogger(__name__)


class Sampler:
    """Samples a source every `interval_s` seconds until stopped.

    A source that fails is dropped with a warning, because telemetry must not end a run.
    """

    def __init__(
        self,
        source: TelemetrySource,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source, self._interval_s, self._clock = source, interval_s, clock
        self._lock = threading.Lock()
        self._samples: list[list[DeviceSample]] = []
        self._last: list[DeviceSample] = []
        self._stop = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="moepp-telemetry", daemon=True)
        self._begun, self._energy = clock(), self._read_energy()

    def start(self) -> None:
        """Start sampling; the first sample exists on return, so that every `take` has one."""
        self.look()
        self._begun, self._energy = self._clock(), self._read_energy()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the source."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._source.close()

    def look(self) -> None:
        """Take one sample now."""
        if self._failed:
            return
        try:
            sample = self._source.sample()
            faults = self._source.faults()
        except Exception as error:
            self._give_up(error)
            return
        for fault in faults:
            logger.error("%s", fault)
        with self._lock:
            self._samples.append(sample)
            self._last = sample

    def take(self) -> Usage:
        """The usage since `start` or the last `take`.

        It costs a read of the energy counters. If no sample fell into the time, the newest counts.
        """
        now, energy = self._clock(), self._read_energy()
        with self._lock:
            samples, self._samples = self._samples, []
            samples = samples or ([self._last] if self._last else [])
        spent = None
        if energy is not None and self._energy is not None and energy >= self._energy:
            spent = energy - self._energy
        usage = Usage.of(samples, spent, self._source.devices, now - self._begun)
        self._begun, self._energy = now, energy
        return usage

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.look()

    def _read_energy(self) -> float | None:
        if self._failed:
            return None
        try:
            return self._source.energy_j()
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        logger.warning("telemetry is off from here on: %s", error)
