"""Rated numbers of a kind of GPU, and the limits of a healthy one: `configs/hardware/*.yaml`.

The rated numbers are the vendor's; the thresholds say how far below them a healthy GPU may stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.schema.section import Section, unit
from moepp_megatron.config.yaml_file import read_mapping

# Beside the package in a source tree, which is how `launch/env.sh` installs it.
_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "hardware"


class Thresholds(Section):
    """The limits beyond which a measurement is a finding."""

    matmul_fraction: float = Field(
        default=0.6,
        gt=0.0,
        le=1.0,
        description="Least share of the rated bf16 rate in a large matrix product; healthy GPUs "
        "reach 0.7 to 0.85",
        json_schema_extra=unit("1"),
    )
    collective_fraction: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="Least share of the rated link bandwidth in a large collective",
        json_schema_extra=unit("1"),
    )
    slowest_ratio: float = Field(
        default=1.15,
        gt=1.0,
        description="Time of the slowest rank over the ranks' median from which it is a finding",
        json_schema_extra=unit("1"),
    )
    power_limit_fraction: float = Field(
        default=0.95,
        gt=0.0,
        le=1.0,
        description="Least share of the rated power that the power cap may allow",
        json_schema_extra=unit("1"),
    )
    temperature_margin_c: float = Field(
        default=5.0,
        ge=0.0,
        description="Distance from the slowdown temperature from which a GPU is too warm",
        json_schema_extra=unit("degrees Celsius"),
    )
    foreign_memory_gib: float = Field(
        default=1.0,
        ge=0.0,
        description="GPU memory of other processes from which a GPU is taken",
        json_schema_extra=unit("GiB"),
    )
    shared_memory_gib: float = Field(
        default=1.0,
        ge=0.0,
        description="Least size of /dev/shm; containers start with 64 MiB, on which NCCL fails",
        json_schema_extra=unit("GiB"),
    )
    open_files: int = Field(
        default=4096,
        ge=1,
        description="Least soft limit of open files; each rank holds a socket a peer and channel",
        json_schema_extra=unit("files"),
    )
    disk_write_mb_s: float = Field(
        default=100.0,
        ge=0.0,
        description="Least write speed of the run and checkpoint folders",
        json_schema_extra=unit("MB/s"),
    )
    clock_skew_s: float = Field(
        default=1.0,
        gt=0.0,
        description="Largest difference between the clocks of two nodes; logs cannot be put in "
        "order beyond it",
        json_schema_extra=unit("s"),
    )


class Hardware(Section):
    """One kind of GPU in its usual server. Rates are dense (without sparsity) and decimal."""

    name: str = Field(description="Short name", json_schema_extra=unit("-"))
    kind: Literal["gpu", "cpu"] = Field(
        default="gpu", description="What computes", json_schema_extra=unit("-")
    )
    device_names: list[str] = Field(
        default=[],
        description="Names under which NVML knows the GPU",
        json_schema_extra=unit("-"),
    )
    memory_gb: float | None = Field(
        default=None, gt=0.0, description="Device memory", json_schema_extra=unit("GB")
    )
    memory_mib: float | None = Field(
        default=None,
        gt=0.0,
        description="Device memory as the driver reports it; what the name rounds",
        json_schema_extra=unit("MiB"),
    )
    memory_bandwidth_gb_s: float | None = Field(
        default=None, gt=0.0, description="Device memory bandwidth", json_schema_extra=unit("GB/s")
    )
    fp32_tflops: float | None = Field(
        default=None, gt=0.0, description="fp32 without tensor cores", json_schema_extra=unit("TF")
    )
    bf16_tflops: float | None = Field(
        default=None, gt=0.0, description="bf16 tensor cores, dense", json_schema_extra=unit("TF")
    )
    fp8_tflops: float | None = Field(
        default=None, gt=0.0, description="fp8 tensor cores, dense", json_schema_extra=unit("TF")
    )
    multiprocessors: int | None = Field(
        default=None, ge=1, description="Streaming multiprocessors", json_schema_extra=unit("-")
    )
    nvlink_gb_s: float | None = Field(
        default=None,
        gt=0.0,
        description="NVLink bandwidth of a GPU, both directions added",
        json_schema_extra=unit("GB/s"),
    )
    nvlink_links: int = Field(
        default=0, ge=0, description="NVLink links of a GPU", json_schema_extra=unit("links")
    )
    pcie_generation: int | None = Field(
        default=None, ge=1, description="PCIe generation", json_schema_extra=unit("-")
    )
    pcie_width: int | None = Field(
        default=None, ge=1, description="PCIe lanes", json_schema_extra=unit("lanes")
    )
    power_watts: float | None = Field(
        default=None, gt=0.0, description="Rated board power", json_schema_extra=unit("W")
    )
    network_gbit_s_per_gpu: float | None = Field(
        default=None,
        gt=0.0,
        description="Network port of a GPU in the vendor's reference server, one direction",
        json_schema_extra=unit("Gbit/s"),
    )
    gpus_per_node: int | None = Field(
        default=None, ge=1, description="GPUs of the reference server", json_schema_extra=unit("-")
    )
    price_per_hour: float | None = Field(
        default=None,
        gt=0.0,
        description="What a GPU costs per hour, in your currency; none is set here",
        json_schema_extra=unit("money/h"),
    )
    reached: dict[str, float] = Field(
        default={},
        description="What this GPU reaches where it differs from an H100 "
        "(workbench/planning/efficiency.py); moepp plan --fit writes it",
        json_schema_extra=unit("-"),
    )
    thresholds: Thresholds = Field(default_factory=Thresholds, description="What counts as unfit")

    @property
    def memory_bytes(self) -> float | None:
        """Device memory: as the driver reports it, else what the data sheet calls it."""
        if self.memory_mib is not None:
            return self.memory_mib * 2**20
        return None if self.memory_gb is None else self.memory_gb * 1e9

    def peak_tflops(self, dtype: str, fp8: str | None = None) -> float | None:
        """Rated dense TFLOP/s of a number format of `precision:`; None where it is not known."""
        if fp8 is not None:
            return self.fp8_tflops
        return self.bf16_tflops if dtype == "bf16" else self.fp32_tflops


def load_hardware(name: str) -> Hardware:
    """Read a description.

    Args:
        name: Name of a file in `configs/hardware` without `.yaml`, or a path of a YAML file.

    Raises:
        ConfigError: No such description, or one that is not valid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(known_hardware())) or "none is installed"
        raise ConfigError(
            f"hardware ({name}) must be a known name ({known}) or a YAML file; use one of them"
        )
    return _validated(read_mapping(path), str(path))


def _validated(content: Mapping[str, Any], source: str) -> Hardware:
    try:
        return Hardware.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(
            f"{source}: {key}: {first['msg']}; see the fields of config/hardware.py"
        ) from None


def with_changes(hardware: Hardware, changes: Mapping[str, Any], source: str) -> Hardware:
    """A copy with some fields changed.

    Raises:
        ConfigError: If a field is unknown or its value is not valid.
    """
    return _validated({**hardware.model_dump(exclude_unset=True), **changes}, source)


def known_hardware() -> list[str]:
    """Names of the descriptions that come with the source tree."""
    return [path.stem for path in _FOLDER.glob("*.yaml")]


def nearest_hardware(name: str) -> str:
    """The name of the one description that starts with `name`, such as h100; else `name` itself."""
    if name in known_hardware():
        return name
    starting = [known for known in known_hardware() if known.startswith(name.lower())]
    return starting[0] if len(starting) == 1 else name


def find_hardware(device_name: str) -> Hardware | None:
    """The description of the GPU that NVML calls `device_name`, or None."""
    for name in known_hardware():
        hardware = load_hardware(name)
        if device_name in hardware.device_names:
            return hardware
    return None
