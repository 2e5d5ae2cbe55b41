"""Functions of the ranks of `program`, which import these by name."""

from tests.parallel.training_runs import train


def train_on_device(raw, steps):
    """As `train`, and the device of the model's parameters."""
    devices = []

    def look(models):
        devices.extend(p.device.type for model in models for p in model.parameters())

    run, pieces = train(raw, steps, look)
    (device,) = set(devices)
    return run, pieces, device


def train_on_one_half(raw, steps):
    """As `train`, all tokens to the first half of the FFN experts: half of the ranks get none."""
    from tests.parallel.forced_routing import first_half_of_ffn_experts

    return train(raw, steps, first_half_of_ffn_experts)


def train_with_graphs(raw, steps):
    """As `train`, and the number of captured forward graphs; all must have been captured."""
    from tests.graph_recorder import graphs_of

    built = []
    run, pieces = train(raw, steps, built.extend)
    graphs = [graph for model in built for graph in graphs_of(model)]
    assert all(graph is not None for graph in graphs), "a graph was not captured"
    return run, pieces, len(graphs)
