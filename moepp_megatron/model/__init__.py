"""The model: from configuration to Megatron modules with layout-independent weights.

all_heads_norm.py    RMSNorm of the queries, or of the keys, of all heads of a token at once
attention.py         causal attention for local modules, also under context parallelism
build.py             builds this rank's model chunks
document_attention.py  attention that stays within documents: masks, lengths
gpt.py               a GPT model with MoE++ layers on megatron-core's HybridModel
initialize.py        weights that do not depend on the layout, those in FP8 too
local_modules.py     megatron-core's local modules, made fit for all layouts; latent attention
megatron_config.py   translates the user's configuration into megatron-core's and the MoE++ layer's
multi_token_loss.py  the loss of multi-token prediction
stage.py             a wrapper that the pipeline needs around a bare model chunk
"""
