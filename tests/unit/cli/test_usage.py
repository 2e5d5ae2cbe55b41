"""Help says everything that was written into it, and every error of usage has one form."""

import errno
import os
import shlex
import signal
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from moepp_megatron.cli import main, paths
from moepp_megatron.config import Layout, load_config
from tests import ROOT
from tests.commands import captured
from tests.full_disk import fill
from tests.unit.data.letters import prepare_letters
from tests.unit.tools.report.conftest import synthetic_config, synthetic_records, write_run

QUICKSTART = ROOT / "configs/quickstart.yaml"


def _commands():
    """Every command and what leads to it, `["bench", "layer"]`."""
    waiting = [([], typer.main.get_command(main.app))]
    while waiting:
        path, command = waiting.pop()
        yield path, command
        for name, inner in getattr(command, "commands", {}).items():
            waiting.append(([*path, name], inner))


COMMANDS = list(_commands())
OPTIONS = [
    (" ".join(["moepp", *path, parameter.opts[0]]), parameter)
    for path, command in COMMANDS
    for parameter in command.params
]


def _without_breaks(text):
    """Lines are wrapped between words, and at hyphens."""
    return "".join(text.split())


each_command = pytest.mark.parametrize(
    ("path", "command"), COMMANDS, ids=[" ".join(["moepp", *path]) for path, _ in COMMANDS]
)


@each_command
def test_help_shows_every_word_that_was_written(path, command):
    """Brackets too, as in `input_ids [b, s]`, and also where the terminal is narrow."""
    shown = CliRunner().invoke(main.app, [*path, "--help"], env={"COLUMNS": "60"})
    assert shown.exit_code == 0
    output = _without_breaks(shown.stdout)
    assert _without_breaks(command.help.split("\f")[0]) in output
    for parameter in command.params:
        text = getattr(parameter, "help", None)
        assert _without_breaks(text or "") in output, f"{parameter.name} of {path}"
    # Each example in one line.
    assert shown.stdout.rstrip().endswith(command.epilog.splitlines()[-1])


@each_command
def test_examples_parse(path, command):
    """Each with the command itself; a configuration is there, and takes as many ranks."""
    examples = [line.strip() for line in command.epilog.splitlines()[2:]]
    assert 1 <= len(examples) <= 2
    for example in examples:
        words = shlex.split(example)
        assert words[: len(path) + 1] == ["moepp", *path]
        found, rest = typer.main.get_command(main.app), words[1:]
        while hasattr(found, "commands"):
            found = found.commands[rest.pop(0)]
        given = found.make_context(" ".join(words), rest).params
        config = given.get("config")
        if config is not None:
            settings = load_config(ROOT / config, given["overrides"] or [])
            if isinstance(given.get("nproc"), int):
                Layout.from_config(settings, given["nproc"])


def test_json_to_stdout_is_all_of_it(tmp_path):
    file = tmp_path / "keys.json"
    written = CliRunner().invoke(main.app, ["config", "keys", "moe.tau", "--json", str(file)])
    printed = CliRunner().invoke(main.app, ["config", "keys", "moe.tau", "--json", "-"])
    assert str(file) in written.stdout
    assert printed.stdout == file.read_text()
    assert '"moe.tau"' in printed.stdout


def test_what_ranks_print_is_not_beside_it(capfd):
    """A rank has the file descriptor; what was written before a failure is printed too."""

    def fail():
        with paths._printed_file() as file:
            print("a table")
            os.write(1, b"a rank's table")
            file.write_text("{}\n")
            raise SystemExit(3)

    with pytest.raises(SystemExit, match="3"):
        fail()
    with paths._printed_file():
        print("nothing was written")
    print("goes on")
    assert capfd.readouterr().out == "{}\ngoes on\n"


def test_the_walk_has_found_the_commands():
    names = {" ".join(path) for path, _ in COMMANDS}
    assert {"", "score", "train", "data prepare", "bench layer", "convert upcycle"} <= names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "No such command 'nope'; see moepp --help"),
        (["export", "run"], "No such command 'export'; write moepp convert mcore-to-hf; see"),
        (["eval"], "No such command 'eval'; write moepp score, or moepp train with"),
        (["resume"], "No such command 'resume'; write moepp train CONFIG --resume; see"),
        (["score"], "Missing argument 'CHECKPOINT'; see moepp score --help"),
        (["train", "c.yaml", "--zzz"], "No such option: --zzz; see moepp train --help"),
        (["train", "c.yaml", "--nproc", "0"], "'--nproc'"),
        (["train", "c.yaml", "--nproc", "two"], "'--nproc'"),
        (["train", "no-such.yaml"], "no-such.yaml"),
        (["train", "c.yaml", "--moe.tau", "0.5"], "; write moe.tau=0.5; see"),
        (["train", "c.yaml", "--run.dir=a b"], "; write 'run.dir=a b'; see"),
        (["train", "c.yaml", "--training.train-iters=5"], "write training.train_iters=5"),
        (["train", "c.yaml", "--micro-batch-size", "4"], "setting training.micro_batch_size=VALUE"),
        (["slurm", "c.yaml", "--partition=h100"], "; write slurm.partition=h100; see"),
        (["slurm", "c.yaml", "--gpus-per-node", "4"], "; write slurm.gpus_per_node=4; see"),
        (["slurm", "c.yaml", "--submitt"], "(Possible options: --submit); see"),
        (["train", "moe.tau=0.5"], "write the file first: CONFIG moe.tau=0.5"),
        (["plan", "moe.tau=0.5", "run.dir=a", "c.yaml"], "first: c.yaml moe.tau=0.5 run.dir=a"),
        (["config", "keys", "optimzer"], "did you mean optimizer?"),
        (["config", "keys", "moe.tua"], "did you mean moe.tau?"),
        (["config", "keys", "aux_loss_coeff"], "did you mean moe.balance_coeff?"),
        (["train", str(QUICKSTART)], "start 2 ranks (on one machine --nproc 2)"),
        (["bench", "layer", "--dtype", "bf1"], "--dtype (bf1)"),
        (["report", "no-such-run"], "no-such-run: is not a folder"),
        (["monitor", "no-such-run", "--once"], "no-such-run: is not a folder"),
    ],
)
def test_wrong_usage_is_one_line_of_one_form(arguments, words, moepp):
    code, out, err = moepp(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_ctrl_c_while_the_program_is_imported_prints_nothing():
    code = (
        "import os, signal, sys\n"
        "class CtrlC:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'moepp_megatron.config': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "import moepp_megatron.cli.main\n"
    )
    ended = captured([sys.executable, "-c", code])
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_before_there_is_a_command_is_one_line(monkeypatch, moepp):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "app", interrupted)
    assert moepp() == (1, "", "error: aborted\n")


@pytest.mark.parametrize("before", ["default_int_handler", "SIG_IGN"])
def test_the_import_leaves_ctrl_c_as_it_was(before):
    code = (
        f"import signal; signal.signal(signal.SIGINT, signal.{before})\n"
        "import moepp_megatron.cli.main\n"
        f"assert signal.getsignal(signal.SIGINT) is signal.{before}, "
        "signal.getsignal(signal.SIGINT)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _lose_the_peer(**_):
    raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("written", ["2", "0", ""])
def test_a_rank_whose_peer_has_refused_says_nothing(written, tmp_path, monkeypatch, moepp):
    (tmp_path / "status").write_text(written or "75")
    if written:
        monkeypatch.setenv("MOEPP_STATUS_FILE", str(tmp_path / "status"))
    monkeypatch.setattr(main, "app", _lose_the_peer)
    if written == "2":
        assert moepp() == (2, "", "")
        return
    with pytest.raises(RuntimeError, match="closed by peer"):
        main.run()


def test_json_that_is_printed_needs_a_folder(monkeypatch, moepp):
    monkeypatch.setattr(paths, "_IN_MEMORY", "/nowhere")
    monkeypatch.setattr(paths.tempfile, "tempdir", "/nowhere")
    code, out, error = moepp("config", "keys", "moe.tau", "--json", "-")
    assert (code, out) == (3, "")
    assert error.startswith("error: --json (-) needs a temporary folder that can be written (")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("malloc of size 9\n failed"),
        RuntimeError("err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_no_memory_is_one_line(error, tmp_path, monkeypatch, moepp):
    from moepp_megatron.data import sources

    def without_memory(*_):
        raise error

    monkeypatch.setattr(sources, "companions", without_memory)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    code, _, line = moepp("data", "prepare", tmp_path, "--out", "unused")
    assert (code, line.count("\n")) == (3, 1)
    assert line.startswith("error: this machine's memory does not suffice")
    assert " ".join(str(error).split()) in line


MODEL = str(ROOT / "configs/models/moepp_0.6b_8_4.yaml")
FULL = {
    "config keys": ["config", "keys", "moe.tau", "--json", "FILE"],
    "config show": ["config", "show", str(QUICKSTART), "--json", "FILE"],
    "doctor": ["doctor", "--json", "FILE.json"],
    "report": ["report", "RUN", "--out", "FILE"],
    "plan": ["plan", MODEL, "--gpus", "8", "--gpu", "h100", "--json", "FILE"],
    "data prepare": ["data", "prepare", "README.md", "--out", "FILE"],
    "train": ["train", str(QUICKSTART), "--nproc", "2", "data.path=DATA", "run.dir=FILE"],
}


@pytest.mark.parametrize("words", FULL.values(), ids=FULL)
def test_a_full_disk_is_one_line_that_names_the_file(
    words, small_disk, tmp_path, monkeypatch, moepp
):
    fill(small_disk)
    monkeypatch.chdir(ROOT)
    config = synthetic_config()
    paths = {
        "FILE": small_disk / "made",
        "RUN": write_run(tmp_path / "run", config, synthetic_records(config, 3)),
        "DATA": prepare_letters(tmp_path, "data", a="a"),
    }
    for name, path in paths.items():
        words = [word.replace(name, str(path)) for word in words]
    code, _, err = moepp(*words)
    assert code == 3
    (error,) = (line for line in err.splitlines() if not line.startswith("warning: "))
    assert "No space left on device" in error
    assert str(small_disk / "made") in error
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_full_disk_without_a_name_is_not_blamed_on_stdout(monkeypatch, moepp):
    def is_full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(main, "app", is_full)
    assert moepp() == (3, "", "error: No space left on device; free space\n")


def test_a_working_folder_that_is_gone_is_one_line(tmp_path, monkeypatch, moepp):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for words in (["train", str(QUICKSTART)], ["report", str(tmp_path)], ["plan", str(QUICKSTART)]):
        code, _, err = moepp(*words)
        assert code == 2
        assert err == (
            "error: the working folder cannot be used (No such file or directory); change to one "
            "that is there\n"
        )


@pytest.mark.parametrize(
    "words", [["config", "keys", "moe.tau"], ["plan", MODEL, "--gpus", "8", "--gpu", "h100_sxm"]]
)
def test_a_full_disk_behind_stdout_is_one_line(words):
    words = [sys.executable, "-m", "moepp_megatron", *words]
    with open("/dev/full", "w") as stdout:
        done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3
    assert done.stderr == "error: stdout: No space left on device; free space\n"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "n \u00f6"],
        ["train", str(ROOT / "configs/quickstart.yaml"), "--nproc", "2", "data.path=n \u00f6"],
        ["data", "show", "n \u00f6"],
        ["data", "prepare", "n \u00f6", "--out", "x"],
        ["report", "n \u00f6"],
        ["monitor", "n \u00f6", "--once"],
        ["generate", "n \u00f6", "--prompt", "a"],
        ["convert", "hf-to-mcore", "n \u00f6", "x"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_relative_path_is_said_in_full_and_quoted_where_it_is_suggested(
    words, tmp_path, monkeypatch, moepp
):
    monkeypatch.chdir(tmp_path)
    code, _, err = moepp(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert f", looked at {tmp_path}/n \u00f6" in err
    assert "--out" not in err or "--out 'n \u00f6'" in err


def test_a_target_that_is_taken_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/file").touch()
    code = (
        "import sys\n"
        "from moepp_megatron.cli.main import run\n"
        "for kind in 'hf-to-mcore mcore-to-hf upcycle megatron-lm to-megatron-lm'.split():\n"
        "    sys.argv = ['moepp', 'convert', kind, 'src', 'dst']\n"
        "    try:\n"
        "        run()\n"
        "    except SystemExit as end:\n"
        "        print(end.code, 'torch' in sys.modules)\n"
    )
    ended = captured([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert ended.stdout == "2 False\n" * 5
    taken = f"error: DST ({tmp_path / 'dst'}) must not exist or be empty; choose another folder\n"
    assert ended.stderr == taken * 5


@pytest.mark.parametrize("command", [["report"], ["monitor", "--once"]], ids=lambda c: c[0])
def test_runs_inside_a_folder_are_named(command, tmp_path, monkeypatch, moepp):
    monkeypatch.chdir(tmp_path)
    for number in range(7):
        (tmp_path / "runs" / f"r {number}").mkdir(parents=True)
        (tmp_path / "runs" / f"r {number}" / "config.yaml").touch()
    code, _, err = moepp(*command, "runs")
    assert code == 2
    assert err.startswith("error: runs: holds runs and is none itself; name one: 'runs/r 0' 'runs/")
    assert err.endswith("'runs/r 4' and 2 more\n")
    monkeypatch.chdir("runs")
    assert "name one: 'r 0'" in moepp(*command, ".")[2].replace(str(tmp_path / "runs") + "/", "")
