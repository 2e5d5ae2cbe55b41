"""examples/own_megatron_loop.py: the loop learns, and two ranks get one rank's losses."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.ranks import RankPools

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_megatron_loop.py"
STEPS = 5


def run_example() -> list[tuple[float, float]]:
    """Losses and FFN shares of the example on these ranks, as `main` trains it."""
    spec = importlib.util.spec_from_file_location("own_megatron_loop", EXAMPLE)
    assert spec is not None, EXAMPLE
    assert spec.loader is not None, EXAMPLE
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.start()
    return example.train(STEPS, EXAMPLE.read_bytes())


@pytest.mark.parallel
def test_losses_are_those_of_one_process(ranks: RankPools) -> None:
    (alone,) = ranks(1).run(run_example)
    both = ranks(2).run(run_example)
    assert both[0] == both[1]
    for (loss, share), (expected, expected_share) in zip(both[0], alone, strict=True):
        # fp32, sums in another order; the share is a quotient of equal counts.
        assert loss == pytest.approx(expected, rel=1e-5)
        assert share == expected_share
    losses = [loss for loss, _ in alone]
    assert losses[-1] < losses[0] - 0.5
    assert all(0.0 < share < 1.0 for _, share in alone)


def test_the_model_of_the_page_runs_without_a_gpu() -> None:
    """As torchrun starts one rank of it; a port of 0 lets the store choose."""
    page = (EXAMPLE.parents[1] / "docs" / "how_to" / "from_megatron_lm.md").read_text("utf-8")
    section = page.partition("## In your own loop")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"tensor\(5\.\d+, ", done.stdout)
