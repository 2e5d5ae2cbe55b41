"""examples/finetune_lora.py on an exported run."""

import json

from tokenizers import Tokenizer, pre_tokenizers

from tests.interop.checkpoints import load_tensors, mcore_to_hf
from tests.interop.models import settings
from tests.interop.test_export import save_and_compute
from tests.interop.test_finetuning import needs_peft


def run_example(export, out):
    """The losses of the example."""
    from examples.finetune_lora import finetune

    return finetune(export, "a b c d e c b a " * 40, out, steps=25)


def write_word_tokenizer(path):
    """The tokenizer of the export, which takes a text apart at its spaces."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


@needs_peft
def test_adapters_learn_a_text(ranks, plain, tmp_path):
    ranks(1).run(save_and_compute, settings(moe={"two_layer_gate": True}), tmp_path / "checkpoints")
    mcore_to_hf(tmp_path / "checkpoints", tmp_path / "hf")
    write_word_tokenizer(tmp_path / "hf/tokenizer.json")
    losses = plain(run_example, tmp_path / "hf", tmp_path / "adapter")
    assert losses[-1] < 0.8 * losses[0]
    adapters = load_tensors(tmp_path / "adapter")
    for part in ("gate.wg.0", "gate.wg.2", "gate_map", "q_proj", ".ffn"):
        assert any(part in name for name in adapters), part
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert "q_proj" in {name.rpartition(".")[2] for name in saved["target_modules"]}
    assert {"ffn.down_proj", "gate_map.weight"} <= set(saved["target_parameters"])
