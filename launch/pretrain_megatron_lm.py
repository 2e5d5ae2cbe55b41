#!/usr/bin/env python3
"""Pretrains a MoE++ model in Megatron-LM's own training loop, with only the megatron-core wheel.

    torchrun --nproc-per-node 8 launch/pretrain_megatron_lm.py MEGATRON_ARGUMENTS --moepp-tau 0.75

Every argument of Megatron-LM works, `--help` lists them; launch/pretrain_megatron_lm.sh is a small
run to start from. This is what Megatron-LM's pretrain_gpt.py does for text, and the two lines
marked MoE++ are all that a `pretrain_*.py` of your own needs.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moepp_megatron.runtime import cpu_support
from moepp_megatron.runtime.optional import quiet

quiet()
# Does nothing where there is a GPU.
cpu_support.install_for_megatron_training()

from megatron.core import datasets, parallel_state  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import (  # noqa: E402
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer  # noqa: E402
from megatron.core.utils import get_batch_on_this_cp_rank  # noqa: E402
from megatron.training import get_args, pretrain  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.utils import get_blend_and_blend_per_split  # noqa: E402

from moepp_megatron.interop.megatron_arguments import moepp_config, refuse  # noqa: E402
from moepp_megatron.interop.megatron_lm import MoEPPModelConfig, add_moepp_arguments  # noqa: E402


def provide_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Training, validation and test sequences, built on every rank."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return tuple(BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, config).build())


# Every rank reads its own batches, so nothing is broadcast.
provide_datasets.is_distributed = True  # type: ignore[attr-defined]


def forward_step(iterator: Iterator[dict[str, Any]], model: torch.nn.Module) -> tuple[Any, Any]:
    """The forward pass of one micro-batch and its loss function."""
    batch = {key: value.cuda(non_blocking=True) for key, value in next(iterator).items()}
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def loss_func(loss_mask: torch.Tensor, token_losses: torch.Tensor) -> tuple[Any, ...]:
    """Sum of the losses [b, s], number of tokens, and both for the log."""
    loss = torch.sum(token_losses.float() * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def spare_the_dataset_compiler() -> None:
    """Let Megatron's `make` in its datasets folder succeed where there is no Makefile.

    Megatron's loop runs it at every start. The wheel brings the compiled helper, but no Makefile.
    """
    if not (Path(datasets.__file__).parent / "Makefile").exists():
        os.environ["GNUMAKEFLAGS"] = "--eval=all:;"


def main() -> None:
    """Parse, check and train."""
    args = parse_and_validate_args(extra_args_provider=add_moepp_arguments)  # MoE++
    model_config = gpt_config_from_args(args, model_config_cls=MoEPPModelConfig)  # MoE++
    try:
        moepp_config(model_config.transformer, args)
    except ValueError as error:
        refuse(error)
    spare_the_dataset_compiler()
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        provide_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
