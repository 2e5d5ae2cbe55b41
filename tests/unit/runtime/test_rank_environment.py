"""The environment of started ranks, and how they learn their place."""

import dataclasses
import os
import re
import socket
import tempfile
from types import SimpleNamespace

import psutil
import pytest

from moepp_megatron.config import UnfitError, parse_config, with_overrides
from moepp_megatron.runtime import distributed, launch, nodes
from moepp_megatron.runtime.launch import LaunchOptions, _torchrun, run_ranks
from moepp_megatron.runtime.nodes import Nodes, interface_of_rank, parse_endpoint
from moepp_megatron.runtime.rank import RankEnvironment, _first_host
from moepp_megatron.runtime.rank_environment import (
    _rank_variables,
    check_rank_variables,
    contradiction,
    set_rank_variables,
    with_rank_variables,
)
from tests.parallel.training_runs import TP2, settings
from tests.refusals import config_error


def test_nothing_that_the_user_has_set_is_changed():
    names = [variable.name for variable in _rank_variables(2, "eth0")]
    assert len(set(names)) == len(names)
    user = dict.fromkeys(names, "the user's")
    assert with_rank_variables(user, 2, "eth0") == user
    assert with_rank_variables({}, 2, "eth0").keys() >= set(names)
    assert "GLOO_SOCKET_IFNAME" not in with_rank_variables({}, 2)


def test_an_older_name_of_a_variable_counts():
    user = {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    assert "PYTORCH_ALLOC_CONF" not in with_rank_variables(user, 1)


@pytest.mark.parametrize("flags", [0, os.ST_NOEXEC])
def test_caches_are_where_compiled_code_can_be_loaded(monkeypatch, tmp_path, flags):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))
    found = with_rank_variables({}, 1).keys()
    assert ({"TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"} <= found) == (not flags)


@pytest.mark.parametrize("taken", ["", "as before", "by another user", "by a link"])
def test_logs_are_where_nobody_else_can_write(monkeypatch, tmp_path, taken):
    folder = tmp_path / "moepp-logs-7"
    monkeypatch.setattr(launch, "_run", lambda *arguments: 0)
    if taken == "by a link":
        folder.symlink_to(tmp_path)
    elif taken:
        folder.mkdir()
        folder.chmod(0o777)
    if taken == "by another user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    options = LaunchOptions(1, log_dir=folder / "job")
    if taken.startswith("by"):
        with config_error(r"must be where nobody else can write.*MOEPP_LOG_DIR"):
            run_ranks(options, "this", [])
        assert not (folder / "job").exists()
    else:
        run_ranks(options, "this", [])
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("GLOO_SOCKET_IFNAME", "eth77", "must name network interfaces that are here ("),
        ("GLOO_SOCKET_IFNAME", "lo,eth77", "name one of them, or unset it"),
        ("NCCL_SOCKET_IFNAME", "=eth77", "('=eth77') in the environment must name"),
        ("OMP_NUM_THREADS", "many", "('many') in the environment must be a whole number"),
        ("OMP_NUM_THREADS", "0", "unset it, and the cores are shared out"),
    ],
)
def test_variables_at_which_ranks_would_fail(monkeypatch, name, given, says):
    """By a launcher before ranks start, by a rank without one before it imports torch."""
    monkeypatch.setattr(os, "environ", {name: given})
    for start in (
        lambda: run_ranks(LaunchOptions(2), "this", []),
        lambda: set_rank_variables(layout()),
    ):
        with config_error(re.escape(says)):
            start()


def adopt(monkeypatch, given, config, interface=None):
    """The environment of a rank without a launcher that starts with `given`."""
    monkeypatch.setattr(os, "environ", dict(given))
    set_rank_variables(config, interface)
    return os.environ


@pytest.mark.parametrize("given", ["lo", "=lo", "^docker,eth77", "l", "lo:80", ""])
def test_interfaces_as_nccl_takes_them(given):
    check_rank_variables({"NCCL_SOCKET_IFNAME": given, "OMP_NUM_THREADS": "4,2"})


def test_cores_are_shared_out():
    cores = len(os.sched_getaffinity(0))
    for given in ({}, {"OMP_NUM_THREADS": ""}):
        check_rank_variables(given)
        assert with_rank_variables(given, 1)["OMP_NUM_THREADS"] == str(cores)
    assert with_rank_variables({}, 10 * cores)["OMP_NUM_THREADS"] == "1"


def test_a_rank_without_launcher_adopts_what_still_matters(monkeypatch):
    given = {"NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "x"}
    adopted = adopt(monkeypatch, given, layout())
    launched = with_rank_variables(adopted, 1)
    late = {"OMP_NUM_THREADS", "PYTHONSAFEPATH", "PYTHONUNBUFFERED"}
    assert launched.keys() - adopted.keys() == late | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    assert adopted.items() <= launched.items()
    assert adopted["NCCL_DEBUG"] == "INFO"
    assert adopted["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_a_rank_without_launcher_finds_its_interface(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    alone = RankEnvironment(world_size=2, local_world_size=2, meets_at=("127.0.0.1", 80, True))
    spread = dataclasses.replace(alone, world_size=4)
    nowhere = dataclasses.replace(spread, meets_at=None)
    assert interface_of_rank(alone) is None
    assert interface_of_rank(nowhere) is None
    loopback = interface_of_rank(spread)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert interface_of_rank(nowhere) == loopback
    assert adopt(monkeypatch, {}, layout(), loopback)["GLOO_SOCKET_IFNAME"] == loopback


CP, EP = {"context_parallel_size": 2}, {"expert_model_parallel_size": 2}
OVERLAPPED = EP | {"overlap_moe_expert_parallel_comm": True}
FLEX = {"dispatcher": "flex"}


def layout(parallel=None, moe=None):
    sizes = {"hidden_size": 512, "seq_length": 64}  # what flex and context parallelism can divide
    return parse_config(
        settings(parallel=parallel or {}, moe=moe or {}, model=sizes, precision={"dtype": "bf16"})
    )


@pytest.mark.parametrize(
    ("parallel", "moe", "value"),
    [
        ({}, {}, 8),
        (EP, {}, 8),
        (TP2, {}, 1),
        (CP, {}, 1),
        (TP2 | OVERLAPPED, {}, 8),
        (EP, FLEX, 32),
        # Megatron-LM's loop refuses another value than 1 here, whatever the dispatcher.
        (TP2 | EP, FLEX, 1),
        (CP | OVERLAPPED, FLEX, 32),
    ],
)
def test_hardware_queues_follow_from_the_layout(monkeypatch, parallel, moe, value):
    config = layout(parallel, moe)
    # The launcher knows no configuration, and a value of its own would count as the user's.
    launched = with_rank_variables({}, 2)
    assert contradiction(config, launched) is None
    adopted = adopt(monkeypatch, launched, config)
    assert adopted["CUDA_DEVICE_MAX_CONNECTIONS"] == str(value)
    assert contradiction(config, adopted) is None


@pytest.mark.parametrize("given", [{}, {"NVTE_USE_CUTLASS_GROUPED_GEMM": "0"}], ids=str)
def test_the_grouped_product_is_that_of_the_setting(monkeypatch, given):
    name = "NVTE_USE_CUTLASS_GROUPED_GEMM"
    for wanted in (False, True):
        adopted = adopt(monkeypatch, given, layout(moe={"cutlass_grouped_gemm": wanted}))
        assert adopted.get(name) == given.get(name, "1" if wanted else None)


@pytest.mark.parametrize(("value", "expected"), [("true", "1"), ("false", None)])
def test_offloading_keeps_weights_on_the_device(monkeypatch, value, expected):
    offloading = f"megatron.fine_grained_activation_offloading={value}"
    config = with_overrides(layout(), [offloading, "megatron.offload_modules=[core_attn]"])
    assert adopt(monkeypatch, {}, config).get("NVTE_CPU_OFFLOAD_V1") == expected


@pytest.mark.parametrize(
    ("parallel", "moe", "given", "wanted"),
    [
        (TP2, {}, "8", "1"),
        ({}, {}, "1", "8"),
        ({}, {}, "32", None),
        (EP, FLEX, "8", "32"),
        (TP2 | OVERLAPPED, {}, "1", "8"),
        ({}, {}, "many", "8"),
    ],
)
def test_a_number_of_queues_against_the_layout_is_told_and_kept(
    monkeypatch, parallel, moe, given, wanted
):
    config, environment = layout(parallel, moe), {"CUDA_DEVICE_MAX_CONNECTIONS": given}
    warning = contradiction(config, environment)
    adopted = adopt(monkeypatch, environment, config)
    assert adopted["CUDA_DEVICE_MAX_CONNECTIONS"] == given
    if wanted is None:
        assert warning is None
    else:
        assert f"CUDA_DEVICE_MAX_CONNECTIONS ({given}) should be {wanted} in" in warning


@pytest.mark.parametrize("words", [["bench", "--max", "4K"], ["train", "--", "c.yaml", "a=b"]])
def test_torchrun_hands_on_what_is_not_its_own(words):
    """Of `--max` older versions of argparse made a shortened `--max-restarts`."""
    from torch.distributed.run import config_from_args, get_args_parser

    command = _torchrun(LaunchOptions(2), "a.module", words)
    module = command.index("--module")
    assert command[module : module + 3] == ["--module", "a.module", "--"]
    parsed = get_args_parser().parse_args(command[3:])
    assert (parsed.module, parsed.training_script) == (True, "a.module")
    assert parsed.training_script_args == words
    # A machine without a network may not know its name: ranks would look for half an hour.
    assert config_from_args(parsed)[0].local_addr == "127.0.0.1"


def place(monkeypatch, **environment):
    monkeypatch.setattr(os, "environ", environment)
    return RankEnvironment.read()


TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "1234",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_JOB_ID": "12005",
}


# One who keeps the number that its machine was given: the store stays with torchrun's rank 0, whose
# machine's address torchrun handed out.
KEPT = {**TORCHRUN, "MOEPP_NODE_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"}
SCRIPT = {"RANK": "9", "WORLD_SIZE": "12", "MASTER_ADDR": "x", "MASTER_PORT": "7"}
ONE_MACHINE = {"SLURM_STEP_TASKS_PER_NODE": "12", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("environment", "numbers", "meets_at"),
    [
        (TORCHRUN, (9, 16, 1, 8), None),
        ({**KEPT, "RANK": "0"}, (9, 16, 1, 8), ("host", 1234, True)),
        (KEPT, (9, 16, 1, 8), ("host", 1234, False)),
        (SRUN, (9, 12, 1, 2), ("gpu07", 20005, False)),
        (SRUN | {"MASTER_PORT": ""}, (9, 12, 1, 2), ("gpu07", 20005, False)),
        (SRUN | {"MASTER_ADDR": "x", "MASTER_PORT": "7"}, (9, 12, 1, 2), ("x", 7, False)),
        (SRUN | {"SLURM_PROCID": "0"}, (0, 12, 1, 2), ("gpu07", 20005, True)),
        (SRUN | ONE_MACHINE, (9, 12, 1, 12), ("127.0.0.1", 20005, False)),
        # srun says which ranks share a machine where a script does not.
        (SRUN | SCRIPT, (9, 12, 1, 2), None),
        (SRUN | SCRIPT | {"LOCAL_RANK": "1"}, (9, 12, 1, 2), None),
        # A shell in an allocation is no rank.
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0, 1), None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0, 1), None),
        ({}, (0, 1, 0, 1), None),
    ],
)
def test_place_of_a_rank(monkeypatch, environment, numbers, meets_at):
    rank = place(monkeypatch, **environment)
    assert (rank.rank, rank.world_size, rank.local_rank, rank.local_world_size) == numbers
    assert rank.meets_at == meets_at
    assert rank.is_launched == (numbers != (0, 1, 0, 1))
    assert rank.restart_count == int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))


@pytest.mark.parametrize("more", [{}, {"LOCAL_RANK": "1"}])
def test_ranks_without_a_place_on_their_machine_are_refused(monkeypatch, more):
    with config_error(r"WORLD_SIZE \(16\) must come with LOCAL_RANK"):
        place(monkeypatch, RANK="9", WORLD_SIZE="16", **more)
    assert place(monkeypatch, RANK="0", WORLD_SIZE="1", **more).local_world_size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("a,b", "a"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("rack[3,5]-ib,b", "rack3-ib"),
        ("n[1-2]", "n1"),
    ],
)
def test_first_host(nodes, first):
    assert _first_host(nodes) == first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1", ("node1", 29500)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[fd00::2]:80", ("fd00::2", 80)),
        ("[fd00::2]", ("fd00::2", 29500)),
    ],
)
def test_endpoint(text, expected):
    assert parse_endpoint(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":80", "a:", "a:b", "a:0", "a:65536", "a:1:2", "[a]b", "[]:1"]
)
def test_wrong_endpoint(text):
    with pytest.raises(ValueError, match="must be HOST or HOST:PORT"):
        parse_endpoint(text)


def test_address_and_interface_are_those_of_the_route():
    machines = Nodes(2, 0, "127.0.0.1")
    assert machines.local_address() == "127.0.0.1"
    addresses = psutil.net_if_addrs()[machines.interface()]
    assert (socket.AF_INET, "127.0.0.1") in {(each.family, each.address) for each in addresses}


ELSEWHERE = {"192.0.2.1": "10.0.0.7"}


@pytest.mark.parametrize(
    ("host", "towards_host", "elsewhere", "expected"),
    [
        # The first machine by its own name, as Debian has it.
        ("node1", "127.0.1.1", ELSEWHERE, "10.0.0.7"),
        ("node1", "10.0.0.8", ELSEWHERE, "10.0.0.8"),
        ("localhost", "127.0.0.1", ELSEWHERE, "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", ELSEWHERE, "127.0.0.1"),
        ("::1", "::1", ELSEWHERE, "::1"),
        # Only IPv6, and no other machine.
        ("node1", "::1", {"2001:db8::1": "fd00::7"}, "fd00::7"),
        ("node1", "127.0.1.1", {}, "127.0.1.1"),
    ],
)
def test_own_name_does_not_lead_back_here(monkeypatch, host, towards_host, elsewhere, expected):
    addresses = {host: towards_host, **elsewhere}

    def towards(host, port):
        if host not in addresses:
            raise OSError("Network is unreachable")
        return addresses[host]

    monkeypatch.setattr(nodes, "_address_towards", towards)
    assert Nodes(2, 0, host).local_address() == expected


def test_torchrun_is_told_who_hosts_the_meeting():
    first, second = (
        Nodes(2, rank, "127.0.0.1", 80, "job", 60).torchrun_options() for rank in range(2)
    )
    assert "--rdzv-conf=join_timeout=180,timeout=60,is_host=1" in first
    assert "--rdzv-conf=join_timeout=180,timeout=60,is_host=0" in second
    assert "--rdzv-endpoint=127.0.0.1:80" in first
    assert "is_host" not in str(Nodes(2, None, "127.0.0.1").torchrun_options())


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"MASTER_PORT": "auto"}, r"MASTER_PORT \('auto'\) in the environment must be a whole"),
        ({"MASTER_PORT": "99999"}, r"MASTER_PORT \(99999\) must be a port"),
        ({"RANK": "", "WORLD_SIZE": ""}, r"RANK \(''\) in the environment must be a whole"),
    ],
)
def test_variables_that_are_no_numbers(monkeypatch, variables, says):
    with config_error(says):
        place(monkeypatch, **SRUN, **variables)


def test_nproc_of_ranks_that_srun_has_started(monkeypatch):
    rank = place(monkeypatch, **SRUN)
    for nproc in (1, rank.local_world_size):
        rank.check_nproc(nproc)
    with config_error(r"--nproc \(3\) must not be given to ranks"):
        rank.check_nproc(3)
    RankEnvironment().check_nproc(3)


def test_first_machine_without_an_address_is_named_at_once():
    rank = RankEnvironment(world_size=2, meets_at=("gpu07.invalid", 20000, False))
    with pytest.raises(UnfitError, match=r"first machine \(gpu07.invalid\) must have an address"):
        distributed.start(rank)
