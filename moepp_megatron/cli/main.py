"""The `moepp` command. Each command lives in its own file; heavy imports wait until one runs."""

import errno
import os
import signal
import sys

# The imports below take a moment, in which Ctrl-C is to end the program without a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from typing import Annotated

from moepp_megatron.runtime.optional import missing

try:
    import typer

    from moepp_megatron.cli import (
        bench,
        config,
        convert,
        data,
        doctor,
        generate,
        inspect,
        monitor,
        pilot,
        plan,
        profile,
        report,
        scale,
        score,
        slurm,
        train,
    )
    from moepp_megatron.cli.echo import echo, echo_error
    from moepp_megatron.cli.paths import check_paths
    from moepp_megatron.cli.usage import UsageError, move_examples, refuse
    from moepp_megatron.config import ConfigError, UnfitError
    from moepp_megatron.config.exit_codes import FAILED
    from moepp_megatron.runtime.disk import NO_SPACE, STDOUT, is_full
    from moepp_megatron.runtime.launch import has_launcher, refusal, write_status
    from moepp_megatron.runtime.printable import make_logs_printable
    from moepp_megatron.version import __version__
except ModuleNotFoundError as error:
    print(f"error: {missing(error)}", file=sys.stderr)
    sys.exit(3)

if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)

app = typer.Typer(
    name="moepp",
    help="""Train MoE++ models (arXiv 2410.07348) with megatron-core.

    Examples:
        moepp train configs/quickstart.yaml --nproc 2
        moepp report runs/quickstart
    """,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Markup would take what stands in brackets out of every command's help: `input_ids [b, s]`.
    rich_markup_mode=None,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"moepp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the program itself."""


app.command(cls=doctor.Doctor)(doctor.doctor)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.command()(train.train)
app.command()(generate.generate)
app.command()(score.score)
app.command()(inspect.inspect)
app.add_typer(convert.app, name="convert")
app.command()(report.report)
app.command()(monitor.monitor)
app.command()(profile.profile)
app.add_typer(bench.app, name="bench")
app.command()(plan.plan)
app.command()(pilot.pilot)
app.command()(scale.scale)
app.command()(slurm.slurm)
check_paths(app)
move_examples(app)


def run() -> None:
    """Entry point. A user's error is one line on stderr a problem, and its exit code."""
    make_logs_printable()
    try:
        _check_working_folder()
        try:
            status = app(prog_name="moepp", standalone_mode=False)
        except ModuleNotFoundError as error:
            raise UnfitError(missing(error)) from error
    except (ConfigError, UnfitError) as error:
        status = echo_error(error)
        # Of a rank: torchrun would turn it into 1.
        write_status(status, str(error))
        sys.exit(status)
    except (typer.Abort, KeyboardInterrupt):
        # The second one comes before typer has made the command, or after its end.
        echo("error: aborted", err=True)
        sys.exit(FAILED)
    except UsageError as error:
        sys.exit(refuse(error))
    except Exception as error:
        from moepp_megatron.runtime.terminal import discard_output

        if isinstance(error, OSError) and is_full(error) and not has_launcher():
            # Writers of files name them (`runtime.atomic`).
            if error.filename == STDOUT:
                discard_output()
            name = f"{error.filename}: " if error.filename else ""
            echo(f"error: {name}{NO_SPACE}; free space", err=True)
            sys.exit(UnfitError.exit_code)
        if _lacks_memory(error) and not has_launcher():
            echo(f"error: {_no_memory(error)}", err=True)
            sys.exit(UnfitError.exit_code)
        if (refused := refusal()) is None:
            raise
        # Another rank has said what is wrong and is gone, which is all that broke here.
        sys.exit(refused[0])
    # A command returns nothing; `typer.Exit` returns its code here.
    sys.exit(status if isinstance(status, int) else 0)


def _check_working_folder() -> None:
    """Refuse to start in a folder that is gone, where no relative path means anything."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the working folder cannot be used ({error.strerror}); change to one that is there"
        ) from error


def _lacks_memory(error: Exception) -> bool:
    """True if Python, NumPy, pyarrow, the system or torch ran out of memory."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _no_memory(error: Exception) -> str:
    said = " ".join(str(error).split())
    return (
        f"this machine's memory does not suffice{f' ({said})' if said else ''}; give the command "
        "less to read at once, or a machine with more"
    )


if __name__ == "__main__":
    run()
