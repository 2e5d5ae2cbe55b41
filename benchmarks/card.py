"""A GPU's own rates: matrix products and a copy in its memory, with the rated ones.

python -m benchmarks.card FILE.json [--size SIDE] [--megabytes MB]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from moepp_megatron.config.hardware import find_hardware
from moepp_megatron.runtime.atomic import write_result
from moepp_megatron.tools.bench.bounds import measure_card

DTYPES = ("fp32", "bf16", "fp8")


def main() -> None:
    """Measure, and write what `benchmarks.record` reads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", type=int, help="side of the square matrices")
    parser.add_argument("--megabytes", type=int, help="what to copy")
    given = parser.parse_args()
    card = measure_card(DTYPES, given.size, given.megabytes and given.megabytes * 10**6)
    rated = find_hardware(card.device)
    rates = {d: rated and rated.peak_tflops(d, "e4m3" if d == "fp8" else None) for d in DTYPES}
    record = asdict(card) | {
        "kind": "cuda" if torch.cuda.is_available() else "cpu",
        "rated_tflops": {dtype: rate for dtype, rate in rates.items() if rate},
        "rated_gb_s": rated and rated.memory_bandwidth_gb_s,
        "versions": {name: version for name, version in _versions() if version},
    }
    write_result(given.file, json.dumps(record, indent=1).encode())


def _versions() -> Iterator[tuple[str, str | None]]:
    yield from (("torch", str(torch.__version__)), ("cuda", torch.version.cuda))
    for name in ("megatron-core", "transformer-engine", "triton"):
        with suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


if __name__ == "__main__":
    main()
