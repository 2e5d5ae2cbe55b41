"""Speed of MoE++ against megatron-core's vanilla layer, measured in the same run.

shapes.py            the paper's models and what it measured for them
held_routing.py      routing held at the balanced share phi
contestants.py       the two layers that are compared
clock.py             CUDA events, or the host's clock; timing in turn
card.py              the GPU's own matrix product and copy
bounds.py            the least time of each part on such a GPU
layer.py             `moepp bench layer`, and what a layer keeps for its backward pass
parts.py             where a layer's time goes
step.py              `moepp bench step`, and the random tokens that it reads
"""
