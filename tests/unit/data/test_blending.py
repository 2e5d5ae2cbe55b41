"""Samples of several folders, stage by stage."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from moepp_megatron.config.blends import Blend, Folder
from moepp_megatron.data.blending import plan_draws
from moepp_megatron.data.datasets import build_datasets, build_validation_sets
from moepp_megatron.data.loader import batches
from moepp_megatron.data.samples import SOURCES, source_names
from moepp_megatron.data.tokenizer import Tokenizer
from tests.refusals import config_error
from tests.unit.data.letters import prepare_letters
from tests.unit.training.conftest import config_of

LENGTH = 16
SPLIT = "80,20,0"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By letters: two folders of one source, one of two."""
    folder = tmp_path_factory.mktemp("letters")
    return {
        "a": prepare_letters(folder, "web", crawl="a"),
        "b": prepare_letters(folder, "code", all="b"),
        "cd": prepare_letters(folder, "math", proofs="c", tables="d"),
    }


def blend(folders, first=0, **weights):
    total = sum(weights.values())
    parts = [Folder(f"[{n}].path", folders[n], w / total) for n, w in weights.items()]
    return Blend(f"from {first}", first, tuple(parts))


def open_blends(folders, cache, *blends, samples=(40, 0, 0)):
    tokenizer = Tokenizer.load(folders["a"])
    return build_datasets(blends, tokenizer, LENGTH, SPLIT, 7, samples, cache_dir=cache)


def places(dataset):
    """Folder and sample of each sample."""
    found = [dataset.locate(index) for index in range(len(dataset))]
    return [(Path(each.dataset.path_prefix).parent.name, sample) for each, sample in found]


def test_shares_are_the_weights(folders, tmp_path):
    train, validation, _ = open_blends(
        folders, tmp_path, blend(folders, a=3, b=1), samples=(40, 8, 0)
    )
    assert len(train) == 40
    assert Counter(name for name, _ in places(train)) == {"web": 30, "code": 10}
    assert Counter(name for name, _ in places(validation)) == {"web": 6, "code": 2}
    # In every part of the run, not just in all of it.
    for start in range(0, 40, 8):
        assert Counter(name for name, _ in places(train)[start : start + 8])["code"] == 2


def test_a_stage_continues_where_the_folder_was_left(folders, tmp_path):
    stages = [blend(folders, a=3, b=1), blend(folders, 16, b=1), blend(folders, 24, a=1, cd=1)]
    train, _, _ = open_blends(folders, tmp_path, *stages)
    found = places(train)
    assert len(set(found)) == 40
    assert {name for name, _ in found[16:24]} == {"code"}
    assert Counter(name for name, _ in found[24:]) == {"web": 8, "math": 8}
    for folder in ("web", "code", "math"):
        samples = [sample for name, sample in found if name == folder]
        assert samples == sorted(samples)
        # A stage may leave out what it could have drawn by rounding.
        assert samples[-1] < len(samples) + 2 * len(stages)
    assert train.repeats_from == 24


def test_planned_room_is_enough_for_any_shares():
    from megatron.core.datasets import helpers

    random = np.random.RandomState(3)
    for _ in range(300):
        shares = random.dirichlet(np.full(random.randint(2, 7), 0.4))
        shares = np.maximum(shares, 1e-9) / np.maximum(shares, 1e-9).sum()
        size = int(random.randint(1, 500))
        parts = tuple(Folder("", Path(str(i)), float(share)) for i, share in enumerate(shares))
        _, needed = plan_draws([Blend("", 0, parts)], size)
        index, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers.build_blending_indices(index, samples, shares.tolist(), len(shares), size, False)
        drawn = np.bincount(index, minlength=len(shares))
        assert (drawn <= list(needed.values())).all()


def test_one_folder_draws_as_without_a_blend(folders, tmp_path):
    alone, _, _ = build_datasets(
        folders["a"], Tokenizer.load(folders["a"]), LENGTH, SPLIT, 7, (40, 0, 0), cache_dir=tmp_path
    )
    staged, _, _ = open_blends(folders, tmp_path, blend(folders, a=1), blend(folders, 24, b=1))
    for index in range(24):
        assert torch.equal(staged[index]["tokens"], alone[index]["tokens"])


def test_each_token_has_its_source_over_stages(folders, tmp_path):
    stages = [blend(folders, a=1, cd=1), blend(folders, 16, b=1, cd=1)]
    train, _, _ = open_blends(folders, tmp_path, *stages)
    assert source_names(train) == ("web", "math/proofs", "math/tables", "code")
    tokenizer = Tokenizer.load(folders["a"])
    letters = [tokenizer.encode(letter)[0] for letter in "acdb"]
    seen = Counter()
    for batch in batches(train, 0, 4, 0, 1, 8, vocab_size=257):
        for index, letter in enumerate(letters):
            is_letter = batch["tokens"] == letter
            assert (batch[SOURCES][is_letter] == index).all()
            seen[index] += int(is_letter.sum())
    assert min(seen.values()) > 50, "every source is there"


def test_folders_above_the_limit_tell_no_sources(folders, tmp_path, monkeypatch):
    """Also where one of them, and not the other, says which source its documents are of."""
    monkeypatch.setattr("moepp_megatron.data.datasets.MAX_SOURCES", 1)
    train, _, _ = open_blends(folders, tmp_path, blend(folders, a=1, cd=1))
    assert source_names(train) == ()
    assert SOURCES not in next(batches(train, 0, 4, 0, 1, 8, vocab_size=257))


def test_a_stage_added_on_resuming_leaves_what_was_drawn(folders, tmp_path):
    """As long as no folder is read more than once, whatever is planned for later."""
    first = blend(folders, a=3, b=1)
    short, _, _ = open_blends(folders, tmp_path, first, samples=(16, 0, 0))
    planned, _, _ = open_blends(folders, tmp_path, first, blend(folders, 16, b=1, cd=1))
    for index in range(16):
        assert torch.equal(short[index]["tokens"], planned[index]["tokens"])


def test_a_stage_behind_the_end_is_not_opened(folders, tmp_path):
    missing = Blend("late", 40, (Folder("late", tmp_path / "missing"),))
    train, _, _ = open_blends(folders, tmp_path, blend(folders, a=1, b=1), missing)
    assert len(train) == 40


def test_a_damaged_token_is_named(folders, tmp_path):
    damaged = shutil.copytree(folders["b"], tmp_path / "damaged")
    content = np.fromfile(damaged / "corpus.bin", np.uint16)
    content[content == Tokenizer.load(damaged).encode("b")[0]] = 300
    content.tofile(damaged / "corpus.bin")
    mine = folders | {"b": damaged}
    train, _, _ = open_blends(mine, tmp_path, blend(mine, a=1, b=1))
    with config_error(rf"\[b\]\.path \({damaged}\) .* document \d+ is 300"):
        list(batches(train, 0, 4, 0, 1, 8, vocab_size=257))


def test_validation_sets(folders, tmp_path):
    """A folder that is trained on gives its validation part, any other all of it."""
    paths = {"seen": str(folders["a"]), "other": str(folders["cd"])}
    data = {"path": str(folders["a"]), "validation": paths, "split": SPLIT, "cache": str(tmp_path)}
    config = config_of(data=data, model={"seq_length": LENGTH}, training={"seed": 7})
    tokenizer = Tokenizer.load(folders["a"])
    sets = build_validation_sets(config, tokenizer, 8)
    assert {name: len(each.indices) for name, each in sets.items()} == {"seen": 12, "other": 120}
    assert sets["seen"].indices[0] == 48
    assert SOURCES not in sets["other"][0]
    assert build_validation_sets(config, tokenizer, 0) == {}
