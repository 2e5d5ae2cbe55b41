"""One Megatron process for the tests of a file."""

import pytest

from moepp_megatron.runtime import cpu_support

# Before the test modules import megatron-core, which compiles some functions on import unless the
# CPU support has switched that off.
cpu_support.install()


@pytest.fixture(scope="module")
def one_rank():
    """Process groups of one rank, as a run on one process has them; none for the files after."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from moepp_megatron.runtime import distributed
    from moepp_megatron.runtime.rank import RankEnvironment

    distributed.start(RankEnvironment())
    # The tensors are tiny: a second thread would only wait for a core.
    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    yield
    distributed.stop()


@pytest.fixture(autouse=True)
def megatron(one_rank):
    """Each test starts from the same random streams and auxiliary-loss scale, and leaves none."""
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    yield
    # Cleared, it would still have room for the layers of the last test's model only.
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
