"""`moepp train` up to the start of ranks: what it refuses, claims, passes on and says."""

import contextlib
import errno
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from moepp_megatron.cli import main, run_end
from moepp_megatron.cli.run_end import resume_command
from moepp_megatron.config import ConfigError, Layout, UnfitError, load_config, with_overrides
from moepp_megatron.config.exit_codes import STOPPED
from moepp_megatron.data import prepared_data
from moepp_megatron.observe.status import RunStatus
from moepp_megatron.runtime import agent, launch
from moepp_megatron.runtime.launch import LaunchOptions
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.training.checkpoint.find import NoStartError
from moepp_megatron.training.run import TrainResult, _run_rank
from moepp_megatron.training.run_folder import Start
from moepp_megatron.training.train_request import RESOLVED, TrainRequest
from tests.commands import captured
from tests.unit.cli.test_dry_run import MINIMAL

OF_OTHERS = (
    "RANK",
    "WORLD_SIZE",
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "MOEPP_RESUME_COMMAND",
    "MOEPP_CLAIM",
)


class Command:
    """`moepp train` in this process, with ranks that only look at what they are given."""

    def __init__(self, folder, monkeypatch):
        self.config, self.run_dir = folder / "c.yaml", folder / "my runs/run"
        self.config.write_text(MINIMAL)
        self.starts = []
        self.claims = []
        self.status = 0
        self.raises = None
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(launch, "run_ranks", self._ranks)
        monkeypatch.setattr(agent, "LINGER_S", 0.0)
        monkeypatch.setattr(prepared_data, "check_data", lambda config, whole_index: [])
        for name in OF_OTHERS:
            monkeypatch.delenv(name, raising=False)
        # Whatever the command sets is gone after the test.
        monkeypatch.setattr(os, "environ", dict(os.environ))

    def _ranks(self, options, module, arguments):
        self.starts.append(list(arguments))
        self.alike = options.alike
        # What a rank reads, and a run that it starts.
        file, *overrides = arguments[arguments.index("--") + 1 :]
        self.config.write_text(MINIMAL.replace("lr: 1e-3", "lr: 5e-4"))
        asked = (Path(file), overrides, LaunchOptions(2), Start(), lambda text: None)
        self.read = [TrainRequest.read(*asked).config for _ in range(2)]
        self.claims.append(RunStatus.inherited())
        if self.raises is not None:
            raise self.raises
        return self.status

    def __call__(self, *options):
        words = [str(self.config), f"run.dir={self.run_dir}", "--nproc", "2", *options]
        self._monkeypatch.setattr(sys, "argv", ["/venv/bin/moepp", "train", *words])
        with pytest.raises(SystemExit) as ended:
            main.run()
        return int(ended.value.code or 0)

    def make_run(self):
        self.run_dir.mkdir(parents=True)
        (self.run_dir / "metrics.jsonl").write_text("records\n")

    def resume_command(self, *options):
        words = ["/venv/bin/moepp", "train", str(self.config), f"run.dir={self.run_dir}"]
        return shlex.join([*words, "--nproc", "2", *options, "--resume"])


@pytest.fixture
def command(tmp_path, monkeypatch):
    return Command(tmp_path, monkeypatch)


def test_an_occupied_folder_is_refused_before_ranks_start(command, capsys):
    command.make_run()
    assert command() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--resume" in error
    assert "--overwrite" in error
    assert command("--resume", "--overwrite") == 2
    assert command.starts == []
    assert (command.run_dir / "metrics.jsonl").read_text() == "records\n"


def test_a_folder_that_cannot_be_written_is_refused_before_ranks_start(command, capsys):
    command.run_dir.parent.write_text("a file")
    assert command() == 2
    assert capsys.readouterr().err == (
        f"error: run.dir ({command.run_dir}) must be a folder that can be written "
        "(Not a directory); make it writable, or choose another run.dir\n"
    )
    assert command.starts == []


def test_the_launcher_claims_the_folder_while_ranks_run(command):
    assert command("--max-restarts", "2") == 0
    (claim,) = command.claims
    assert claim.pid == os.getpid()
    assert claim.resume_command == command.resume_command("--max-restarts", "2")
    assert command.starts == [["train", "--", str(command.config), f"run.dir={command.run_dir}"]]
    assert RunStatus.inherited() is None
    assert not command.run_dir.exists(), "no rank has written anything"


def test_ranks_take_what_the_launcher_has_resolved(command):
    assert command("moe.tau=0.5") == 0
    read = [(each.optimizer.lr, each.moe.tau) for each in command.read]
    assert read == [(1e-3, 0.5), (5e-4, 0.5)], "the file was edited when ranks started"
    assert RESOLVED not in os.environ


def test_a_number_of_hardware_queues_against_the_layout_is_reported_once(command, capsys):
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    assert command() == 0
    assert capsys.readouterr().err.count("warning: CUDA_DEVICE_MAX_CONNECTIONS (1) should") == 1


def test_overwrite_moves_the_old_run_and_is_the_launchers_business(command, capsys):
    command.make_run()
    assert command("--overwrite") == 0
    assert "--overwrite" not in command.starts[0]
    (aside,) = (path for path in command.run_dir.parent.iterdir() if path != command.run_dir)
    assert capsys.readouterr().out == f"moved the run of before to {aside}\n"
    assert (aside / "metrics.jsonl").read_text() == "records\n"
    assert "--overwrite" not in command.claims[0].resume_command


def test_a_run_that_does_not_fit_the_gpu_is_refused_before_it_starts(command, capsys, monkeypatch):
    from moepp_megatron.cli import memory_fit
    from moepp_megatron.runtime.nvml import Nvml
    from tests.unit.tools.doctor.fake_nvml import FakeNvml, answers

    large = ["model.hidden_size=8192", "model.num_attention_heads=64", "model.num_layers=48"]
    assert command(*large) == 0, "no GPU to fit"
    monkeypatch.setattr(memory_fit, "Nvml", lambda: Nvml(FakeNvml(answers())))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert command(*large) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: the fullest rank is estimated to need ")
    assert "and must fit h100_sxm (" in error
    assert len(command.starts) == 1
    assert command() == 0, "a small one fits"
    assert command(*large, "--ignore-memory") == 0
    assert command.claims[-1].resume_command.count("--ignore-memory") == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert command(*large) == 0, "it runs on CPUs"


def test_a_configuration_that_continues_by_itself_is_let_in(command, capsys):
    command.make_run()
    assert command("checkpoint.load=auto") == 0
    # Only its weights, from step 0, would write over its records.
    assert command("checkpoint.load=auto", "checkpoint.load_optimizer=false") == 2
    assert command("checkpoint.load=auto", "--overwrite") == 0
    assert "moved the run" in capsys.readouterr().out


def test_the_last_line_of_a_stopped_run_is_the_command(command, capsys):
    command.status = STOPPED
    assert command() == STOPPED
    assert capsys.readouterr().out == f"to resume:\n{command.resume_command()}\n"
    # Each machine has its own; a batch script's is said once.
    assert command(*NODES, "--node-rank", "1") == STOPPED
    assert "--node-rank 1" in capsys.readouterr().out
    os.environ["MOEPP_RESUME_COMMAND"] = "sbatch job.sh"
    assert command(*NODES, "--node-rank", "1") == STOPPED
    assert capsys.readouterr().out == ""
    assert command(*NODES, "--node-rank", "0") == STOPPED
    assert capsys.readouterr().out == "to resume:\nsbatch job.sh\n"


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "under a launcher"])
@pytest.mark.parametrize("pause_reason", [None, "paused before new data"])
def test_a_process_that_trains_alone_says_it_itself(
    tmp_path, alone, pause_reason, monkeypatch, capsys
):
    claim = RunStatus.own(resume_command="moepp train c --resume")
    if alone:
        # It has given the folder up by now.
        monkeypatch.delenv("MOEPP_CLAIM", raising=False)
    else:
        claim = claim.model_copy(update={"pid": claim.pid + 1})
        monkeypatch.setenv("MOEPP_CLAIM", claim.model_dump_json())
    request = SimpleNamespace(
        rank=SimpleNamespace(rank=0),
        starts_ranks=False,
        start=SimpleNamespace(resume_command="moepp train c --resume"),
    )
    result = TrainResult(tmp_path, step=7, stopped=True, pause_reason=pause_reason)
    with pytest.raises(SystemExit):
        run_end.print_end(request, result, prints_command=False)
    said = f"{pause_reason or 'stopped on request'} at step 7, saved\n"
    said += "to resume:\nmoepp train c --resume\n" if alone else ""
    assert capsys.readouterr().out == said


def test_what_a_run_says_at_its_start_is_printed(tmp_path, monkeypatch, capsys):
    """It prints where it resumes and what differs, before the first step."""

    def train():
        print("trains")

    trainer = SimpleNamespace(
        start_lines=["resumed from step 6 of x", "  model.seq_length: 64; before: 32"],
        run=train,
        failure=None,
        stopped=False,
        pause_reason=None,
        progress=SimpleNamespace(step=6),
    )
    bound = []
    for name, stand_in in {
        "optional.quiet": lambda: None,
        "distributed.initialized": lambda *args: contextlib.nullcontext("its GPU"),
        "distributed.bind_to_gpu": bound.append,
        "distributed.build_groups": lambda *args: None,
        "backends.package_lines": lambda config: [],
    }.items():
        monkeypatch.setattr(f"moepp_megatron.runtime.{name}", stand_in)
    monkeypatch.setattr("moepp_megatron.training.trainer.Trainer", lambda *args: trainer)
    (tmp_path / "c.yaml").write_text(MINIMAL)
    config = load_config(tmp_path / "c.yaml", ["resilience.hang_timeout_s=0"])
    request = SimpleNamespace(
        loads=None,
        start=Start(),
        config=config,
        layout=Layout.from_config(config, 1),
        rank=RankEnvironment(),
    )
    _run_rank(request, print, ())
    assert capsys.readouterr().out.splitlines()[:3] == [*trainer.start_lines, "trains"]
    assert bound == ["its GPU"]
    request.config = with_overrides(config, ["run.numa_binding=false"])
    _run_rank(request, print, ())
    assert len(bound) == 1


def test_resume_is_passed_on(command):
    command.make_run()
    assert command("--resume") == 0
    assert command.starts[0][:3] == ["train", "--resume", "--"]
    # Its config.yaml, which others start from, does not resume by itself.
    assert command.read[0].checkpoint.load is None
    assert command.claims[0].resume_command == command.resume_command()


@pytest.mark.parametrize("began", [True, False], ids=["trained", "never trained"])
def test_a_requeued_job_continues_with_what_it_began_with(command, began, capsys):
    command.make_run()
    job = {"job": "17", "is_configured": began}
    RunStatus.own().model_copy(update=job).write(command.run_dir)
    first = load_config(command.config, [f"run.dir={command.run_dir}", "moe.tau=0.5"])
    (command.run_dir / "config.yaml").write_text(first.to_yaml())
    os.environ |= {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}
    assert command("--resume") == 0
    assert command.read[0].moe.tau == (0.5 if began else 0.75)
    changed = f"warning: {command.config} has changed since this run began: moe.tau; it continues"
    assert (changed in capsys.readouterr().err) == began
    assert command.claims[0].is_configured == began


NODES = ("--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:29400", "--rdzv-id", "seven")


@pytest.mark.parametrize("node", ["0", "1", None])
def test_of_several_machines_the_first_decides(command, node, capsys):
    options = (*NODES, "--node-rank", node) if node is not None else NODES
    command.make_run()
    assert command(*options) == 2
    assert command.starts == []
    assert command(*options, "--overwrite") == 0
    moved = "moved the run" in capsys.readouterr().out
    # Where nobody is known as the first, rank 0 is.
    assert moved == (node == "0")
    assert ("--overwrite" in command.starts[0]) == (node != "0")
    assert (command.claims[0] is not None) == (node == "0")


@pytest.mark.parametrize("options", [(), (*NODES, "--node-rank", "0")])
def test_a_full_disk_is_no_wrong_usage(command, options):
    command.raises = ConfigError("run.dir must be a folder that can be written")
    command.raises.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert command(*options) == UnfitError.exit_code


def test_what_machines_may_differ_in(command):
    assert command(*NODES, "--node-rank", "0", "checkpoint.staging=/local/of_this_one") == 0
    assert {"checkpoint.dir", "training.seed", "torch"} < set(command.alike)
    assert command.alike.keys().isdisjoint({"python", "checkpoint.staging"})


def test_the_reason_of_ranks_that_cannot_start_reaches_the_launcher(command, tmp_path):
    command.raises = NoStartError("no checkpoint")
    os.environ["MOEPP_STATUS_FILE"] = str(tmp_path / "status")
    assert command() == 0
    assert launch.refusal() == (ConfigError.exit_code, "no checkpoint")


def test_the_other_machines_find_the_claim_of_the_first(command):
    command.make_run()
    status = RunStatus.own(start="seven").model_copy(update={"host": "first"})
    status.write(command.run_dir)
    assert command(*NODES, "--node-rank", "1") == 0
    assert RunStatus.read(command.run_dir) == status
    assert command(*NODES[:-1], "eight", "--node-rank", "1") == 2


def test_ctrl_c_outside_of_training_prints_no_traceback(command, capsys):
    command.raises = KeyboardInterrupt()
    assert command() == 130
    assert capsys.readouterr().err == "interrupted before training or after its end\n"


def test_the_command_that_resumes(command, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/moepp"])
    words = ["it's.yaml", "run.name=a b"]
    plain = "/venv/bin/moepp train 'it'\"'\"'s.yaml' 'run.name=a b' --resume"
    assert resume_command(words) == plain
    assert shlex.split(plain)[2:4] == words
    # On the PATH it needs no folder.
    program = tmp_path / "moepp"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    os.environ["PATH"] = str(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert resume_command(["c"]) == "moepp train c --resume"
    # A script that has changed folder.
    os.environ["MOEPP_SHELL_FOLDER"] = "/"
    assert resume_command(["c"]) == f"cd {shlex.quote(os.getcwd())} && moepp train c --resume"
    os.environ["MOEPP_SHELL_FOLDER"] = os.getcwd()
    assert resume_command(["c"]) == "moepp train c --resume"
    # Ranks of srun, of torchrun, of a batch script.
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
    os.environ.update(step)
    assert resume_command(["c"]) == "srun --nodes=2 --ntasks=4 moepp train c --resume"
    # A machine's own command, which no other task of the step may run.
    assert resume_command(["c", "--node-rank", "1"]) == "moepp train c --node-rank 1 --resume"
    # The parent may be any program: what counts is the number of ranks.
    os.environ.update({"RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"})
    assert resume_command(["c", "run.name=a b"]) == (
        "moepp train c 'run.name=a b' --nproc 2 --resume"
    )
    os.environ.update({"GROUP_WORLD_SIZE": "3", "MASTER_ADDR": "node01"})
    assert resume_command(["c"]) == (
        "moepp train c --nproc 2 --nnodes 3 --rdzv-endpoint node01 --resume"
    )
    os.environ["MOEPP_RESUME_COMMAND"] = "sbatch job.sh"
    assert resume_command(["c"]) == "sbatch job.sh"


def test_a_page_that_cannot_be_made_ends_no_run(tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").write_text(MINIMAL)
    _, page = run_end._report(run)
    assert page.startswith("none (")
    assert page.endswith(f"; then: moepp report '{run}'")


@pytest.mark.skipif(
    find_spec("transformer_engine") is not None, reason="torch is asked whether it can be used"
)
def test_a_mistake_is_told_before_torch_is_imported(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(MINIMAL)
    code = (
        "import sys\n"
        "from moepp_megatron.cli.main import run\n"
        "try:\n"
        "    run()\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)\n"
    )
    words = ["train", str(config), f"run.dir={tmp_path / 'run'}", "data.path=no-such-folder"]
    ended = captured([sys.executable, "-c", code, *words], check=True)
    assert ended.stdout == "2 False\n"
    assert ended.stderr.startswith("error: data.path (no-such-folder) must be a prepared folder")
