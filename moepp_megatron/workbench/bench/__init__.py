"""Speed of MoE++ against megatron-core's vanilla layer, measured in the same run.

shapes.py        the paper's models and what it measured for them
held_routing.py  routing held at the balanced share phi
contestants.py   the two layers that are compared that are compared
clock.py         CUDA events, or the host's clock
interleave.py    timing in turn, so that times can be compared
card.py          `moepp bench card`: the GPU's own matrix product and copy
bounds.py        the least time of each part on such a GPU
layer.py         `moepp bench layer`
parts.py         where a layer's time goes
activations.py   memory that a layer keeps for its backward pass
step.py          `moepp bench step`
dispatch.py      `moepp bench dispatch`
record.py        all of a GPU's results in one file, for benchmarks/gpu.sh
random_tokens.py the steps' random input
scale.py         one point of `moepp scale`
all_to_all_clock.py  time and bytes of all-to-alls within a step
collectives.py   `moepp bench collectives`
collective_cases.py  its operations, their buffers and what must arrive
"""
