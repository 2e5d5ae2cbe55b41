"""Attention between the projections, causal: [s, b, heads, channels], packed without b."""

import torch
from torch._subclasses.fake_tensor import FakeTensor


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        bottom_right_diagonal=None,
        softcap=0.0,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
        name=None,
    ):
        super().__init__()
        self.softmax_scale, self.cp_group = softmax_scale, cp_group

    def forward(
        self,
        query_layer=None,
        key_layer=None,
        value_layer=None,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        bottom_right_diagonal=None,
        softcap=None,
        checkpoint_core_attention=False,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        alibi_slopes=None,
        fast_zero_fill=True,
        inference_params=None,
        pad_between_seqs=None,
        fp8_output=False,
        bf16_backward=False,
        num_splits=1,
        score_mod=None,
        score_mod_bprop=None,
        score_mod_tensors=None,
        score_mod_bprop_tensors=None,
        qkv_layer=None,
        kv_layer=None,
        qkv_interleave_dim=-3,
        thd_attention_policies=None,
        thd_attention_policy_dispatch="auto",
    ):
        if qkv_format == "thd":
            assert attn_mask_type == "padding_causal"
            assert cu_seqlens_q.dtype is torch.int32
            ends = cu_seqlens_q.tolist()
            assert ends == cu_seqlens_kv.tolist()
            assert ends[-1] == len(query_layer)
            lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]
            assert 0 < max(lengths) <= max_seqlen_q == max_seqlen_kv
            layers = (x.unsqueeze(1).split(lengths) for x in (query_layer, key_layer, value_layer))
            return torch.cat([self._causal(*parts) for parts in zip(*layers, strict=True)])[:, 0]
        assert attn_mask_type == "causal"
        if self.cp_group is not None and self.cp_group.size() > 1:
            assert isinstance(query_layer, FakeTensor), "with context parallelism only shapes fit"
        return self._causal(query_layer, key_layer, value_layer)

    def _causal(self, *layers):
        # Strides of views that no layout fits: copies are made, and those are kept.
        layers = (x.contiguous() for x in layers)
        q, k, v = (x.permute(1, 2, 0, 3) for x in layers)
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return output.permute(2, 0, 1, 3).flatten(2)
