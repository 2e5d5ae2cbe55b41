"""README and the docs: every command line parses, links lead somewhere, README stays short."""

import re
from pathlib import Path

import pytest

from tests.unit.command_lines import ROOT, Line, lines_of, problem_of

README = ROOT / "README.md"
# The log records the commands of their time.
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted(set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "LOG.md"}),
]
_CODE = re.compile(r"```.*?```", re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# What a page says is refused.
_REFUSED = {"moepp train CONFIG --micro-batch-size 4"}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_command_lines_parse(page: Path) -> None:
    lines = dict.fromkeys(lines_of(page.read_text(encoding="utf-8")))
    problems = {line.text: problem for line in lines if (problem := problem_of(line))}
    for refused in _REFUSED & {line.text for line in lines}:
        assert problems.pop(refused)
    assert not problems, "\n".join(f"{text}: {problem}" for text, problem in problems.items())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("moepp train CONFIG --nprocs 2", "No such option"),
        ("moepp train CONFIG --nproc two", "valid integer"),
        ("moepp train CONFIG moe.taus=0.5", "moe.taus"),
        ("moepp train CONFIG moe.tau=high", "moe.tau"),
        ("moepp train configs/quickstart.yaml moe.num_ffn_experts=7", "num_ffn_experts"),
        ("moepp train configs/no-such.yaml", "no configs/no-such.yaml"),
        ("moepp score RUN parallel.expert_parallel=2", "expert_parallel"),
        ("moepp report", "Missing"),
        ("moepp bench nothing", "no command nothing"),
        ("./launch/test.sh --fast", "takes no --fast"),
        ("./launch/multinode.sh CONFIG --nodes 2", "No such option"),
        ("./launch/no_such.sh", "no_such.sh"),
        ("python -m benchmarks.no_such", "no module"),
        ("sbatch --nodes=2 slurm/no_such.sbatch CONFIG", "no slurm"),
    ],
)
def test_a_wrong_command_line_is_found(text: str, word: str) -> None:
    assert word in (problem_of(Line(text, whole=True)) or "")


def test_command_lines_are_found_where_they_are() -> None:
    page = "Say `moepp report\nRUN`.\n\n```bash\nmoepp train CONFIG \\\n    --resume   # on\n```\n"
    assert list(lines_of(page)) == [
        Line("moepp train CONFIG --resume", whole=True),
        Line("moepp report RUN", whole=False),
    ]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "LOG.md"], ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    missing = []
    for _, link in _LINK.findall(text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or anchor and anchor not in _anchors(file):
            missing.append(link)
    assert missing == []


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and Python-Markdown name them."""
    titles = re.findall(r"^#+ (.*)$", _CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", t.lower()).strip()) for t in titles}
