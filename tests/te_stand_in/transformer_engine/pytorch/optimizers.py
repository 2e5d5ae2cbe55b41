"""FusedAdam in torch's own operations: AdamW in fp32, its moments kept in fp32 or bf16.

The real one keeps fp16 and FP8 as well, with a scale a tensor; this one refuses what it does not
compute. megatron-core finds no kernels for norms and
scaling here, so that it uses its own functions.
"""

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
        set_grad_none=None,
    ):
        kept = {exp_avg_dtype, exp_avg_sq_dtype}
        assert kept <= {torch.float32, torch.bfloat16}, "the stand-in has no scales"
        assert adam_w_mode
        assert bias_correction
        assert master_weight_dtype is torch.float32
        for unknown in (amsgrad, capturable, set_grad_none):
            assert not unknown, "the stand-in computes without it"
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": bias_correction})
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = master_weights and store_param_remainders
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }

    def initialize_state(self, param, store_param_remainders):
        for name in ("exp_avg", "exp_avg_sq"):
            dtype = self.name_to_dtype_map[name]
            self.state[param][name] = torch.zeros_like(param, dtype=dtype)
        if self.master_weights and store_param_remainders:
            self.state[param]["master_param"] = torch.zeros_like(param, dtype=torch.int16)
        elif self.master_weights:
            self.state[param]["master_param"] = param.clone().detach().float()

    def get_unscaled_state(self, param, state_name):
        """The state itself in fp32, and a copy of it in fp32 where it is bf16."""
        return self.state[param][state_name].float()

    def set_scaled_state(self, param, state_name, unscaled_state):
        assert unscaled_state.dtype is torch.float32
        if state_name not in self.state[param]:
            dtype = self.name_to_dtype_map[state_name]
            self.state[param][state_name] = torch.empty_like(param, dtype=dtype)
        self.state[param][state_name].copy_(unscaled_state)

    def state_dict(self):
        """Moments in fp32, whatever they are kept in."""
        state_dict = super().state_dict()
        state = state_dict["state"]
        for number, param in self._parameters_in(state):
            state[number] = {n: self.get_unscaled_state(param, n) for n in state[number]}
        return state_dict

    def _parameters_in(self, state):
        """Numbers of the parameters that a state has, and the parameters."""
        every = enumerate(param for group in self.param_groups for param in group["params"])
        return [(number, param) for number, param in every if number in state]

    def load_state_dict(self, state_dict):
        """torch's own would give every value the type of its parameter."""
        super().load_state_dict(state_dict)
        state = state_dict["state"]
        for number, param in self._parameters_in(state):
            self.state[param] = {}
            for name, value in state[number].items():
                self.set_scaled_state(param, name, value.float())

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        """The weights move by the moments before these are rounded, as in the fused kernel."""
        assert closure is None
        assert grad_scaler is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    halves = self.store_param_remainders and param.dtype is torch.bfloat16
                    self.initialize_state(param, halves)
                name = "decoupled_grad" if self.use_decoupled_grad else "grad"
                grad = getattr(param, name, None)
                if grad is not None:
                    self._update(group, param, grad.float())

    def _update(self, group, param, grad):
        state = self.state[param]
        beta1, beta2 = group["betas"]
        first = beta1 * state["exp_avg"].float() + (1 - beta1) * grad
        second = beta2 * state["exp_avg_sq"].float() + (1 - beta2) * grad * grad
        denominator = (second / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
        update = first / (1 - beta1 ** group["step"]) / denominator
        main = state.get("master_param", param)
        halves = main.dtype is torch.int16
        # As the kernel: the lower half, and the upper one without its rounding.
        weight = main
        if halves:
            upper = param.view(torch.int16).int() - (main < 0).int()
            weight = (upper * 65536 + main.int() % 65536).view(torch.float32)
        weight -= group["lr"] * (update + group["weight_decay"] * weight)
        if halves:
            lower, upper = weight.view(torch.int16).view(*weight.shape, 2).unbind(-1)
            main.copy_(lower)
            param.view(torch.int16).copy_(upper + (lower < 0))
        elif weight is not param:
            param.copy_(weight)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)


class FusedSGD:
    """megatron-core imports it together with FusedAdam, and nothing here calls it."""
