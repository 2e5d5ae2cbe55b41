"""The package's functions, called as a Python program calls them: in processes of their own."""

import re

import pytest

from moepp_megatron.file_names import is_of_run
from tests import ROOT
from tests.commands import module, program, succeeded
from tests.faults.harness import short_steps, write_config


@pytest.fixture
def config(tmp_path, corpus):
    """The smallest configuration, three steps of it; its run goes to `tmp_path / "run"`."""
    saving = {"save_interval": 3, "async_save": False}
    return write_config(
        tmp_path / "c.yaml",
        corpus,
        tmp_path / "run",
        1,
        sections={"checkpoint": saving},
        train_iters=3,
        **short_steps(2),
    )


def written(code, folder):
    """A program, with the guard that Python asks of those whose functions start processes."""
    path = folder / "program.py"
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    path.write_text(f"import sys\n\nif __name__ == '__main__':\n{body}")
    return path


def test_a_run_from_data_to_export(config, tmp_path):
    (tmp_path / "text.txt").write_text("A document of words and lines.\n" * 40)
    code = """
import numpy as np
import pytest
import moepp_megatron as moepp
from moepp_megatron.config import load_config

assert moepp.prepare("text.txt", "prepared", moepp.PrepareSettings(300)).manifest.documents == 1
settings = load_config(sys.argv[1])
run = moepp.train(settings, "data.num_workers=0")
assert (run.step, run.metrics.step, run.stopped, run.failure) == (3, 3, False, None)
assert 0 < run.metrics.loss < 10
with pytest.raises(ValueError, match="must not hold a run"):
    moepp.train(settings)
again = moepp.train(settings, "training.train_iters=4", resume=True)
assert (again.step, again.folder) == (4, run.folder)
with pytest.raises(moepp.ConfigError, match="tau"):
    moepp.train(settings, "moe.tau=-1")

(text,) = moepp.generate(run.folder, "Document 7", max_new_tokens=4)
assert text.startswith("Document 7") and len(text) > len("Document 7")
tokens = np.arange(20).reshape(2, 10)
scores = moepp.score(run.folder, tokens=tokens, logits=True)
assert scores["token_logprobs"].shape == (2, 9) and (scores["token_logprobs"] < 0).all()
assert scores["logits"].shape == (2, 10, 320)
np.savez("tokens.npz", input_ids=tokens)
moepp.score(run.folder, tokens="tokens.npz", out="scores.npz")
with np.load("scores.npz") as written:
    np.testing.assert_array_equal(written["token_logprobs"], scores["token_logprobs"])
with pytest.raises(ValueError, match=r"input_ids \\(320\\) must be between 0 and 319"):
    moepp.score(run.folder, tokens=tokens + 301)
of_text = moepp.score(run.folder, text="text.txt")
assert of_text["token_ids"].shape == of_text["token_logprobs"].shape

assert (moepp.convert("mcore-to-hf", run.folder, "hf") / "model.safetensors").is_file()
with pytest.raises(ValueError, match="must be one of hf-to-mcore, mcore-to-hf"):
    moepp.convert("gguf", run.folder, "other")
assert "</html>" in moepp.report(run.folder).read_text()
with pytest.raises(ValueError, match="missing"):
    moepp.report("missing")
plan = moepp.plan(settings, gpus=2)
assert plan.best.grid.world == 2
"""
    succeeded(program(written(code, tmp_path), config))
    # --overwrite moves what has these names.
    assert all(is_of_run(path.name) for path in (tmp_path / "run").iterdir())


def test_every_rank_of_torchrun_gets_the_result(config, tmp_path):
    code = """
import os
import moepp_megatron as moepp

ep2 = "parallel.expert_model_parallel_size=2"
run = moepp.train(sys.argv[1], ep2)
text = moepp.generate(run.folder, "Document 7", ep2, max_new_tokens=4)
with open(f"rank{os.environ['RANK']}", "w") as file:
    print(run.step, run.metrics.loss, text, file=file)
"""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    succeeded(module(*torchrun, written(code, tmp_path), config, cwd=tmp_path))
    told = (tmp_path / "rank0").read_text()
    assert told.startswith("3 ")
    assert (tmp_path / "rank1").read_text() == told


def test_the_lines_of_the_readme(config, tmp_path):
    readme = (ROOT / "README.md").read_text()
    lines = re.search(r"## From Python.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    (tmp_path / "configs").mkdir()
    config.rename(tmp_path / "configs/quickstart.yaml")
    (tmp_path / "text.txt").write_text("def main(words, lines): pass\n" * 200)
    assert '"stdlib", "data/stdlib"' in lines
    # The built-in corpus takes a while; two ranks hold half of the experts each.
    lines = lines.replace('"stdlib", "data/stdlib"', '"text.txt", "data/text"')
    lines = lines.replace("training.train_iters=20", "parallel.expert_model_parallel_size=2")
    done = succeeded(program(written(lines, tmp_path)))
    assert re.search(r"^3 \d+\.\d+ runs/mine/report.html$", done.stdout, re.MULTILINE)
    assert "\ndef main(" in done.stdout
    assert (tmp_path / "exported/config.json").is_file()


def test_no_instrument_is_imported_before_the_run_has_ended(config, tmp_path):
    """A fault in a page, a plan or a plot must not keep a run from training."""
    code = """
import json
from pathlib import Path

# As in a process that has imported nothing of it.
for name in [name for name in sys.modules if name.startswith("moepp_megatron")]:
    del sys.modules[name]

class Witness:
    # Asked for every module that is not imported yet; it finds none.
    def find_spec(self, name, path=None, target=None):
        if name.startswith("moepp_megatron.tools"):
            status = Path("run/status.json")
            ended = status.exists() and json.loads(status.read_text())["state"] == "ended"
            print("imported", name, "after" if ended else "before")

sys.meta_path.insert(0, Witness())
sys.argv[1:] = ["train", sys.argv[1], "training.train_iters=2"]
from moepp_megatron.cli.main import run
run()
"""
    done = succeeded(program(written(code, tmp_path), config))
    when = re.findall(r"^imported (\S+) (\S+)$", done.stdout, re.MULTILINE)
    assert ("moepp_megatron.tools.report", "after") in when, "the report is written last"
    assert [name for name, moment in when if moment == "before"] == []
