"""examples/own_megatron_loop.py learns, needs no other packages, and is the same on two ranks."""

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from tests import ROOT
from tests.commands import captured, succeeded

EXAMPLE = ROOT / "examples/own_megatron_loop.py"
STEPS = 5


def run_example():
    """Losses and FFN shares of the example on these ranks, as `main` trains it."""
    from examples import own_megatron_loop

    own_megatron_loop.start()
    return own_megatron_loop.train(STEPS, EXAMPLE.read_bytes())


@pytest.mark.parallel
def test_losses_are_those_of_one_process(ranks, on_one_rank):
    alone = on_one_rank(run_example)
    both = ranks(2).run(run_example)
    assert both[0] == both[1]
    for (loss, share), (expected, expected_share) in zip(both[0], alone, strict=True):
        # fp32, sums in another order; the share is a quotient of equal counts.
        assert loss == pytest.approx(expected, rel=1e-5)
        assert share == expected_share
    losses = [loss for loss, _ in alone]
    assert losses[-1] < losses[0] - 0.5
    assert all(0.0 < share < 1.0 for _, share in alone)


def base_packages(folder):
    """Links to torch, megatron-core and what they require without any extra."""
    waiting, seen = ["torch", "megatron-core"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of another system
            continue
        texts = [text for text in found.requires or () if "extra ==" not in text]
        waiting += [re.split(r"[^\w.-]", text)[0] for text in texts]
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))


def test_page_and_example_need_torch_and_megatron_core_only(tmp_path):
    """As torchrun starts one rank, without a GPU; a port of 0 lets the store choose."""
    base_packages(tmp_path)
    (tmp_path / "moepp_megatron").symlink_to(ROOT / "moepp_megatron")
    page = (ROOT / "docs/how_to/from_megatron_lm.md").read_text()
    section = page.partition("## In your own loop")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    steps = f"import runpy, sys; sys.argv[1:] = '2'; runpy.run_path('{EXAMPLE}', None, '__main__')"
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    variables |= {"LOCAL_RANK": "0", "PYTHONPATH": str(tmp_path)}
    done = succeeded(
        captured(
            # -S: without the packages of this environment.
            [
                sys.executable,
                "-S",
                "-c",
                f"{code}\n{steps}\nimport moepp_megatron.interop.megatron_lm",
            ],
            env=os.environ | variables,
            cwd=tmp_path,
        )
    )
    assert re.match(r"tensor\(5\.\d+, .*\nstep 1: loss 5\.\d+, ", done.stdout)
