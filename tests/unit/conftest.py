"""Fixtures shared by tests of several folders."""

import functools
import shutil

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


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, to look at pages with."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        # Chromium's sandbox refuses to start for root, which containers have.
        running = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield running
        running.close()


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
