"""Sets the environment variables with which every rank is started, with or without a GPU.

`moepp train --nproc`, `launch/*.sh` and `slurm/*.sbatch` all start ranks through
`runtime.launch.run_ranks`, which uses this module. A rank that was started otherwise (by itself, by
the user's own torchrun or srun) adopts those that still matter before it imports torch. What
depends on the configuration, every rank of a training run sets for itself. Variables that the user
has set are not changed.
"""

import functools
import os
import re
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.runtime.rank import RankEnvironment

_THREADS = "OMP_NUM_THREADS"
# What scripts name below /tmp.
_LOGS = re.compile(r"moepp-logs-\d+")
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@dataclass(frozen=True)
class _Variable:
    """One environment variable, and its value unless the user has set it.

    Attributes:
        aliases: Other names for the same thing; one that is set counts as this one.
        only_at_start: True if it means nothing to a Python process that runs already, or to one
            without a launcher of its own.
    """

    name: str
    value: str
    aliases: tuple[str, ...] = ()
    only_at_start: bool = False


def _rank_variables(num_local_ranks: int, interface: str | None = None) -> list[_Variable]:
    """List the variables of ranks; `interface` leads to other machines, if there are any."""
    cores, at_start = len(os.sched_getaffinity(0)), functools.partial(_Variable, only_at_start=True)
    variables = [
        # One thread a core in all; torchrun would choose 1 whatever the machine has.
        # `runtime.distributed.start` sets the threads of a rank that has no such variable.
        at_start(_THREADS, str(max(1, cores // num_local_ranks))),
        # Token counts of experts change every step; fixed segments fragment memory.
        _Variable(
            "PYTORCH_ALLOC_CONF",
            "expandable_segments:True",
            ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
        ),
        # NCCL would register the buffers of collectives in CUDA graphs, and expandable segments
        # have no single allocation to register; megatron-core refuses the pair.
        _Variable("NCCL_GRAPH_REGISTER", "0"),
        # A failing collective says why; INFO would fill the logs.
        _Variable("NCCL_DEBUG", "WARN"),
        # An InfiniBand link that flaps for seconds does not end the run (4.1 us * 2^22 = 17 s).
        _Variable("NCCL_IB_TIMEOUT", "22"),
        # `python -m` would import from the working directory first, such as a random.py there.
        at_start("PYTHONSAFEPATH", "1"),
        # The last lines of a killed rank are in its log.
        at_start("PYTHONUNBUFFERED", "1"),
        # torchrun ends ranks only after one has died; the others would wait for it.
        at_start("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10"),
        # On the node: in the home folder all nodes would wait for one file system.
        *_cache("TRITON_CACHE_DIR", "triton", "TRITON_HOME"),
        *_cache("TORCH_EXTENSIONS_DIR", "extensions"),
        # megatron-core has torch.compile fuse its activations, for a minute of the first steps.
        *_cache("TORCHINDUCTOR_CACHE_DIR", "inductor"),
    ]
    if interface is not None:
        # gloo looks up the host's name, which many machines map to a loopback address.
        variables.append(_Variable("GLOO_SOCKET_IFNAME", interface))
    return variables


def _cache(name: str, folder: str, *aliases: str) -> list[_Variable]:
    """The variable of a cache of compiled code; none where there is no safe folder for it."""
    path = _own_folder(folder)
    return [] if path is None else [_Variable(name, path, aliases)]


def _connections(config: Config) -> tuple[str, str]:
    """CUDA_DEVICE_MAX_CONNECTIONS, the number of hardware queues, for a configuration; and why.

    With one, kernels start in the order of their launch. megatron-core's tensor parallelism relies
    on it to begin a collective before the matrix product that hides it
    (core/tensor_parallel/layers.py); Megatron-LM's loop demands it of tensor and context
    parallelism on GPUs before Blackwell, unless the experts' exchange is overlapped, which one
    queue would serialize (training/arguments.py).
    """
    parallel = config.parallel
    splits_layers = parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1
    if splits_layers and not parallel.overlap_moe_expert_parallel_comm:
        return (
            "1",
            "tensor and context parallelism begin a collective before the matrix product that "
            "hides it, which one queue guarantees",
        )
    if config.moe.dispatcher == "flex":
        return "32", "the flex dispatcher's kernels must not queue behind others"
    return "8", "collectives run with kernels that are launched before them; this is CUDA's default"


def contradiction(config: Config, environment: Mapping[str, str]) -> str | None:
    """A warning where the user's number of hardware queues is not what the run needs."""
    (wanted, reason), given = _connections(config), environment.get(_CONNECTIONS)
    # More queues than are needed do no harm.
    is_enough = given and given.isdecimal() and int(given) >= int(wanted) > 1
    if given in (None, wanted) or is_enough:
        return None
    return (
        f"{_CONNECTIONS} ({given}) should be {wanted} in this layout: {reason}; unset "
        "it, and moepp train sets it"
    )


def _own_folder(name: str) -> str | None:
    """A folder that only this user can write, from which code can be loaded; None without one."""
    path = os.path.join(tempfile.gettempdir(), f"moepp-{name}-{os.getuid()}")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        # Code is loaded from it.
        return path if _is_own(path) and not os.statvfs(path).f_flag & os.ST_NOEXEC else None
    except OSError:
        return None


def _is_own(path: str | Path) -> bool:
    """True if it is a folder, not a link, that only this user can write."""
    status = os.lstat(path)
    is_mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return is_mine and not status.st_mode & 0o022


def make_log_dir(folder: Path) -> None:
    """Make the folder of ranks' output, in `moepp-logs-UID` only where that is this user's.

    ConfigError if it cannot be made, or somebody else has taken that name.
    """
    try:
        for each in (*reversed(folder.absolute().parents), folder.absolute()):
            is_named = _LOGS.fullmatch(each.name) is not None
            each.mkdir(mode=0o700 if is_named else 0o777, exist_ok=True)
            if is_named and not each.is_symlink() and each.stat().st_uid == os.getuid():
                # Made by an older version, as the umask has it.
                each.chmod(0o700)
            if is_named and not _is_own(each):
                # Links that another user plants there would have ranks write to any file of mine.
                raise ConfigError(
                    f"--log-dir ({folder}) must be where nobody else can write, and {each} is not; "
                    "remove it, or choose another folder (in scripts MOEPP_LOG_DIR)"
                )
    except OSError as error:
        raise ConfigError(
            f"--log-dir ({folder}) must be a folder that can be written ({error.strerror}); choose "
            "another one"
        ) from None


def with_rank_variables(
    environment: Mapping[str, str], num_local_ranks: int, interface: str | None = None
) -> dict[str, str]:
    """A copy of `environment` with the variables that it lacks."""
    # OpenMP takes an empty number of threads for none.
    result = {name: text for name, text in environment.items() if text or name != _THREADS}
    for variable in _rank_variables(num_local_ranks, interface):
        _set_default(result, variable)
    return result


def check_rank_variables(environment: Mapping[str, str]) -> None:
    """Refuse (ConfigError) variables of the user's at which ranks would fail later."""
    threads, here = environment.get(_THREADS) or "1", psutil.net_if_addrs()
    # OpenMP takes one number for each level of nested threads.
    if not all(part.strip().isdecimal() and int(part) > 0 for part in threads.split(",")):
        raise ConfigError(
            f"{_THREADS} ({threads!r}) in the environment must be a whole number above 0; unset "
            "it, and the cores are shared out among the ranks"
        )
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        given = environment.get(name, "")
        # NCCL takes beginnings of names, exact names after =, what it must not use after ^.
        entries = [entry.partition(":")[0] for entry in given.removeprefix("=").split(",")]
        found = [entry for entry in entries if any(each.startswith(entry) for each in here)]
        if found != entries and not given.startswith("^"):
            raise ConfigError(
                f"{name} ({given!r}) in the environment must name network interfaces that are here "
                f"({', '.join(here)}); name one of them, or unset it"
            )


def set_rank_variables(config: Config, interface: str | None = None) -> None:
    """Give this rank of a training run its variables; call it before torch is imported.

    CUDA, torch's allocator and NCCL read their variables once, when they start.
    """
    check_rank_variables(os.environ)
    os.environ.setdefault(_CONNECTIONS, _connections(config)[0])
    if config.moe.cutlass_grouped_gemm:
        # Read before each product (Transformer Engine, common/gemm/cublaslt_gemm.cu).
        os.environ.setdefault("NVTE_USE_CUTLASS_GROUPED_GEMM", "1")
    if config.megatron.fine_grained_activation_offloading:
        # Read on import; otherwise weights would go to the host too (arguments.py demands it).
        os.environ.setdefault("NVTE_CPU_OFFLOAD_V1", "1")
    for variable in _rank_variables(1, interface):
        if not variable.only_at_start:
            _set_default(os.environ, variable)


def prepare_rank(config: Config) -> RankEnvironment:
    """This process's place as a rank that computes with a model, with the variables of a rank.

    Call it before torch is imported, with the configuration in the layout of the ranks. A process
    that nobody has launched keeps its environment, which its caller may need.
    """
    rank = RankEnvironment.read()
    if rank.is_launched:
        set_rank_variables(config)
    return rank


def _set_default(environment: MutableMapping[str, str], variable: _Variable) -> None:
    if not any(alias in environment for alias in variable.aliases):
        environment.setdefault(variable.name, variable.value)
