"""Small models on this rank. Nothing heavy is imported at the top: tests import it by name."""

from tests.parallel import training_runs

BASE = training_runs.settings(
    model={"num_layers": 2, "num_query_groups": None},
    moe={"num_ffn_experts": 4},
    optimizer={"warmup_iters": 0},
    training={"train_iters": 1, "global_batch_size": 4, "micro_batch_size": 1},
)


def settings(**sections):
    """`BASE` with some settings changed, such as `settings(moe={"tau": 0.5})`."""
    return training_runs.merged(BASE, sections)


def build(raw):
    """This rank's chunks of the model that `raw` describes, in its layout."""
    from moepp_megatron.model.build import build_model

    return build_model(training_runs.begin(raw)[0])


def layer_weights(layer):
    """FFN experts' weights of a MoE layer: [F, 2H, D] and [F, D, H]."""
    import torch

    experts = layer.experts.local_experts
    return (
        torch.stack([expert.linear_fc1.weight for expert in experts]),
        torch.stack([expert.linear_fc2.weight for expert in experts]),
    )
