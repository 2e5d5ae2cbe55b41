"""Speed of MoE++ against megatron-core's vanilla layer, measured in the same run.

shapes.py            the paper's models and what it measured for them
held_routing.py      routing held at the balanced share phi
contestants.py       the two layers that are compared
clock.py             CUDA events, or the host's clock; timing in turn
bounds.py            the least time of each part, by the measured product and copy of the GPU
layer.py             `moepp bench layer`: times, where they go, what is kept for the backward pass
step.py              `moepp bench step`, and the random tokens that it reads
"""
