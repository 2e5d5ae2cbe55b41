"""The program of a test rank: join the gloo group, then run the functions it is sent.

Nothing heavy is imported at the top: pytest's own process imports this module too.
"""

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from datetime import timedelta
from typing import Any

# Imported once, in the process that ranks are forked from.
PRELOADED_MODULES = [
    "torch",
    "torch.distributed",
    "megatron.core.parallel_state",
    "megatron.core.models.gpt",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    # Not more than that: these import most of the engine.
    "moepp_megatron.runtime.cpu_support",
    "moepp_megatron.training.trainer",
    "benchmarks.fresh_ranks",
    # For the page that a command writes at the end of a run.
    "matplotlib.figure",
]
SEED = 1234


def serve(rank, world_size, pipe, log):
    """The rank's life: answers `(True, result)` or `(False, traceback)` to each call."""
    _send_output_to(log)
    _end_with_pytest()
    # The collections in reset() need not walk, and so copy, what all ranks share with the server.
    gc.freeze()
    try:
        worker_setup()
        _join_group(rank, world_size, pipe)
        answer: tuple[bool, str | None] = (True, None)
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            # Not sys.exit: leaving the group in order would wait for peers that are gone.
            os._exit(0)
        pipe.send_bytes(_answer(call))


def worker_setup():
    """Once in each rank, before its first function: what a CPU rank needs to run megatron-core."""
    name = "moepp_megatron.runtime.cpu_support"
    if importlib.util.find_spec("moepp_megatron.runtime") and importlib.util.find_spec(name):
        importlib.import_module(name).install()


def reset():
    """Forgets what a function left in torch's and megatron-core's module globals."""
    import torch
    import torch.distributed as dist

    from benchmarks.fresh_ranks import forget_model

    assert dist.is_initialized(), "the function destroyed the default group, which ranks keep"
    forget_model()
    # What lives on, such as modules, need not be walked after the next function again.
    gc.freeze()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    # A lone process of `moepp` takes all cores (runtime/distributed.py), so does a pool of one.
    torch.set_num_threads(1)
    _show_stacks_on_request()
    _seed()


def _answer(call):
    try:
        module, name, args, kwargs = pickle.loads(call)
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        # Pickled before the reset: a result may hold a tensor that a group's buffers own.
        answer = pickle.dumps((True, function(*args, **kwargs)))
        reset()
    except BaseException:
        # SystemExit and pytest's outcomes too: to this rank they are failures of the function.
        return pickle.dumps((False, traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return answer


def _send_output_to(log):
    """Sends this process's output, and its stacks on SIGUSR1 and fatal signals, to `log`."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(file=2)
    _show_stacks_on_request()


def _show_stacks_on_request():
    """On SIGUSR1, also after a function that had a handler of its own for it, as trainers do."""
    faulthandler.unregister(signal.SIGUSR1)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)


def _end_with_pytest():
    """Ends this rank when pytest's process is gone, even in the middle of a hung call."""
    pytest_process = multiprocessing.parent_process()
    assert pytest_process is not None, "a rank is started by multiprocessing"

    def watch():
        pytest_process.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-pytest", daemon=True).start()


def _join_group(rank, world_size, pipe):
    import torch
    import torch.distributed as dist

    # The default collective timeout is 30 minutes; pytest's side ends a stuck call long before.
    timeout = timedelta(minutes=5)
    port = 0 if rank == 0 else pickle.loads(pipe.recv_bytes())
    store = dist.TCPStore(
        "127.0.0.1", port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False
    )
    if rank == 0:
        pipe.send_bytes(pickle.dumps(store.port))
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
    )
    torch.set_num_threads(1)
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    _seed()


def _seed():
    import numpy as np
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
