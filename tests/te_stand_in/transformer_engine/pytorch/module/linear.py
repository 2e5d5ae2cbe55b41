"""Linear layers, alone, with a norm before, and many at once."""

import torch
from transformer_engine.pytorch.module.base import (
    TransformerEngineBaseModule,
    gemm,
    needs_fp8_sizes,
)
from transformer_engine.pytorch.module.norm import rms_norm
from transformer_engine.pytorch.quantization import get_align_size_for_quantization


class _Sharded(TransformerEngineBaseModule):
    """A weight of which each tensor-parallel rank has its rows or its columns."""

    def shard(self, in_features, out_features, parallel_mode, tp_size, tp_group, sequence, *weight):
        self.in_features, self.out_features = in_features, out_features
        self.parallel_mode, self.tp_size, self.tp_group = parallel_mode, tp_size, tp_group
        self.sequence_parallel = sequence and tp_size > 1
        columns = tp_size if parallel_mode == "row" else 1
        rows = tp_size if parallel_mode == "column" else 1
        self.add_weight("weight", out_features // rows, in_features // columns, *weight)

    def prepared(self, inp):
        return inp

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        self.begin(inp, [inp.shape[:-1].numel()])
        if self.fp8:
            needs_fp8_sizes(inp, self.weight)
        return self.multiply(self.prepared(inp))

    def multiply(self, inp):
        """The product, with what tensor-parallel ranks exchange before it or after it."""
        if self.tp_size == 1:
            return gemm(inp, self.weight, self.fp8)
        from megatron.core.tensor_parallel import mappings

        group, sequence = self.tp_group, self.sequence_parallel
        if self.parallel_mode == "column":
            if sequence:
                return gemm(inp, self.weight, self.fp8, group)
            inp = mappings.copy_to_tensor_model_parallel_region(inp, group=group)
            return gemm(inp, self.weight, self.fp8)
        out = gemm(inp, self.weight, self.fp8)
        if sequence:
            return mappings.reduce_scatter_to_sequence_parallel_region(out, group=group)
        return mappings.reduce_from_tensor_model_parallel_region(out, group=group)


class Linear(_Sharded):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__(bias, name, delay_wgrad_compute)
        self.save_original_input = save_original_input
        split = parallel_mode, tp_size, tp_group, sequence_parallel
        self.shard(in_features, out_features, *split, params_dtype, device, init_method)


class LayerNormLinear(_Sharded):
    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        parameters_split=None,
        zero_centered_gamma=False,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_wgrad=False,
        ub_bulk_dgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        name=None,
    ):
        super().__init__(bias, name, delay_wgrad_compute)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, dtype=params_dtype, device=device)
        )
        split = parallel_mode, tp_size, tp_group, sequence_parallel
        self.shard(in_features, out_features, *split, params_dtype, device, init_method)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def prepared(self, inp):
        return rms_norm(inp, self.layer_norm_weight, self.eps)


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        ub_overlap_rs=False,
        ub_overlap_ag=False,
        ub_name=None,
        delay_wgrad_compute=False,
        save_original_input=False,
        single_grouped_weight=False,
        single_grouped_bias=False,
        name=None,
        use_grouped_tensor=None,
    ):
        super().__init__(bias, name, delay_wgrad_compute)
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        self.save_original_input = save_original_input
        self.single_grouped_weight, self.single_grouped_bias = False, False
        weight = out_features, in_features, params_dtype, device, init_method
        for i in range(num_gemms):
            self.add_weight(f"weight{i}", *weight)

    def forward(self, inp, m_splits, is_first_microbatch=None, out=None, dgrad_out=None):
        self.begin(inp, m_splits)
        # The extension takes numbers of the host.
        assert all(type(rows) is int for rows in m_splits), m_splits
        if len(m_splits) != self.num_gemms or sum(m_splits) != inp.shape[0]:
            raise ValueError(
                f"splits {m_splits} do not fit {self.num_gemms} GEMMs, {inp.shape} rows"
            )
        if self.fp8:
            align = get_align_size_for_quantization(self.fp8_meta["recipe"])
            if any(rows % align for rows in m_splits):
                raise RuntimeError(f"FP8 GEMM with rows {m_splits}, not multiples of {align}")
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        parts = zip(inp.split(list(m_splits)), weights, strict=True)
        return torch.cat([gemm(x, weight, self.fp8) for x, weight in parts])
