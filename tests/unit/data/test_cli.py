import sys

import pytest
from typer.testing import CliRunner

from moepp_megatron.cli.data import app
from tests.commands import captured

runner = CliRunner()


def test_prepare_writes_and_reports(corpus_file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.txt").write_text("")
    (tmp_path / "empty/b.txt").write_text("something")
    sources = [str(corpus_file), str(tmp_path / "empty")]
    out = str(tmp_path / "out")
    arguments = ["prepare", *sources, "--out", out, "--vocab-size", "300", "--workers", "1"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "skipped 1: empty" in result.stdout
    assert "written" in result.stdout
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "up to date" in result.stdout
    result = runner.invoke(app, [*arguments, "--force"])
    assert "written" in result.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        # The beginning of a sentencepiece model: protobuf with the score of a piece.
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x80\xbf\x18\x02", "and is none; check the file"),
        (b'{"a": 1}', "must be a Hugging Face tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_refused_before_sources_are_read(
    content, words, corpus_file, tmp_path, monkeypatch, moepp
):
    model = tmp_path / "tokenizer.model"
    model.write_bytes(content)
    monkeypatch.setattr(
        "moepp_megatron.data.prepare.resolve_sources", lambda *_, **__: pytest.fail("was read")
    )
    arguments = [str(corpus_file), "--out", str(tmp_path / "out"), "--tokenizer", str(model)]
    code, _, stderr = moepp("data", "prepare", *arguments)
    assert code == 2
    assert f"tokenizer ({model}) must be" in stderr
    assert words in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_heavy_imports_wait(corpus_file, prepared):
    """Help and an up-to-date folder need no torch; workers never do."""
    script = f"""
import sys
import moepp_megatron.cli.data
light = {{"torch", "megatron", "numpy", "tokenizers"}} & set(sys.modules)
import moepp_megatron.data.encoding
from pathlib import Path
from moepp_megatron.runtime.terminal import Console
from moepp_megatron.data.prepare import PrepareSettings, prepare
settings = PrepareSettings(vocab_size=300, workers=1)
assert prepare([{str(corpus_file)!r}], Path({str(prepared)!r}), settings, Console()).up_to_date
print(light, {{"torch", "megatron"}} & set(sys.modules))
"""
    result = captured([sys.executable, "-c", script], timeout=60, check=True)
    assert result.stdout.strip() == "set() set()"
