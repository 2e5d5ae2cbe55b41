"""`moepp data show`: counts, a sample, and the blend as it is drawn."""

from collections import Counter
from pathlib import Path

import pytest

from moepp_megatron.config.blends import Folder, blends_of, folders_of
from moepp_megatron.data.datasets import build_datasets
from moepp_megatron.data.show import Corpus, planned_shares
from moepp_megatron.data.tokenizer import Tokenizer
from tests.refusals import config_error
from tests.unit.data.letters import prepare_letters
from tests.unit.training.conftest import config_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    return [prepare_letters(folder, "web", crawl="a"), prepare_letters(folder, "code", all="b")]


def staged(folders):
    web, code = map(str, folders)
    data = {
        "blend": [{"path": web, "weight": 3.0}, {"path": code, "weight": 1.0}],
        "stages": [{"from_step": 6, "blend": [{"path": code, "weight": 1.0}]}],
        "split": "80,20,0",
    }
    training = {"train_iters": 8, "global_batch_size": 4, "micro_batch_size": 4}
    model = {"seq_length": 16, "vocab_size": 512}
    return config_of(data=data, training=training, model=model)


def test_shares_are_those_drawn(folders, tmp_path):
    config = staged(folders)
    blends = blends_of(config)
    corpora = {real: Corpus(folder) for real, folder in folders_of(blends).items()}
    *stages, whole = planned_shares(config, corpora, 32)
    tokenizer = Tokenizer.load(folders[0])
    train, _, _ = build_datasets(
        blends, tokenizer, 16, "80,20,0", 7, (32, 0, 0), cache_dir=tmp_path
    )
    drawn = [Path(train.locate(i)[0].dataset.path_prefix).parent for i in range(32)]
    for stage in (*stages, whole):
        part = drawn[stage.first_step * 4 : stage.last_step * 4]
        counts = Counter(part)
        for share in stage.shares:
            assert counts[share.path] == round(share.share * len(part))
            assert share.tokens == pytest.approx(counts[share.path] * 16, abs=16)
    assert [(each.first_step, each.last_step) for each in stages] == [(0, 6), (6, 8)]
    # Over all that the folder has to train on, as megatron-core counts it.
    dataset = train.locate(0)[0]
    tokens = int(dataset.dataset.sequence_lengths[dataset.indices].sum())
    assert whole.shares[0].epochs == pytest.approx(whole.shares[0].tokens / tokens)


def test_documents_are_the_corpus_s(prepared, tokenizer, texts):
    corpus = Corpus(Folder("DIR", prepared))
    found = {tokenizer.decode(corpus.document(i).tolist()) for i in range(len(texts))}
    assert found == {text + tokenizer.eod_token for text in texts}
    with config_error(r"--document \(60\) must be from 0 to 59"):
        corpus.document(60)


def test_the_command(folders, tmp_path, moepp):
    file = tmp_path / "config.yaml"
    file.write_text(staged(folders).to_yaml())
    code, out, err = moepp("data", "show", file, "training.train_iters=12")
    assert code == 0, err
    for text in ("data.blend: steps 1 to 6", "data.stages[0]: steps 7 to 12", "the run: steps 1"):
        assert text in out
    assert "75.0%" in out
    code, out, err = moepp("data", "show", folders[0], "--tokens", "5")
    assert code == 0, err
    assert "60 documents" in out
    ids = Corpus(Folder("DIR", folders[0])).document(0).tolist()
    assert Tokenizer.load(folders[0]).decode(ids[:5]) in out
    assert f"5 of {len(ids)} tokens" in out
    assert moepp("data", "show", folders[0], "moe.tau=1")[0] == 2
    assert "DIR" in moepp("data", "show", tmp_path / "none")[2]
