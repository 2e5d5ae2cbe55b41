"""All that `benchmarks/gpu.sh` measured of one card, in one file.

    python -m benchmarks.record FOLDER --out DIR --command TEXT [--allow-cpu]
    python -m benchmarks.record RECORD.json RECORD.json ... --out DIR

FOLDER holds what the steps left: `card.json` of `benchmarks.card`, `layer_*.json` and
`step_*.json` of `moepp bench`, runs in `run_*`, what each step printed, `*.xml` of pytest, and
`steps.tsv` with one line a step: name, exit status, seconds,
commit, choice of shapes.
The file is DIR/<card>.json. A step that failed leaves its exit status and no numbers;
3 says that the machine cannot do it. Records of several machines with the same card make one;
where two have a step, the later one counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from moepp_megatron.config.errors import ConfigError, UnfitError
from moepp_megatron.config.json_file import read_json
from moepp_megatron.runtime.atomic import write_atomic


def assemble(folder: Path, command: str, driver: str | None = None) -> dict[str, Any]:
    """The record of one card.

    Args:
        folder: What the steps left.
        command: That was run.
        driver: Version of the card's driver.

    Raises:
        ConfigError: Without the measurement of the card itself, or with a file that is not JSON.
    """
    card = _read(folder / "card.json")
    if not isinstance(card, dict) or "device" not in card:
        raise ConfigError(
            f"{folder / 'card.json'} must be what `benchmarks.card` writes; run the step card again"
        )
    steps = _steps(folder / "steps.tsv")
    return {
        "card": card["device"],
        "driver": driver,
        "versions": card["versions"],
        "command": command,
        "commits": sorted({step["commit"] for step in steps}),
        "written": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "steps": steps,
        "tests": {path.stem: _tests(path) for path in sorted(folder.glob("*.xml"))},
        "measured": card,
        "layer": _named(folder, "layer_", steps),
        "step": _named(folder, "step_", steps),
        "serve": _serve(folder / "serve.jsonl"),
        "runs": {path.name.removeprefix("run_"): _run(path) for path in _runs(folder)},
    }


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """One record of several, of machines with the same card.

    Raises:
        ConfigError: For a file that is no record, or of another card.
    """
    records = sorted((_record(path) for path in paths), key=lambda record: record["written"])
    result = records[-1]
    for part in ("versions", "layer", "step", "serve", "runs", "tests"):
        result[part] = {name: x for record in records for name, x in record[part].items()}
    steps = {step["name"]: step for record in records for step in record["steps"]}
    result["steps"] = list(steps.values())
    result["commits"] = sorted({commit for record in records for commit in record["commits"]})
    result["command"] = "; ".join(record["command"] for record in records)
    cards = sorted({record["card"] for record in records})
    if len(cards) > 1:
        raise ConfigError(f"records must be of one card, not of {' and '.join(cards)}")
    return result


def _record(path: Path) -> dict[str, Any]:
    record = _read(path)
    if not isinstance(record, dict) or "written" not in record:
        raise ConfigError(f"{path} must be a record of benchmarks/gpu.sh")
    return record


def file_name(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` to `nvidia_h100_80gb_hbm3.json`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def write_record(folder: Path, out: Path, command: str, *, allow_cpu: bool = False) -> Path:
    """Assemble and write; returns the file.

    Raises:
        ConfigError: As `assemble`.
        UnfitError: For a CPU's numbers, which are not a card's, unless they are asked for.
    """
    record = assemble(folder, command, driver_version())
    if record["measured"]["kind"] != "cuda" and not allow_cpu:
        raise UnfitError("a card's results need a CUDA GPU; use --allow-cpu to try the script")
    return write(record, out)


def write(record: dict[str, Any], out: Path) -> Path:
    """Write a record to the folder under its card's name; returns the file."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / file_name(record["card"])
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    return path


def driver_version() -> str | None:
    """Of the NVIDIA driver; None where there is none."""
    from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError

    try:
        with Nvml() as nvml:
            return nvml.driver().version
    except NvmlUnavailableError:
        return None


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} must be JSON ({error}); remove it and run its step") from None


def _serve(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of each model and batch."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {f"{row['model']}, batch {row['batch']}": row for row in rows}


def _steps(path: Path) -> list[dict[str, Any]]:
    """The last run of each step, in order."""
    steps: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        name, status, seconds, commit, *_ = line.split("\t")
        steps.pop(name, None)
        steps[name] = {
            "name": name,
            "exit_status": int(status),
            "seconds": int(seconds),
            "commit": commit,
        }
    return list(steps.values())


def _named(folder: Path, prefix: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Results by what follows the prefix; not of steps that failed, whose files would be older."""
    failed = {step["name"] for step in steps if step["exit_status"] != 0}
    return {
        path.stem.removeprefix(prefix): _read(path)
        for path in sorted(folder.glob(f"{prefix}*.json"))
        if path.stem not in failed
    }


def _runs(folder: Path) -> list[Path]:
    """Runs that have written a step; those that were moved aside have a date in their name."""
    # A run that was stopped may have half a line.
    metrics = (path for path in folder.glob("run_*/metrics.jsonl") if b"\n" in path.read_bytes())
    runs = (path.parent for path in metrics)
    return sorted(path for path in runs if re.fullmatch(r"run_[a-z_]+", path.name))


def _run(folder: Path) -> dict[str, Any]:
    """The last step of a run: loss, time, memory with the planner's estimate of it, and modules."""
    log = folder.with_suffix(".log")
    printed = log.read_text().splitlines() if log.exists() else ()
    last = json.loads((folder / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()[-1])
    return {
        "step": last["step"],
        "loss": last["loss"],
        "step_time_s": last["step_time_s"],
        "memory_bytes": last.get("gpu_memory_bytes"),
        "estimated_bytes": _estimated_bytes(folder / "config.yaml"),
        "modules": next((x for x in printed if x.startswith("optional packages used: ")), None),
    }


def _estimated_bytes(path: Path) -> float:
    from moepp_megatron.cli.memory_fit import needed_bytes
    from moepp_megatron.config import Layout, load_config
    from moepp_megatron.tools.planning.memory import rank_memory

    config = load_config(path)
    parallel = config.parallel
    model_ranks = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    layout = Layout.from_config(config, max(model_ranks, parallel.expert_model_parallel_size))
    return needed_bytes([rank_memory(config, layout, p) for p in range(layout.pp)])


def _tests(path: Path) -> dict[str, int]:
    """Count the tests that passed; name those that failed; count those skipped by their reason."""
    counts = Counter(passed=0)
    try:
        tests = ElementTree.parse(path)
    except ElementTree.ParseError as error:
        return {f"unreadable: {error}": 1}
    for case in tests.iter("testcase"):
        reason = case.find("skipped")
        if reason is not None:
            counts[f"skipped: {reason.get('message', '')}"] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            counts[f"failed: {case.get('classname')}.{case.get('name')}"] += 1
        else:
            counts["passed"] += 1
    return dict(counts)


def main() -> None:
    """The command line; a user's error is one line and its exit code."""
    parser = argparse.ArgumentParser(description="One file of all results of a card.")
    parser.add_argument("sources", type=Path, nargs="+", metavar="FOLDER | RECORD.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--command", default="")
    parser.add_argument("--allow-cpu", action="store_true")
    arguments = parser.parse_args()
    try:
        if arguments.sources[0].is_dir():
            (folder,) = arguments.sources
            path = write_record(
                folder, arguments.out, arguments.command, allow_cpu=arguments.allow_cpu
            )
        else:
            path = write(joined(arguments.sources), arguments.out)
    except (ConfigError, UnfitError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"record       {path}")


if __name__ == "__main__":
    main()
