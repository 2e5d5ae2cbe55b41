"""What tests of several folders share."""

import functools

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_program():
    """typer builds all commands and their options anew for each call; here once a program."""
    import typer.main
    import typer.testing

    once = functools.cache(typer.main.get_command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", once)
        patch.setattr(typer.testing, "_get_command", once)
        yield


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are made but not turned into SVG, which is most of the work of a page."""
    from tests.figures import save_empty

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_empty)


@pytest.fixture
def moepp(monkeypatch, capsys):
    """Runs a command in this process: exit code, stdout and stderr."""
    from moepp_megatron.cli import main

    def call(*words):
        monkeypatch.setattr("sys.argv", ["moepp", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main.run()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call
