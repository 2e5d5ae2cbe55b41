"""Fixtures and collection rules for every test."""

import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import last_green, quick, timetable
from tests.parallel.ranks import RankPools

_GPU_TESTS = Path(__file__).parent / "gpu"

# Imports and collection make what lives as long as this process, and hardly any garbage.
gc.disable()

# Threads that wait for each other sleep: spinning, they take six of seven seconds of a short run on
# cores that other tests want, too. Read when torch is loaded, here and in what tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# megatron-core's extension is compiled once a checkout: in the user's folder, where torch keeps it,
# environments in different places would compile it again in turn.
_EXTENSIONS = Path(__file__).parents[1] / ".pytest_cache/extensions"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_EXTENSIONS))

# A shell starts background jobs of a script with Ctrl-C ignored, which all their children inherit:
# tests that send it would then wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _names_gpu_tests():
    paths = [Path(word.split("::")[0]) for word in sys.argv[1:] if not word.startswith("-")]
    return any(path.resolve().is_relative_to(_GPU_TESTS) for path in paths)


# A process has cards for all its tests or for none: megatron-core decides at its import. The
# command line that names tests/gpu has them; every other session is one on a CPU, as in CI.
HAS_NVIDIA = bool(shutil.which("nvidia-smi")) or Path("/dev/nvidiactl").exists()
HAS_CARDS = HAS_NVIDIA and _names_gpu_tests()
if HAS_NVIDIA and not HAS_CARDS:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if HAS_CARDS:
    # Transformer Engine multiplies fp32 in TF32 (common/gemm/cublaslt_gemm.cu), megatron-core's
    # router through it too. Tests in fp32 are about what is computed, so they want fp32.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def _import_triton_for_its_interpreter():
    """Have kernels interpreted where there is no GPU (tests/unit/moe/test_kernels.py)."""
    if HAS_CARDS:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        try:
            import triton.language  # noqa: F401
        except ImportError:
            return


_import_triton_for_its_interpreter()


_POOLS = RankPools()


@pytest.fixture(autouse=True, scope="module")
def _environment():
    """Undo, at the end of a file, the environment that its tests or the code they call have set."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n).run(fn, *args)` runs a module-level function on n gloo ranks, started once."""
    return _POOLS


@pytest.fixture(scope="session")
def on_one_rank(ranks):
    """Return the value of a function on a rank of its own."""

    def run(function, *args, **options):
        (result,) = ranks(1).run(function, *args, **options)
        return result

    return run


@pytest.fixture(scope="module", autouse=True)
def no_rank_outlives_its_file():
    """Ranks that wait compute: threads of their groups wake up a hundred times a second each."""
    with _POOLS:
        yield


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 30 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def pytest_addoption(parser):
    group = parser.getgroup("moepp_megatron")
    group.addoption(
        "--quick",
        action="store_true",
        help="without paths: a choice that covers every room, in two minutes (tests/quick.py)",
    )
    group.addoption(
        "--record-durations",
        action="store_true",
        help="after a run of everything on several workers: write tests/durations.json anew",
    )


def _is_quick(config):
    return config.option.quick and config.args_source is not pytest.Config.ArgsSource.ARGS


def pytest_report_header(config):
    return f"quick: {quick.summary()}" if _is_quick(config) else ""


def pytest_configure(config):
    if _is_quick(config):
        config.args = [str(quick.ROOT / each) for each in quick.chosen()]
        # A few cases on ranks: one worker starts them once.
        timetable.TOGETHER.append("tests/parallel/")
    # Workers' reports come to the process that has started them.
    if config.option.record_durations and not hasattr(config, "workerinput"):
        config.pluginmanager.register(timetable.Record())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return timetable.scheduler(config, log)


def pytest_collection_finish():
    """Collections of garbage need not walk what lives as long as this process."""
    gc.collect()
    gc.freeze()
    gc.enable()
    # What stays frozen is never freed, of which Triton's binding warns at exit. Not before that:
    # pytest collects twice when it ends, which would walk all of it.
    atexit.register(gc.unfreeze)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    result = yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and session.exitstatus == 0:
        last_green.record(session.config, terminal.stats)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        timetable.longest_first(items)
    gpu_items = []
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("parallel")
        if item.get_closest_marker("gpu"):
            gpu_items.append(item)
    # MOEPP_TESTS_CARD=cpu: what of these tests a CPU can run (tests/unit/test_gpu_tests.py).
    if gpu_items and not _has_cuda() and os.environ.get("MOEPP_TESTS_CARD") != "cpu":
        reason = "needs a CUDA GPU"
        if HAS_NVIDIA and not HAS_CARDS:
            reason += " in a session of its own: ./launch/test.sh tests/gpu"
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_cuda():
    import torch  # seconds to import: only if a GPU test was collected

    return torch.cuda.is_available()


@pytest.fixture
def store(monkeypatch):
    """An object store that answers here, and its address in the environment."""
    from tests.object_store import Store

    made = Store()
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    yield made
    made.stop()
