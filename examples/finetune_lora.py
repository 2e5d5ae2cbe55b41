#!/usr/bin/env python3
"""Fine-tunes an exported model on a text, with LoRA adapters, in transformers.

    moepp convert mcore-to-hf runs/quickstart export
    .venv/bin/python examples/finetune_lora.py export TEXT_FILE adapter

Needs transformers and peft, which ./launch/env.sh --dev installs. Nothing of this package is
imported: the export brings its modelling code. The balance loss is part of the loss, so that
routers stay balanced and the FFN share stays where it was.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def rows_of(text: str, tokenizer: object, length: int) -> Tensor:
    """The text as token ids [rows, length]; a rest is left out."""
    ids = torch.tensor(tokenizer(text)["input_ids"])  # type: ignore[operator]
    rows = len(ids) // length
    if rows == 0:
        raise SystemExit(f"the text has {len(ids)} tokens and must have {length} or more")
    return ids[: rows * length].view(rows, length)


def finetune(export: Path, text: str, out: Path, steps: int, batch: int = 2) -> list[float]:
    """Train adapters and save them.

    Returns:
        The loss of each step in nats, the weighted balance loss included.
    """
    torch.manual_seed(0)
    # The export's own code computes the model; read it as you would read other code.
    base = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    length = min(128, base.config.max_position_embeddings)
    rows = rows_of(text, tokenizer, length)
    # Attention is of linear modules; FFN experts, routers and constant experts are parameters.
    weights = ["ffn.gate_up_proj", "ffn.down_proj", "wg.weight", "gate_map.weight"]
    # Of two-layer gates.
    weights += ["wg.0.weight", "wg.2.weight"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", target_parameters=weights)
    model = get_peft_model(base, lora)
    model.print_trainable_parameters()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    model.train()
    losses = []
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (batch,))]
        loss = model(input_ids=ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(out)
    return losses


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("export", type=Path, help="folder from moepp convert mcore-to-hf")
    parser.add_argument("text", type=Path, help="file to train on")
    parser.add_argument("out", type=Path, help="folder for the adapters")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")
    losses = finetune(given.export, text, given.out, given.steps)
    print(f"loss {losses[0]:.4f} in step 1, {losses[-1]:.4f} in step {len(losses)}")


if __name__ == "__main__":
    main()
