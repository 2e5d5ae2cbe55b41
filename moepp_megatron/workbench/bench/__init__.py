"""Speed of MoE++ against megatron-core's vanilla layer, measured in the same run.

shapes.py        the paper's models and what it measured for them
held_routing.py  routing held at the balanced share phi
contestants.py   the two layers
clock.py         CUDA events, or the host's clock
interleave.py    times that may be compared
card.py          `moepp bench card`: the card's own matrix product and copy
bounds.py        the least time of each part on such a card
layer.py         `moepp bench layer`
parts.py         where a layer's time goes
activations.py   what a layer keeps for its backward pass
step.py          `moepp bench step`
dispatch.py      `moepp bench dispatch`
record.py        all of a card's results in one file, for benchmarks/gpu.sh
random_tokens.py what the steps read
scale.py         one point of `moepp scale`
all_to_all_clock.py  time and bytes of all-to-alls within a step
collectives.py   `moepp bench collectives`
collective_cases.py  its operations, their buffers and what must arrive
"""
