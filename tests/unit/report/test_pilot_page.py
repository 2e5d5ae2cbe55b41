"""The pilot's page and its tables; every number here is made up."""

from __future__ import annotations

import base64
import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moepp_megatron.planning.pilot.result import PilotResult
from moepp_megatron.report.pilot import print_pilot, write_pilot_page
from moepp_megatron.report.pilot.stages import stages
from moepp_megatron.report.plot import Plot

SEEDS = [1, 2, 3]
COMMAND = (
    "moepp pilot configs/quickstart.yaml --nproc 2 --out pilots/first --gpus 64 "
    "--target configs/models/moepp_7b_16_4.yaml data.path=data/mine"
)


def interval(mean: float, half: float | None) -> dict[str, float | None]:
    if half is None:
        return {"mean": mean, "low": None, "high": None}
    return {"mean": mean, "low": mean - half, "high": mean + half}


def outcome(
    name: str,
    kind: str,
    loss: float,
    milliseconds: float,
    *,
    tau: float | None = None,
    topk: int = 2,
    steps: int = 400,
    share: float = 1.0,
    health: dict[str, float] | None = None,
    alerts: dict[str, int] | None = None,
) -> dict[str, Any]:
    tokens = [4096 * step for step in range(1, steps + 1)]
    curve = [
        loss
        - 0.05
        + 4.5 * math.exp(-step / 30)
        + 0.6 * math.exp(-step / 200)
        + 0.04 * math.sin(step * 1.7)
        for step in range(1, steps + 1)
    ]
    is_vanilla = kind == "vanilla"
    overrides = [] if tau is None else [f"moe.tau={tau:g}"]
    return {
        "arm": {
            "name": name,
            "kind": kind,
            "tau": tau,
            "topk": topk,
            "steps": steps,
            "overrides": overrides,
        },
        "seeds": SEEDS,
        "valid_loss": interval(loss, 0.021),
        "loss_difference": None if is_vanilla else interval(loss - 3.5, 0.006),
        "step_time_s": interval(milliseconds / 1e3, 0.004),
        "time_ratio": None if kind in ("vanilla", "short") else interval(milliseconds / 800, 0.012),
        "tokens_per_s": interval(4096e3 / milliseconds, 30.0),
        "ffn_share": interval(share, 0.004),
        "a2a_bytes": interval(25.17e6 * share * topk / 2, 1e4),
        "energy_per_token_j": None,
        "alerts": alerts or {},
        "health": health or {},
        "curve": {"tokens": tokens, "loss": curve},
    }


HEALTH = {
    "gate_entropy": 1.84,
    "selection_margin": 0.041,
    "logit_variance": 1.31,
    "row_cosine_max": 0.23,
    "balance_gradient_ratio": 0.014,
    "constant_replaced": 0.31,
    "residual_ratio": 0.24,
    "max_ffn_load": 1.92,
}


def verdict(arm: str, factor: float, time: float, target: float | None, **answers: Any) -> Any:
    return {
        "arm": arm,
        "token_factor": {"mean": factor, "low": factor / 1.03, "high": factor * 1.03},
        "time_to_loss": {"mean": time, "low": time / 1.04, "high": time * 1.04},
        "target_time_to_loss": target
        and {"mean": target, "low": target / 1.11, "high": target * 1.11},
        "at_pilot": "pays",
        "at_target": target and "undecided",
        "reasons": [
            f"{arm} needs {factor:.3f} times vanilla's tokens for its loss.",
            f"Its step takes less time, so it is there after {time:.3f} of vanilla's time.",
        ],
    } | answers


def contents() -> dict[str, Any]:
    """A pilot of three MoE++ arms and one rival, with a target, that pays at tau 0.75."""
    return {
        "setting": {
            "command": COMMAND,
            "config": "quickstart",
            "nproc": 2,
            "device": "CPU (made up)",
            "cores": 2,
            "torch": "2.11.0",
            "megatron_core": "0.19.2",
            "steps": 400,
            "tokens": 1_638_400,
            "valid_tokens": 131_072,
            "parameters": 9_412_352,
            "began": "2026-11-26",
        },
        "arms": [
            outcome("vanilla", "vanilla", 3.5, 800.0),
            outcome("MoE++ tau 0.25", "moepp", 3.543, 610.0, tau=0.25, share=0.335, health=HEALTH),
            outcome("MoE++ tau 0.5", "moepp", 3.516, 650.0, tau=0.5, share=0.501, health=HEALTH),
            outcome(
                "MoE++ tau 0.75",
                "moepp",
                3.5031,
                684.0,
                tau=0.75,
                share=0.598,
                health=HEALTH,
                alerts={"dead_expert": 2, "few_ffn_experts": 0},
            ),
            outcome("vanilla top-1", "rival", 3.561, 640.0, topk=1),
            outcome("vanilla, 70% of the steps", "short", 3.668, 800.0, steps=280),
        ],
        "token_value": interval(0.471, 0.03),
        "equal_speed": [
            {
                "arm": "MoE++ tau 0.25",
                "slower": "vanilla top-1",
                "faster": "vanilla top-1",
                "weight": 1.0,
                "enclosed": False,
                "loss_difference": interval(-0.018, 0.02),
            },
            {
                "arm": "MoE++ tau 0.75",
                "slower": "vanilla",
                "faster": "vanilla top-1",
                "weight": 0.275,
                "enclosed": True,
                "loss_difference": interval(-0.0411, 0.009),
            },
        ],
        "target": {
            "name": "moepp_7b_16_4",
            "gpus": 64,
            "gpu": "h100_sxm",
            "tokens": 1e12,
            "price_per_hour": 2.5,
            "models": [
                target_model("vanilla", 1.0),
                target_model("MoE++ tau 0.5", 0.82),
                target_model("MoE++ tau 0.75", 0.879),
            ],
        },
        "verdicts": [
            verdict("MoE++ tau 0.75", 1.007, 0.861, 0.885),
            verdict("MoE++ tau 0.5", 1.035, 0.841, 0.849),
            verdict("MoE++ tau 0.25", 1.096, 0.836, None, at_pilot="undecided"),
        ],
        "recommended": "MoE++ tau 0.75",
        "answer": "MoE++ with tau 0.75 reaches vanilla's loss in 0.86 of its time here; whether it "
        "pays on 64 H100 is undecided.",
        "caveats": [
            "The pilot is small: what 1.6 million tokens show need not hold for a trillion.",
            "Two ranks on one machine: the network of a cluster is the cost model's guess.",
        ],
    }


def target_model(arm: str, ratio: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "layout": "PP2 EP8, micro-batch 2",
        "fits": True,
        "step_time_s": 9.4 * ratio,
        "tokens_per_s_per_gpu": 13_000 / ratio,
        "tflops_per_gpu": 310.0,
        "a2a_bytes": 41.2e9 * ratio,
        "hours": 334.0 * ratio,
        "money": 53_440.0 * ratio,
        "time_ratio": ratio,
    }


def without_intervals(value: Any) -> Any:
    """The same with a single seed."""
    if isinstance(value, dict):
        if value.keys() == {"mean", "low", "high"}:
            return value | {"low": None, "high": None}
        changed = {key: without_intervals(one) for key, one in value.items()}
        return changed | {"seeds": [1]} if "seeds" in changed else changed
    return [without_intervals(one) for one in value] if isinstance(value, list) else value


class Reader(HTMLParser):
    """A page's text, pictures and tables; checks that tags are balanced."""

    VOID = ("meta", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.badges: list[tuple[str, list[str]]] = []
        self.feed(page)
        assert not self.open, f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags.add(tag)
        self.addresses += [values[k] for k in ("src", "href", "action") if k in values]
        if tag == "img":
            self.pictures.append((values["src"], values["alt"]))
        if tag in self.VOID:
            return
        self.open.append((tag, values))
        table = self._inside("table")
        if table is not None:
            rows = self.tables.setdefault(table["id"], [])
            if tag == "tr":
                rows.append([])
            elif tag in ("td", "th"):
                rows[-1].append("")
        if "badge" in values.get("class", "").split():
            self.badges.append((values["class"].split()[1], []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._inside("style") is not None:
            return
        self.words.append(data)
        table = self._inside("table")
        if table is not None and any(tag in ("td", "th") for tag, _ in self.open):
            row = self.tables[table["id"]][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())
        if data.strip() and any("badge" in v.get("class", "").split() for _, v in self.open):
            self.badges[-1][1].append(data.strip())

    def _inside(self, tag: str) -> dict[str, str] | None:
        return next((values for name, values in self.open if name == tag), None)

    def cell(self, table: str, row: str, column: str, nth: int = 0) -> str:
        """By the headings of row and column; `nth` of columns with the same heading."""
        heads, *rows = self.tables[table]
        index = [i for i, head in enumerate(heads) if head == column][nth]
        return next(cells[index] for cells in rows if cells[0].startswith(row))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def read_whole(tmp_path: Path) -> Any:
    """Writes the page of these contents and reads it."""

    def read_page(found: dict[str, Any]) -> Reader:
        path = write_pilot_page(PilotResult.model_validate(found), tmp_path / "pilot.html")
        assert path == tmp_path / "pilot.html"
        return Reader(path.read_text(encoding="ascii"))

    return read_page


@pytest.fixture
def read(read_whole: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same without its plots, which take most of the time."""
    nothing = Plot("left out", "", None, "left out")
    for name in ("forest_plot", "speed_plot"):
        monkeypatch.setattr(f"moepp_megatron.report.pilot.page.{name}", lambda result: nothing)
    monkeypatch.setattr("moepp_megatron.report.pilot.page.curve_plots", lambda result: [])
    return read_whole


def printed(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    print_pilot(PilotResult.model_validate(found))
    return capsys.readouterr().out


def test_the_answer_stands_on_top(read: Any) -> None:
    page = read(contents())
    here, there, recommended = page.badges
    assert here[0] == "pays"
    assert here[1][:2] == ["At the pilot's scale", "pays"]
    assert "0.861 (0.828 to 0.895) of vanilla's time" in here[1][2]
    assert there[0] == "open"
    assert there[1][:2] == ["At the target (64 h100_sxm)", "undecided"]
    # Vanilla's cost times 0.885, and times the ends of its interval.
    assert "cost to vanilla's loss 47,294 (42,608 to 52,497) against 53,440" in there[1][2]
    assert recommended[1][:2] == ["Recommended", "MoE++ tau 0.75"]
    assert page.text.index(contents()["answer"]) < page.text.index("How sure is that?")


@pytest.mark.parametrize(
    ("answer", "look"), [("pays", "pays"), ("does not pay", "loses"), ("undecided", "open")]
)
def test_every_answer_has_its_word_and_its_look(read: Any, answer: str, look: str) -> None:
    found = contents()
    found["verdicts"][0] |= {"at_pilot": answer, "at_target": answer}
    found["recommended"] = None if answer == "does not pay" else "MoE++ tau 0.75"
    page = read(found)
    assert [(badge[0], badge[1][1]) for badge in page.badges[:2]] == [(look, answer)] * 2
    assert page.cell("verdicts", "MoE++ tau 0.75", "Answer") == answer
    assert page.cell("verdicts", "MoE++ tau 0.75", "Answer", 1) == answer


def test_numbers_are_in_their_cells(read: Any) -> None:
    page = read(contents())
    for column, text in {
        "Validation loss": "3.5031 3.4821 to 3.5241",
        "Difference to vanilla": "+0.0031 -0.0029 to +0.0091",
        "Step": "684.0 ms",
        "Of vanilla's time": "0.855 0.843 to 0.867",
        "Tokens/s": "5,988",
        "FFN share": "59.8%",
        "All-to-all, MB a step": "15.05",
        "Alerts": "dead_expert 2",
    }.items():
        assert page.cell("arms", "MoE++ tau 0.75", column) == text
    assert page.cell("arms", "vanilla", "Difference to vanilla") == "-"
    assert page.cell("arms", "vanilla", "Arm") == "vanilla top-2, 400 steps, 3 seeds"
    assert page.cell("verdicts", "MoE++ tau 0.5", "Token factor") == "1.035 1.005 to 1.066"
    assert page.cell("target", "MoE++ tau 0.5", "Tokens/s/GPU") == "15,854"
    assert page.cell("target", "MoE++ tau 0.5", "Cost") == "43,821"
    assert page.cell("target", "vanilla", "Hours to vanilla's loss") == "334"
    assert page.cell("target", "MoE++ tau 0.75", "Hours to vanilla's loss") == "296 266 to 328"


def test_equal_speed_in_words(read: Any) -> None:
    page = read(contents())
    assert page.cell("speeds", "MoE++ tau 0.75", "Vanilla of the same speed") == (
        "28% vanilla and 72% vanilla top-1"
    )
    sure = page.cell("speeds", "MoE++ tau 0.75", "In words")
    assert "is 0.0411 nats better than vanilla" in sure
    assert "no doubt about the sign" in sure
    assert "speed" not in sure.removeprefix("At the same speed")
    unsure = page.cell("speeds", "MoE++ tau 0.25", "In words")
    assert "cannot tell from no difference" in unsure
    assert "No vanilla arm is as fast" in unsure


def test_energy_is_a_column_where_it_was_measured(read: Any) -> None:
    assert "Energy per token: not measured here." in read(contents()).text
    found = contents()
    found["arms"][3]["energy_per_token_j"] = {"mean": 0.0214}
    page = read(found)
    assert page.cell("arms", "MoE++ tau 0.75", "Energy a token") == "21.4 mJ"
    assert page.cell("arms", "vanilla", "Energy a token") == "not measured here"


def test_the_page_asks_nothing_of_the_network_and_its_pictures_are_described(
    read_whole: Any,
) -> None:
    page = read_whole(contents())
    assert not page.tags & {"script", "link", "iframe"}
    assert len(page.addresses) == len(page.pictures) == 4
    for source, alt in page.pictures:
        start, content = source.split(",", 1)
        assert start == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")
        assert "MoE++ tau 0.75" in alt
        assert re.search(r"\d\.\d", alt)


def test_names_are_escaped(
    read_whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "<script>alert('1')</script> & $\\frac{1}$ [red]\u00e9"
    found = contents()
    found["arms"][3]["arm"]["name"] = found["verdicts"][0]["arm"] = evil
    found["recommended"] = evil
    found["setting"]["config"] = found["setting"]["device"] = evil
    found["setting"]["command"] = evil
    found["arms"][3]["arm"]["overrides"] = [evil]
    found["answer"] = evil
    page = read_whole(found)
    source = (tmp_path / "pilot.html").read_text(encoding="ascii")
    assert "<script" not in source
    assert evil in html.unescape(source)
    assert "script" not in page.tags
    assert page.text.count(evil) > 5
    assert evil in printed(found, capsys)


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    result = PilotResult.model_validate(contents())
    first = write_pilot_page(result, tmp_path / "pilot.html").read_bytes()
    assert write_pilot_page(result, tmp_path / "pilot.html").read_bytes() == first
    assert [one.name for one in tmp_path.iterdir()] == ["pilot.html"]


def test_break_even_is_one_over_the_token_factor(read: Any) -> None:
    found = contents()
    found["verdicts"][0]["token_factor"] = {"mean": 1.25, "low": 1.0, "high": 1.6}
    text = read(found).text
    # 1 / 1.25, and 1 / 1.6 to be sure.
    assert text.count("Step time over vanilla's at most 0.800 by") == 2
    assert text.count("0.625 to be sure of it at 95%") == 2
    # 1 / (1.25 x 0.879) - 1 = -9.0%
    assert "expects a time ratio of 0.879, which is not enough" in text
    # The pilot's loss over the interval's half width times sqrt(seeds + 1).
    assert "Validation loss of 3.5031 after 400 steps , to within 0.0420" in text.replace(
        "steps,", "steps ,"
    )
    # 0.471 log(1 / 0.855) and 0.471 log(1 / 0.879).
    assert "MoE++ is 0.0738 nats or more behind vanilla" in text
    assert "MoE++ is 0.0607 nats or more behind vanilla" in text
    # 0.6 of the measured share, by the guard's own rule.
    assert "FFN share below 35.9%" in text


def test_commands_are_made_of_the_pilots_own(read: Any) -> None:
    text = read(contents()).text
    run = "pilots/first/configs/moepp-tau-0.75-seed-1.yaml"
    assert f"moepp train {run} --nproc 8 --dry-run" in text
    assert f"moepp scale {run} --nproc 8 --out scaling-node" in text
    # Settings of the pilot's CONFIG do not belong to another target.
    assert (
        "moepp plan configs/models/moepp_7b_16_4.yaml moe.tau=0.75 --gpus 64 --gpu h100_sxm "
        "--tokens 1e+12 --price 2.5 --out planned.yaml" in text
    )
    assert "sbatch --nodes=8 slurm/preflight.sbatch" in text
    found = contents()
    found["target"]["name"] = "quickstart"
    assert "moepp plan configs/quickstart.yaml data.path=data/mine moe.tau=0.75 --gpus" in (
        read(found).text
    )


def test_commands_of_the_page_exist() -> None:
    import typer

    from moepp_megatron.cli.main import app
    from moepp_megatron.report.pilot.commands import Commands

    result = PilotResult.model_validate(contents())
    commands = Commands(result, result.arms[3])
    known = typer.main.get_command(app)
    checked = 0
    for line in [*commands.node(), *commands.cluster()]:
        program, name, *rest = line.split()
        if program == "sbatch":
            assert Path(rest[0]).is_file()
        elif program == "moepp":
            options = {o for p in known.commands[name].params for o in p.opts}
            assert {word for word in rest if word.startswith("--")} <= options
            checked += 1
    assert checked == 7


def test_healthy_ranges_are_those_of_the_documentation(read: Any) -> None:
    page = read(contents())
    documented = Path("docs/routing.md").read_text()
    rows = page.tables["watch"][1:]
    assert [row[0] for row in rows][:3] == ["ffn_fraction", "max_ffn_load", "gate_entropy"]
    for metric, _, _, healthy, _ in rows:
        (line,) = re.findall(rf"^\| `{metric}`.*$", documented, re.MULTILINE)
        assert healthy in line.split("|")[3]
    assert page.cell("watch", "ffn_fraction", "This pilot") == "0.598"
    wrong = page.cell("watch", "logit_variance", "Something is wrong")
    assert wrong == "above 100 for 20 steps (logit_explosion)"


def test_a_single_seed_has_no_intervals(
    read_whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = without_intervals(contents())
    found["verdicts"] = [one | {"at_pilot": "undecided"} for one in found["verdicts"]]
    page = read_whole(found)
    assert page.cell("arms", "MoE++ tau 0.75", "Difference to vanilla") == "+0.0031"
    assert page.cell("verdicts", "MoE++ tau 0.75", "Token factor") == "1.007"
    assert "0.861, one seed" in page.pictures[0][1]
    assert "a single seed has no interval: repeat with three seeds" in page.text
    assert "with one seed nobody knows how sure that is" in page.text
    assert "None" not in page.text
    assert "None" not in printed(found, capsys)


def test_without_a_target_the_page_says_how_to_ask_for_one(
    read: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contents() | {"target": None}
    for each in found["verdicts"]:
        each |= {"target_time_to_loss": None, "at_target": None}
    found["setting"]["command"] = "moepp pilot CONFIG --out DIR"
    page = read(found)
    assert "target" not in page.tables
    assert "No target was asked for" in page.text
    assert page.text.count("moepp pilot CONFIG --out DIR --gpus GPUS --gpu h100") == 2
    assert page.badges[1] == (
        "none",
        ["At the target", "no answer", "No target was asked for: --gpus asks for one."],
    )
    assert "sbatch --nodes=N" in page.text
    assert "target" not in printed(found, capsys)


def test_a_model_that_does_not_fit_has_no_numbers(
    read: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contents()
    found["target"]["models"][2] = {
        "arm": "MoE++ tau 0.75",
        "layout": "none is legal",
        "fits": False,
    }
    found["target"]["price_per_hour"] = None
    found["verdicts"][0] |= {"target_time_to_loss": None, "at_target": None}
    page = read(found)
    row = next(r for r in page.tables["target"] if r[0].startswith("MoE++ tau 0.75"))
    assert row[0] == "MoE++ tau 0.75 does not fit the cards"
    assert row[1] == "none is legal"
    assert set(row[2:]) == {"-"}
    assert len(row) == len(page.tables["target"][0])
    assert "Cost" not in page.tables["target"][0]
    assert "no price was given" in page.text
    assert page.badges[1][1][2] == "MoE++ tau 0.75: it or vanilla does not fit the cards."
    assert "none is legal" in printed(found, capsys)


def test_without_a_rival_nothing_is_said_at_equal_speed(read_whole: Any) -> None:
    found = contents() | {"equal_speed": []}
    found["arms"] = [one for one in found["arms"] if one["arm"]["kind"] != "rival"]
    page = read_whole(found)
    assert "speeds" not in page.tables
    assert "nothing can be said at equal speed" in page.text
    assert "there is no line to compare with" in page.text


def test_what_tokens_are_worth_may_be_unknown(
    read_whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contents()
    found["token_value"] = interval(0.02, 0.3)
    nothing = {"token_factor": None, "time_to_loss": None, "target_time_to_loss": None}
    found["verdicts"] = [each | nothing | {"at_pilot": "undecided"} for each in found["verdicts"]]
    page = read_whole(found)
    assert page.cell("verdicts", "MoE++ tau 0.75", "Token factor") == "-"
    assert "nobody can say what tokens are worth" in page.text
    assert "MoE++ falls further behind vanilla than in the pilot" in page.text
    assert "Step time over vanilla's below 1" in page.text
    assert len(page.pictures) == 3
    assert "None" not in page.text
    assert "undecided" in printed(found, capsys)


def test_where_nothing_pays_the_rollout_ends_with_the_pilot(
    read: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contents() | {"recommended": None}
    for each in found["verdicts"]:
        each |= {"at_pilot": "does not pay", "at_target": "does not pay"}
    page = read(found)
    assert page.badges[2][1][1] == "none: stay with vanilla"
    assert "1. Pilot" in page.text
    assert "ends here" in page.text
    assert "2. One node" not in page.text
    assert "moepp slurm" not in page.text
    assert "watch" not in page.tables
    assert "recommended: none: stay with vanilla" in printed(found, capsys)


def test_an_undecided_pilot_says_how_many_seeds_would_decide(read: Any) -> None:
    found = contents()
    found["verdicts"][0] |= {
        "at_pilot": "undecided",
        "time_to_loss": {"mean": 0.95, "low": 0.95 / 1.08, "high": 0.95 * 1.08},
    }
    # log(1.08) = 0.0770 at 3 seeds is a spread of 0.0310; 4 seeds reach 1.591 times it (0.0493),
    # which is below log(1 / 0.95) = 0.0513.
    assert "about 4 would decide" in read(found).text
    found["verdicts"][0]["time_to_loss"] = {"mean": 1.001, "low": 0.9, "high": 1.11}
    assert "more seeds alone would hardly help" in read(found).text


def test_intervals_that_leave_the_plot_are_drawn(read_whole: Any) -> None:
    found = contents()
    found["verdicts"][0]["time_to_loss"] = {"mean": 0.8, "low": 1e-30, "high": 1e30}
    found["verdicts"][1]["time_to_loss"] = {"mean": 7.5, "low": 6.0, "high": 9.0}
    page = read_whole(found)
    assert len(page.pictures) == 4
    assert "7.500 (6.000 to 9.000)" in page.pictures[0][1]


def test_a_pilot_whose_moepp_arms_are_missing(
    read_whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contents() | {"verdicts": [], "equal_speed": [], "recommended": None, "caveats": []}
    found["arms"] = found["arms"][:1]
    found["arms"][0]["curve"] = {"tokens": [], "loss": []}
    page = read_whole(found)
    assert "No MoE++ arm has finished." in page.text
    assert "No arm has a curve" in page.text
    assert "How to go on" not in page.text
    assert "recommended: none" in printed(found, capsys)


def test_the_terminal_shows_the_answer_last(capsys: pytest.CaptureFixture[str]) -> None:
    found = contents()
    text = printed(found, capsys)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert (
        "MoE++ tau 0.75 3.5031 +0.0031 [-0.0029, +0.0091] 684.0 ms 0.855 [0.843, 0.867] 5,988 "
        "59.8% 15.05" in lines
    )
    assert (
        "MoE++ tau 0.75 1.007 [0.978, 1.037] 0.861 [0.828, 0.895] pays 0.885 [0.797, 0.982] "
        "undecided" in lines
    )
    assert "alerts of MoE++ tau 0.75: dead_expert 2" in lines
    assert lines[-2:] == [found["answer"], "recommended: MoE++ tau 0.75"]


def test_a_browser_shows_it_without_complaint(browser: Any, tmp_path: Path) -> None:
    path = write_pilot_page(PilotResult.model_validate(contents()), tmp_path / "pilot.html")
    complaints: list[str] = []
    for width in (1280, 420):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width
        if width == 1280:
            # Tables are whole without scrolling.
            cut = (
                "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
            )
            assert max(page.evaluate(cut)) <= 0
        sizes = "[...document.images].map(i => i.naturalWidth)"
        assert all(size > 0 for size in page.evaluate(sizes))
        page.close()
    assert complaints == []


@pytest.mark.parametrize(
    ("at_pilot", "at_target", "states"),
    [
        ("pays", "undecided", ["done", "next", "later"]),
        ("does not pay", "pays", ["done", "next", "later"]),
        ("undecided", "undecided", ["next: not decided yet", "later", "later"]),
        ("undecided", None, ["next: not decided yet", "later", "later"]),
    ],
)
def test_what_is_next_follows_from_the_answers(
    at_pilot: Any, at_target: Any, states: list[str]
) -> None:
    found = contents()
    found["verdicts"][0] |= {"at_pilot": at_pilot, "at_target": at_target}
    rollout = stages(PilotResult.model_validate(found))
    assert [stage.state for stage in rollout] == states
    assert f"Found: {at_target or at_pilot}" in rollout[0].go_on[0]


def test_two_seeds_give_no_range_for_a_further_run() -> None:
    found = contents()
    for each in found["arms"]:
        each["seeds"] = [1, 2]
    conditions = stages(PilotResult.model_validate(found))[1].go_on
    assert "to within" not in " ".join(conditions)
    assert "So few seeds have no spread to go by" in conditions[1]
