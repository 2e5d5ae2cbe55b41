"""Checkpoints in and out: the released MoE++ format, upcycling, scoring, other zero-expert models.

bridge/                 MoE++ models in Megatron-Bridge and NeMo-RL
checkpoint_tensors.py   reads and writes tensors of our checkpoints, one at a time
convert.py              every conversion by the name that `moepp convert` gives it
from_megatron_lm.py     converts a checkpoint of Megatron-LM's own training loop to ours
generate.py             `moepp generate`: what it is asked to do, and as a function
hf_config.py            converts between our configuration and a Hugging Face `config.json`
hf_source.py            a Hugging Face checkpoint folder: configuration, and tensors one by one
expressible.py          what a format cannot express, as rows of settings
vanilla.py              models with zero experts as the MoE models that llama.cpp has
megatron_arguments.py   MoE++ settings of a Megatron-LM run: `--moepp-*`
megatron_lm.py          MoE++ in Megatron-LM's own training loop, `megatron.training`, unmodified
model_card.py           the model card of an exported model
tensor_rules.py         rules by which tensors of a Hugging Face checkpoint and of ours correspond
score.py                `moepp score`: what it is asked to do, and as a function
scoring.py              log-probabilities of sequences, continuations of prompts, in any layout
stage.py                a stage of a MoE++ model in the loops of others
to_hf.py                converts a checkpoint of ours to a Hugging Face checkpoint, tensor by tensor
to_mcore.py             converts a Hugging Face checkpoint to ours, tensor by tensor
to_megatron_lm.py       converts a checkpoint of ours to one that Megatron-LM's own loop loads
upcycle.py              turns checkpoints of other models into MoE++ models that compute the same
upcycle_sources.py      the kinds of models that can be upcycled, with the names of their tensors
vllm/                   exports as a model of vLLM's own
zeda.py                 ZEDA's format both ways: Qwen3-MoE with zero experts

All conversions stream: no function builds a model or holds more than a few tensors, except `score`
and `generate`, which run a model. `megatron_lm` and `megatron_arguments` put MoE++ into
Megatron-LM's own training loop.
"""
