import random
import shutil

import pytest
import torch

from moepp_megatron.data.datasets import build_datasets
from moepp_megatron.data.prepare import PrepareSettings, prepare
from moepp_megatron.data.split import check_split, document_ranges
from moepp_megatron.data.tokenizer import EOD_TOKEN, Tokenizer
from moepp_megatron.model.document_attention import document_numbers
from tests.refusals import config_error

SEQUENCE_LENGTH = 32
SEED = 1234


@pytest.fixture
def build(prepared, tokenizer, tmp_path):
    def build_with(split="80,20,0", num_samples=(8, 4, 0), **arguments):
        arguments.setdefault("cache_dir", tmp_path / "cache")
        return build_datasets(
            prepared, tokenizer, SEQUENCE_LENGTH, split, SEED, num_samples, **arguments
        )

    return build_with


def unshuffled_text(dataset, tokenizer):
    """The text of all samples, put into the order in which they were cut from the documents."""
    order = sorted(range(len(dataset)), key=lambda i: int(dataset.shuffle_index[i]))
    return tokenizer.decode([int(token) for i in order for token in dataset[i]["tokens"]])


def test_samples_are_the_texts_across_document_boundaries(build, tokenizer, texts):
    (train, validation, test) = build(split="1,0,0")
    assert validation is None
    assert test is None
    documents = unshuffled_text(train, tokenizer).split(EOD_TOKEN)
    complete, cut = documents[:-1], documents[-1]
    # The last sample ends within a document; what follows it is too short for a sample.
    assert len(complete) >= len(texts) - 3
    assert len(set(complete)) == len(complete)
    assert set(complete) <= set(texts)
    assert any(text.startswith(cut) for text in texts)


def test_sample_fields(build):
    train, _, _ = build()
    for sample in (train[0], train[len(train) - 1]):
        assert sorted(sample) == ["labels", "loss_mask", "position_ids", "tokens"]
        assert {value.shape for value in sample.values()} == {(SEQUENCE_LENGTH,)}
        assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert torch.equal(sample["loss_mask"], torch.ones(SEQUENCE_LENGTH))
        assert torch.equal(sample["position_ids"], torch.arange(SEQUENCE_LENGTH))


def test_train_and_validation_are_disjoint(build, tokenizer, texts):
    train, validation, _ = build()
    in_train = unshuffled_text(train, tokenizer)
    in_validation = unshuffled_text(validation, tokenizer).split(EOD_TOKEN)[:-1]
    assert len(in_validation) >= 5
    assert set(in_validation) <= set(texts)
    assert not any(text in in_train for text in in_validation)
    # Texts differ enough for this to mean something: the same test finds train's own texts.
    assert all(text in in_train for text in in_train.split(EOD_TOKEN)[:-1])


def test_document_boundary_options(build, tokenizer):
    train, _, _ = build(reset_position_ids=True, eod_mask_loss=True)
    boundaries = 0
    for sample in (train[i] for i in range(len(train))):
        tokens, positions = sample["tokens"], sample["position_ids"]
        document, expected = 0, []
        for token in tokens.tolist():
            expected.append(document)
            document += token == tokenizer.eod
        document_of = torch.tensor(expected)
        for start in (document_of == document_of[:, None]).int().argmax(1).unique():
            assert positions[start] == 0
        assert torch.equal(document_numbers(tokens[None], tokenizer.eod)[0], document_of)
        assert torch.equal(sample["loss_mask"] == 0, tokens == tokenizer.eod)
        boundaries += document
    assert boundaries > 10


def test_cache_lies_in_the_folder_and_is_reused(prepared, tokenizer, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(prepared, folder)

    def build():
        build_datasets(folder, tokenizer, 16, "80,20,0", SEED, (8, 4, 0))
        return {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*.npy")}

    first = build()
    assert len(first) == 6
    assert build() == first


def test_cache_outside_does_not_outlive_a_replaced_dataset(corpus_file, tmp_path):
    tokens = []
    for seed in (1, 2):
        settings = PrepareSettings(300, workers=1, seed=seed, force=True)
        prepare([str(corpus_file)], tmp_path / "out", settings)
        tokenizer = Tokenizer.load(tmp_path / "out")
        arguments = (tmp_path / "out", tokenizer, 32, "1,0,0", SEED, (8, 0, 0))
        shared = build_datasets(*arguments, cache_dir=tmp_path / "cache")[0]
        fresh = build_datasets(*arguments, cache_dir=tmp_path / f"fresh-{seed}")[0]
        for i in range(len(shared)):
            assert torch.equal(shared[i]["tokens"], fresh[i]["tokens"])
        tokens.append(shared[0]["tokens"])
    assert not torch.equal(*tokens)


def test_a_cache_that_cannot_be_used_is_named(build, tmp_path):
    build(cache_dir=tmp_path / "cache")
    for file in (tmp_path / "cache").rglob("*train-shuffle_index.npy"):
        file.write_bytes(file.read_bytes()[:-4])  # as a run leaves it that is killed
    with config_error(rf"data\.cache \({tmp_path}/cache/.*damaged file .*remove"):
        build(cache_dir=tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with config_error(r"data\.cache .* cannot be written \(Not a directory\)"):
        build(cache_dir=tmp_path / "file")


def test_missing_or_damaged_folder(prepared, tokenizer, tmp_path):
    arguments = (tokenizer, 32, "1,0,0", SEED, (8, 0, 0))
    with config_error(r"data\.path .* run: moepp data prepare"):
        build_datasets(tmp_path, *arguments)
    folder = tmp_path / "dataset"
    shutil.copytree(prepared, folder)
    (folder / "corpus.idx").unlink()
    with config_error(r"data\.path .* is damaged"):
        build_datasets(folder, *arguments)


def test_other_tokenizer_is_refused(prepared, tmp_path):
    from moepp_megatron.data.tokenizer import train_tokenizer

    with config_error(r"data\.tokenizer \(257 tokens, EOD 0\) must be the one"):
        build_datasets(prepared, train_tokenizer(["x"], 257), 32, "1,0,0", SEED, (8, 0, 0))


class Documents:
    """The part of a manifest that `check_split` reads."""

    def __init__(self, documents, split=None):
        self.documents, self.split = documents, split


@pytest.mark.parametrize("split", ["", "98,2", "1,1,1,1", "a,b,c", "-1,1,1", "0,0,0", "1,,2"])
def test_malformed_split_is_refused(split):
    with config_error(r"data\.split .* must be three weights"):
        check_split(split, Documents(100))


def test_split_without_documents_is_refused():
    check_split("98,2,0", Documents(100))
    check_split("1, 0, 0", Documents(1))
    check_split("1e2,0,0", Documents(1))
    for split in ("98,2,0", None):
        with config_error(r"data\.split \(98,2,0\) gives validation none of the 5"):
            check_split(split, Documents(5))
    assert check_split("1e1,1e1,0", Documents(4)) == check_split("10.0,10,0", Documents(4))
    with config_error("gives train none of the 1"):
        check_split("1,98,1", Documents(1))


@pytest.mark.parametrize("weights", [(98, 2, 0), (94, 1, 5), (1, 0, 0), (7, 3, 0), (90, 1, 9)])
@pytest.mark.parametrize("documents", [20, 5, 49, 1000])
def test_validation_may_be_empty_where_it_is_not_read(weights, documents):
    """Training and test keep their documents to the last one."""
    split = ",".join(map(str, weights))
    train, validation, test = document_ranges(split, documents)
    is_empty = validation is not None and validation[0] == validation[1]
    if is_empty:
        with config_error("gives validation none"):
            check_split(split, Documents(documents))
    if test is not None and test[0] == test[1]:
        with config_error("gives test none"):
            check_split(split, Documents(documents), validates=False)
        return
    checked = check_split(split, Documents(documents), validates=False)
    expected = [train, None if is_empty else validation, test]
    assert document_ranges(checked, documents) == expected


def test_split_is_the_corpus_s_own_unless_one_is_set():
    corpus = Documents(10, "7,3,0")
    assert check_split(None, corpus) == check_split("7,3,0", corpus)
    assert check_split("1,1,0", corpus) == check_split("1,1,0", Documents(10))


@pytest.mark.parametrize("seed", range(3))
def test_ranges_of_documents_are_megatron_s(seed):
    from megatron.core.datasets import blended_megatron_dataset_config as megatron

    generator = random.Random(seed)
    for _ in range(2000):
        weights = [generator.choice([0, 1, 98, generator.random(), generator.randrange(500)])]
        weights += [generator.choice([0, 1, generator.random() / 9]) for _ in range(2)]
        if not sum(weights):
            continue
        split = ",".join(f"{weight:.9f}" for weight in weights)
        documents = generator.choice([1, 7, 100, generator.randrange(10**7)])
        bounds = megatron.convert_split_vector_to_split_matrix(
            megatron.parse_and_normalize_split(split)
        )
        expected = [
            None if each is None else tuple(int(round(end * float(documents))) for end in each)
            for each in bounds
        ]
        assert document_ranges(split, documents) == expected
