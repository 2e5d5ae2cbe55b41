"""A decoder with latent attention and MoE++ layers in plain PyTorch, for one process.

Written for the reader. Shape suffixes: S tokens of a sequence, B sequences, T = S B, D hidden size,
N heads, Q and C widths of the compressed query and of the compressed keys and values, P plain and R
rotary channels of a query or key, V channels of a value. Source: arXiv 2405.04434, section 2.1 and
appendix C; YaRN: arXiv 2309.00071, section 3.
"""

import math

import torch
from torch import Tensor

from moepp_megatron.moe.reference import ReferenceMoEPP

Weights = dict[str, Tensor]


def decoder_logits(config, moepp, weights, tokens_BS):
    """[B, S, vocabulary] logits and the sum of the layers' balance losses."""
    epsilon = config.model.norm_epsilon
    hidden_SBD = weights["embedding.word_embeddings.weight"][tokens_BS.t()]
    logits_TE, losses = None, []
    for index in range(config.model.num_layers):
        prefix = f"decoder.layers.{index}."
        own = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
        normed_SBD = rms_norm(hidden_SBD, own["input_layernorm.weight"], epsilon)
        hidden_SBD = hidden_SBD + latent_attention(config, own, normed_SBD)
        normed_SBD = rms_norm(hidden_SBD, own["pre_mlp_layernorm.weight"], epsilon)
        layer = moe_layer(config, moepp, own)
        result = layer(normed_SBD.flatten(0, 1), logits_TE)
        hidden_SBD = hidden_SBD + result.hidden_TD.view_as(hidden_SBD)
        logits_TE = result.logits_TE
        losses.append(result.balance_loss)
    hidden_SBD = rms_norm(hidden_SBD, weights["decoder.final_layernorm.weight"], epsilon)
    return (hidden_SBD @ weights["output_layer.weight"].t()).transpose(0, 1), sum(losses)


def latent_attention(config, own, x_SBD):
    """One layer's attention, output projection included."""
    latent, heads = config.model.latent_attention, config.model.num_attention_heads
    epsilon, P, R = config.model.norm_epsilon, latent.qk_head_dim, latent.qk_pos_emb_head_dim

    def weight(name):
        return own[f"self_attention.{name}.weight"]

    def normed(x, name):
        if not config.model.qk_layernorm:
            return x
        return rms_norm(x, weight(name), epsilon)

    if latent.q_lora_rank is None:
        query = x_SBD @ weight("linear_q_proj").t()
    else:
        query_SBQ = normed(x_SBD @ weight("linear_q_down_proj").t(), "q_layernorm")
        query = query_SBQ @ weight("linear_q_up_proj").t()
    plain_q, rotary_q = query.unflatten(-1, (heads, P + R)).split([P, R], dim=-1)
    compressed = x_SBD @ weight("linear_kv_down_proj").t()
    compressed_SBC, shared_key_SBR = compressed.split([latent.kv_lora_rank, R], dim=-1)
    compressed_SBC = normed(compressed_SBC, "kv_layernorm")
    expanded = compressed_SBC @ weight("linear_kv_up_proj").t()
    plain_k, value = expanded.unflatten(-1, (heads, -1)).split([P, latent.v_head_dim], dim=-1)

    angles_SR = rotary_angles(latent, config.model.rotary_base, len(x_SBD))
    growth = yarn_growth(latent, latent.mscale) / yarn_growth(latent, latent.mscale_all_dim)
    rotary_q = growth * rotated(rotary_q, angles_SR)
    rotary_k = growth * rotated(shared_key_SBR.unsqueeze(2), angles_SR)
    scale = yarn_growth(latent, latent.mscale_all_dim) ** 2 / math.sqrt(P + R)
    scores_BNSS = scale * (
        torch.einsum("sbnp,tbnp->bnst", plain_q, plain_k)
        + torch.einsum("sbnr,tbr->bnst", rotary_q, rotary_k.squeeze(2))
    )
    later = torch.ones_like(scores_BNSS[0, 0], dtype=torch.bool).triu(1)
    shares_BNSS = scores_BNSS.masked_fill(later, -math.inf).softmax(-1)
    context_SBNV = torch.einsum("bnst,tbnv->sbnv", shares_BNSS, value)
    return context_SBNV.flatten(2) @ weight("linear_proj").t()


def rotated(x, angles):
    """Channels 2 i and 2 i + 1 of [S, B, N, R] as one complex number, turned by [S, R / 2]."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    return torch.view_as_real(turned).flatten(-2)


def rotary_angles(latent, base, length):
    """[S, R / 2] angle of each position and pair of channels."""
    R = latent.qk_pos_emb_head_dim
    speeds = base ** (-torch.arange(0, R, 2) / R)
    if latent.rope_type == "yarn":
        # Channels of few turns in the old length slow down by the factor, those of many not.
        def channel(turns):
            wanted = latent.original_max_position_embeddings / (turns * 2 * math.pi)
            return R * math.log(wanted) / (2 * math.log(base))

        low = max(math.floor(channel(latent.beta_fast)), 0)
        high = min(math.ceil(channel(latent.beta_slow)), R - 1)
        slow = ((torch.arange(R // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        speeds = speeds * ((1 - slow) + slow / latent.rotary_scaling_factor)
    return torch.outer(torch.arange(length).float(), speeds)


def yarn_growth(latent, mscale):
    """0.1 m ln s + 1 under YaRN (arXiv 2309.00071, equation 22)."""
    if latent.rope_type == "rope":
        return 1.0
    return 0.1 * mscale * math.log(latent.rotary_scaling_factor) + 1.0


def rms_norm(x, weight, epsilon):
    """Root mean square norm of the last axis."""
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon)


def moe_layer(config, moepp, own):
    """The reference layer, computing with the given tensors themselves."""
    is_first = "mlp.router.residual_weight" not in own
    layer = ReferenceMoEPP(
        moepp, config.model.hidden_size, config.expert_ffn_hidden_size, not is_first
    )
    experts = range(moepp.num_ffn_experts)
    tensors = {
        "expert_in": torch.stack([own[_expert(index, 1)] for index in experts]),
        "expert_out": torch.stack([own[_expert(index, 2)] for index in experts]),
        "constants": own["mlp.zero_computation.constants"],
        "mixing_weight": own["mlp.zero_computation.mixing_weight"],
        "gate_weights": [own["mlp.router.weight"]],
    }
    if not is_first:
        tensors["residual_weight"] = own["mlp.router.residual_weight"]
    for name, tensor in tensors.items():
        # Not a parameter of its own: gradients go to the tensor that was given.
        delattr(layer, name)
        setattr(layer, name, tensor)
    return layer


def _expert(index, number):
    return f"mlp.experts.local_experts.{index}.linear_fc{number}.weight"
