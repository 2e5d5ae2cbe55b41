"""Starts of `python -m module` that fork instead: real processes, without the seconds of imports.

A process that is forked from the server of ranks (tests/parallel/ranks.py) has torch and
megatron-core. What it starts with `subprocess` would import them anew, which takes six seconds of
computing a process: the launcher its torchrun, torchrun its ranks, and once more after every
failure; the 16 tests of tests/faults/test_launch.py alone make 42 such starts, four minutes of
computing for half a minute of tests.

`install` has `subprocess.Popen` fork for such a start. It replaces `Popen._execute_child`, for
`Popen` has no public place between its bookkeeping and the start, and torchrun has the class by
name. The child has its parent, its session, its signals, its environment and its files as after an
exec, so it can be signalled, killed, waited for and orphaned as any. It differs in what is imported
already, and in what `/proc` says of its command line and its environment. What an exec would have
ended (hooks at exit, finalizers, what multiprocessing knows of children) has no public way to be
forgotten; `_forget_the_parent` has all of it.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import io
import logging
import multiprocessing.process
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
import weakref

_exec = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def install():
    """Fork from here on, in this process and in those that it forks."""
    subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]


def run(words, environment, folder):
    """Run a program as a new interpreter would, in this fork; output goes to files 1 and 2."""
    # The server has matplotlib; a process that imports this module may not.
    from tests.figures import leave_unrendered

    status = 1
    try:
        _forget_the_parent()
        _reopen_output()
        os.environ.clear()
        os.environ.update(environment)
        if folder is not None:
            os.chdir(folder)
        paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:0] = [path for path in paths if path not in sys.path]
        importlib.invalidate_caches()
        leave_unrendered()
        status = _status_of(words)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # Not sys.exit: the frames below are the parent's.
        os._exit(status)


def _status_of(words):
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            # As in a process that has not imported it.
            sys.modules.pop(words[1], None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _forget_the_parent():
    """Drop all that an exec would have ended: handlers, exit hooks, records of children."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.disable()
    # The parent's temporary folders are the parent's to remove.
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]
    process = multiprocessing.process
    process._parent_process = None
    kinds = {kind.__name__: kind for kind in process.BaseProcess.__subclasses__()}
    process._current_process = kinds["_MainProcess"]()
    process._children = set()
    # Collections need not walk, and so copy, what is shared with the parent.
    gc.freeze()


def _reopen_output():
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw = open(number, "wb", 0, closefd=False)  # noqa: SIM115
        # Whatever is printed is there when a test kills the process.
        setattr(sys, name, io.TextIOWrapper(raw, write_through=True))


def _words(command):
    """A command from its "-m" or its program on; None if it is not one for a fork."""
    if not isinstance(command, list | tuple) or command[0] != sys.executable:
        return None
    rest = [os.fspath(word) for word in command[1:]]
    while rest and rest[0] == "-u":
        rest.pop(0)
    return rest if rest and (rest[0] == "-m" or rest[0].endswith(".py")) else None


def _execute_child(
    self,
    args,
    executable,
    preexec_fn,
    close_fds,
    pass_fds,
    cwd,
    env,
    startupinfo,
    creationflags,
    shell,
    *more,
):
    """Of `subprocess.Popen`; `more` are six ends of pipes, who to be, and the session."""
    words = None if shell or executable or pass_fds else _words(args)
    if words is None:
        known = (args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo)
        _exec(self, *known, creationflags, shell, *more)
        return
    ends, (start_new_session, process_group) = more[:6], more[-2:]
    assert process_group == -1, "no process group of its own: see subprocess"
    environment = dict(os.environ if env is None else env)
    with warnings.catch_warnings():
        # Of the parent's threads, which are not in the child: it is to be as after an exec.
        warnings.simplefilter("ignore", DeprecationWarning)
        self.pid = os.fork()
    if self.pid == 0:
        try:
            if start_new_session:
                os.setsid()
            _take_files(ends[0], ends[3], ends[5])
            if preexec_fn is not None:
                preexec_fn()
            run(words, environment, cwd)
        finally:
            os._exit(255)
    self._child_created = True
    self._close_pipe_fds(*ends)


def _take_files(stdin, stdout, stderr):
    """Make these the files 0, 1 and 2 (-1: as they are), and close all others."""
    # High numbers first, lest one of the three is overwritten before it is taken.
    taken = [None if file == -1 else os.dup(file) for file in (stdin, stdout, stderr)]
    for number, file in enumerate(taken):
        if file is not None:
            os.dup2(file, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.close(int(name))
