"""Norms."""

import torch


def rms_norm(x, weight, eps):
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        # device, dtype and sm_margin, by keyword only.
        **kwargs,
    ):
        super().__init__()
        unknown = kwargs.keys() - {"device", "dtype", "sm_margin"}
        assert not unknown, f"Transformer Engine's norms know no {unknown}"
        self.eps = eps
        dtype = params_dtype or kwargs.get("dtype")
        self.weight = torch.nn.Parameter(
            torch.ones(normalized_shape, dtype=dtype, device=kwargs.get("device"))
        )
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, input):
        # Of a view Transformer Engine makes and keeps a copy.
        return rms_norm(input.contiguous(), self.weight, self.eps)


class LayerNorm(RMSNorm):
    def forward(self, input):
        raise NotImplementedError("the stand-in knows only RMSNorm")
