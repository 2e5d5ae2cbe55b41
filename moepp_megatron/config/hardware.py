"""Rated numbers of a kind of GPU, and the limits of a healthy one: `configs/hardware/*.yaml`.

The rated numbers are the vendor's; the thresholds say how far below them a healthy GPU may stay.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ValidationError

from moepp_megatron.config.errors import ConfigError, first_misfit
from moepp_megatron.config.schema.section import Section, Unit
from moepp_megatron.config.yaml_file import read_mapping

# Beside the package in a source tree, which is how `launch/env.sh` installs it.
HARDWARE_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "hardware"


class Thresholds(Section):
    """The limits beyond which a measurement is a finding."""

    matmul_fraction: Annotated[float, Unit("1", gt=0.0, le=1.0)] = 0.6
    """Least share of the rated bf16 rate in a large matrix product; healthy GPUs reach 0.7 to 0.85
    """
    collective_fraction: Annotated[float, Unit("1", gt=0.0, le=1.0)] = 0.5
    """Least share of the rated link bandwidth in a large collective"""
    slowest_ratio: Annotated[float, Unit("1", gt=1.0)] = 1.15
    """Time of the slowest rank over the ranks' median from which it is a finding"""
    power_limit_fraction: Annotated[float, Unit("1", gt=0.0, le=1.0)] = 0.95
    """Least share of the rated power that the power cap may allow"""
    foreign_memory_gib: Annotated[float, Unit("GiB", ge=0.0)] = 1.0
    """GPU memory of other processes from which a GPU is taken"""
    shared_memory_gib: Annotated[float, Unit("GiB", ge=0.0)] = 1.0
    """Least size of /dev/shm; containers start with 64 MiB, on which NCCL fails"""
    open_files: Annotated[int, Unit("files", ge=1)] = 4096
    """Least soft limit of open files; each rank holds a socket a peer and channel"""
    disk_write_mb_s: Annotated[float, Unit("MB/s", ge=0.0)] = 100.0
    """Least write speed of the run and checkpoint folders"""


class Hardware(Section):
    """One kind of GPU in its usual server. Rates are dense (without sparsity) and decimal."""

    name: str
    """Short name"""
    kind: Literal["gpu", "cpu"] = "gpu"
    """Device type"""
    device_names: list[str] = []
    """Names under which NVML knows the GPU"""
    memory_gb: Annotated[float | None, Unit("GB", gt=0.0)] = None
    """Device memory"""
    memory_mib: Annotated[float | None, Unit("MiB", gt=0.0)] = None
    """Device memory as the driver reports it; what the name rounds"""
    memory_bandwidth_gb_s: Annotated[float | None, Unit("GB/s", gt=0.0)] = None
    """Device memory bandwidth"""
    fp32_tflops: Annotated[float | None, Unit("TF", gt=0.0)] = None
    """fp32 without tensor cores"""
    bf16_tflops: Annotated[float | None, Unit("TF", gt=0.0)] = None
    """bf16 tensor cores, dense"""
    fp8_tflops: Annotated[float | None, Unit("TF", gt=0.0)] = None
    """fp8 tensor cores, dense"""
    multiprocessors: Annotated[int | None, Unit("-", ge=1)] = None
    """Streaming multiprocessors"""
    nvlink_gb_s: Annotated[float | None, Unit("GB/s", gt=0.0)] = None
    """NVLink bandwidth of a GPU, both directions added"""
    nvlink_links: Annotated[int, Unit("links", ge=0)] = 0
    """NVLink links of a GPU"""
    pcie_generation: Annotated[int | None, Unit("-", ge=1)] = None
    """PCIe generation"""
    pcie_width: Annotated[int | None, Unit("lanes", ge=1)] = None
    """PCIe lanes"""
    power_watts: Annotated[float | None, Unit("W", gt=0.0)] = None
    """Rated board power"""
    network_gbit_s_per_gpu: Annotated[float | None, Unit("Gbit/s", gt=0.0)] = None
    """Network port of a GPU in the vendor's reference server, one direction"""
    gpus_per_node: Annotated[int | None, Unit("-", ge=1)] = None
    """GPUs of the reference server"""
    price_per_hour: Annotated[float | None, Unit("money/h", gt=0.0)] = None
    """Price of a GPU per hour, in your currency; none is set here"""
    reached: Annotated[dict[str, float], Unit("-")] = {}
    """Efficiencies of this GPU that differ from an H100's (tools/planning/machine.py)"""
    thresholds: Thresholds = Thresholds()
    """Limits of health"""

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
        return {"fp32": self.fp32_tflops, "bf16": self.bf16_tflops}[dtype]


def load_hardware(name: str) -> Hardware:
    """Read the description of a GPU; ConfigError if there is none, or it is not valid.

    `name` is that of a file in `configs/hardware` without `.yaml`, a beginning that only one has,
    such as h100, or the path of a YAML file.
    """
    is_path, known = name.endswith((".yaml", ".yml")), known_hardware()
    near = [name] if name in known else [each for each in known if each.startswith(name.lower())]
    path = Path(name) if is_path or len(near) != 1 else HARDWARE_FOLDER / f"{near[0]}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(known)) or "none is installed"
        raise ConfigError(
            f"hardware ({name}) must be a known name ({names}) or a YAML file; use one of them"
        )
    return _validated(read_mapping(path), str(path))


def _validated(content: Mapping[str, Any], source: str) -> Hardware:
    try:
        return Hardware.model_validate(content)
    except ValidationError as error:
        key, reason = first_misfit(error)
        raise ConfigError(
            f"{source}: {key or 'the file'}: {reason}; see the fields of config/hardware.py"
        ) from None


def with_changes(hardware: Hardware, changes: Mapping[str, Any], source: str) -> Hardware:
    """Return a copy with fields changed; ConfigError for an unknown field or an invalid value."""
    return _validated({**hardware.model_dump(exclude_unset=True), **changes}, source)


def known_hardware() -> list[str]:
    """Names of the descriptions that come with the source tree."""
    return [path.stem for path in HARDWARE_FOLDER.glob("*.yaml")]


def find_hardware(device_name: str) -> Hardware | None:
    """The description of the GPU that NVML calls `device_name`, or None."""
    for name in known_hardware():
        hardware = load_hardware(name)
        if device_name in hardware.device_names:
            return hardware
    return None
