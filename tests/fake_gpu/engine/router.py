"""The fused router of Transformer Engine's extension: shapes, and what router.cpp checks."""

import torch

from tests.fake_gpu.engine.functions import FUNCTIONS, function, new


def _tokens_and_experts(tensor, topk):
    assert tensor.is_contiguous(), "must be contiguous"
    assert tensor.numel() > 0, f"no tokens: {tuple(tensor.shape)}"
    assert 0 < topk <= tensor.shape[-1], f"topk {topk} of {tensor.shape[-1]}"


@function
def fused_topk_with_score_function_fwd(logits, topk, score_function, expert_bias):
    _tokens_and_experts(logits, topk)
    assert score_function in ("softmax", "sigmoid", "sqrtsoftplus"), score_function
    if expert_bias is not None:
        assert score_function != "softmax", "no bias with softmax"
        assert expert_bias.dtype == torch.float32
    shape = logits.shape
    return new(shape, logits.dtype), new(shape, torch.bool), new(shape, torch.float32)


@function
def fused_topk_with_score_function_bwd(grad_probs, grad_logits, topk):
    _tokens_and_experts(grad_probs, topk)
    assert grad_logits.is_contiguous()


@function
def fused_score_for_moe_aux_loss_fwd(logits, topk):
    _tokens_and_experts(logits, topk)
    shape = logits.shape
    return new(shape, torch.float32), new(shape, torch.bool), new(shape, torch.float32)


@function
def fused_score_for_moe_aux_loss_bwd(grad_scores, grad_logits, topk):
    _tokens_and_experts(grad_scores, topk)
    assert grad_logits.is_contiguous()


@function
def fused_moe_aux_loss_fwd(probs, total_num_tokens):
    if isinstance(total_num_tokens, torch.Tensor):
        assert total_num_tokens.is_cuda
        assert total_num_tokens.dtype == torch.int64
        assert total_num_tokens.numel() == 1
    return new([], probs.dtype), new([2], torch.float32)


FUNCTIONS["fused_moe_aux_loss_fwd_graph_safe"] = fused_moe_aux_loss_fwd


@function
def fused_moe_aux_loss_bwd(num_rows, num_cols, grad_aux_loss):
    return new([num_rows, num_cols], grad_aux_loss.dtype)
