"""Each JSON file of runs, checkpoints and prepared data has its name in one place."""

import ast
import re
from pathlib import Path

from moepp_megatron import file_names
from moepp_megatron.file_names import is_record

PACKAGE = Path(file_names.__file__).parent
# What these rooms write are results, and folders of experiments; models of Hugging Face have the
# names in hf_files.
NOT_RECORDS = ("cli", "tools", "interop/hf_files")


def _json_names(source):
    """JSON file names in a module's strings, with 0 for what an f-string fills in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = node.values
        elif isinstance(node, ast.Constant):
            parts = [node]
        else:
            continue
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in parts)
        found += [text] if re.fullmatch(r"\w[\w.-]*\.jsonl?", text) else []
    return found


def test_no_name_is_forgotten():
    modules = [
        path
        for path in PACKAGE.rglob("*.py")
        if not str(path.relative_to(PACKAGE)).startswith(NOT_RECORDS)
    ]
    named = {
        name
        for path in modules
        for name in _json_names(path.read_text())
        if path.name != "file_names.py"
    }
    # A file that every rank writes for itself.
    assert {"rank_0.json", "rank0.meta.json"} <= named
    assert [name for name in sorted(named) if not is_record(name)] == []


def test_no_result_is_taken_for_a_record():
    names = ("report.html", "profile.json", "plan.json", "ranks.json", "scores.npz", "mine.json")
    assert not any(is_record(name) for name in names)
