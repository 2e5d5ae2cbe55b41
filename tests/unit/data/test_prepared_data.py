"""The messages about a configuration's data before a run."""

import pytest

from moepp_megatron.config import load_config
from moepp_megatron.config.flops import forward_flops_per_token
from moepp_megatron.config.parameters import count_parameters
from moepp_megatron.data import prepared_data
from moepp_megatron.data.prepared_data import check_data
from tests import ROOT
from tests.refusals import config_error


@pytest.fixture
def check(monkeypatch):
    """The warnings for a configuration on data of a vocabulary."""

    def warnings(config, vocabulary):
        class Prepared:
            vocab_size = vocabulary
            documents = 1000
            split = None
            is_bare = False
            chat = None

        monkeypatch.setattr(prepared_data, "read_manifest", lambda *arguments: Prepared())
        monkeypatch.setattr(prepared_data, "check_start", lambda *arguments: None)
        monkeypatch.setattr(prepared_data, "_check_corpus_tokenizer", lambda *arguments: None)
        return check_data(config)

    return warnings


def config_of(name, *overrides):
    return load_config(ROOT / "configs" / name, ["data.path=anywhere", *overrides])


@pytest.mark.parametrize("name", ["moepp_0.6b_8_4", "moepp_1b_16_4", "moepp_7b_16_4"])
def test_default_tokenizer_is_too_small_for_the_paper_s_models(check, name):
    config = config_of(f"models/{name}.yaml")
    (warning,) = check(config, 4096)
    assert (
        "model.vocab_size (65536) is far larger than the vocabulary of data.path (4096)" in warning
    )
    assert "set model.vocab_size=4096, or prepare the data with --vocab-size 65536" in warning
    assert "\n" not in warning
    assert check(config, 65536) == []
    # Padded to a multiple, as published models are: also where that is much of a small model.
    assert check(config, 65530) == []
    small = ("model.hidden_size=96", "model.ffn_hidden_size=96", "model.vocab_size=512")
    assert check(config_of("quickstart.yaml", *small), 392) == []


def test_the_numbers_are_what_the_smaller_model_saves(check):
    config = config_of("models/moepp_0.6b_8_4.yaml")
    smaller = config_of("models/moepp_0.6b_8_4.yaml", "model.vocab_size=4096")
    totals = [count_parameters(each).total for each in (config, smaller)]
    flops = [forward_flops_per_token(each, each.moe.ffn_share) for each in (config, smaller)]
    (warning,) = check(config, 4096)
    assert f"{(totals[0] - totals[1]) / 1e6:,.1f} of {totals[0] / 1e6:,.1f} M parameters" in warning
    assert f"{1 - flops[1] / flops[0]:.0%} of the FLOPs" in warning
    # The size that is advised holds every token and is a multiple of 128.
    (warning,) = check(config, 4097)
    assert "model.vocab_size=4224," in warning


def test_quickstart_fits_its_corpus(check):
    assert check(config_of("quickstart.yaml"), 4096) == []
    with config_error(r"model\.vocab_size \(4096\) must hold every token"):
        check(config_of("quickstart.yaml"), 4097)


def test_split_may_leave_nothing_to_validation_that_is_never_read(check):
    few = ("data.split='98,0.01,0'",)
    with config_error("gives validation none of the 1000 documents"):
        check(config_of("quickstart.yaml", *few), 4096)
    check(
        config_of("quickstart.yaml", *few, "training.eval_iters=0", "training.eval_interval=0"),
        4096,
    )


def test_folder_that_is_none_is_refused(tmp_path):
    with config_error(r"must be a prepared folder; run: moepp data prepare"):
        check_data(config_of("quickstart.yaml", f"data.path={tmp_path}"))
