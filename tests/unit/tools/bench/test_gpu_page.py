"""The page of a GPU's results: measured numbers beside expected ones."""

import json
import re

import pytest

from benchmarks.gpu_page import write_gpu_page
from tests.refusals import config_error

LAYER = {
    "shape": "0.6B",
    "tau": 0.5,
    "pass": "forward",
    "phi": 0.5,
    "vanilla_ms": 3.0,
    "moepp_ms": 2.0,
    "speedup": 1.5,
    "efficiency": 0.75,
    "paper_efficiency": 0.691,
    "moepp_parts_ms": {"router": 0.25, "rest": 0.1},
    "moepp_bounds_ms": {"router": 0.125},
}
RESULTS = {
    "card": "NVIDIA <H100>",
    "driver": "580.95",
    "versions": {"torch": "2.15.0"},
    "commits": ["abcdef0123456789"],
    "steps": [
        {"name": "card", "exit_status": 0, "seconds": 7, "commit": "abc"},
        {"name": "layer_fp8", "exit_status": 124, "seconds": 600, "commit": "abc"},
        {"name": "step_bf16", "exit_status": 1, "seconds": 9, "commit": "abc"},
    ],
    "tests": {"kernels": {"passed": 5, "failed: tests.gpu.a": 1, "skipped: needs DeepEP": 2}},
    "measured": {
        "matmul_tflops": {"bf16": 600.0},
        "rated_tflops": {"bf16": 1000.0},
        "copy_gb_s": 2500.0,
        "rated_gb_s": None,
    },
    "layer": {"bf16": [LAYER, LAYER | {"pass": "forward_backward", "paper_efficiency": None}]},
    "step": {
        "bf16": {"vanilla_ms": 30.0, "moepp_ms": 20.0, "speedup": 1.5, "phi": 0.6, "tokens": 1000}
        | {"vanilla_j": 21.5, "moepp_j": None, "static_rows_ms": 19.0}
    },
    "serve": {
        "FFN share 0.6, batch 16": {"prefill_tokens_per_s": 2000.0, "prefill_of_vanilla": 1.25}
        | {"decode_tokens_per_s": 300.0, "decode_of_vanilla": 1.5}
    },
    "runs": {
        "first": {
            "step": 20,
            "loss": 8.25,
            "step_time_s": 0.5,
            "memory_bytes": 3 * 2**30,
            "estimated_bytes": 4 * 2**30,
            "modules": "optional packages used: Transformer Engine 2.20.2; not used: apex",
        },
        "cpu": {
            "step": 2,
            "loss": 9.0,
            "step_time_s": 0.5,
            "memory_bytes": None,
            "estimated_bytes": 2**30,
        },
    },
}


def rows(html):
    found = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in found]


def test_measured_stands_beside_expected(tmp_path):
    file, page = tmp_path / "h100.json", tmp_path / "h100.html"
    file.write_text(json.dumps(RESULTS))
    write_gpu_page(file, page)
    html = page.read_text()
    assert "NVIDIA &lt;H100&gt;" in html
    assert "commit abcdef012345<" in html
    found = rows(html)
    for row in (
        ["layer_fp8", "cut off at its limit", "600"],
        ["step_bf16", "failed (1)", "9"],
        ["kernels", "failed: tests.gpu.a", "1"],
        ["bf16 product, TFLOP/s", "600", "1,000", "60%"],
        ["copy in memory, GB/s", "2,500", "", ""],
        ["bf16", "0.6B", "forward", "0.5", "3.00", "2.00", "1.50", "2.00", "0.750", "0.691"],
        ["bf16", "0.6B", "0.5", "router", "0.250", "0.125", "2.0"],
        ["bf16", "30.0", "20.0", "1.50", "1.67", "50,000", "21.500", "", "19.000"],
        ["FFN share 0.6, batch 16", "2,000", "1.25", "300", "1.50"],
        ["first", "Transformer Engine 2.20.2", "20", "8.250", "500.0", "3.00", "4", "75%"],
        ["cpu", "", "2", "9.000", "500.0", "", "1.000", ""],
    ):
        assert row in found, row
    assert "http" not in html.replace("http-equiv", "")


@pytest.mark.parametrize("content", [None, "{", '{"card": "x"}', "[]"])
def test_what_is_no_results_file_is_one_line(tmp_path, content):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    with config_error("must be a results file of benchmarks/gpu.sh"):
        write_gpu_page(file, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
