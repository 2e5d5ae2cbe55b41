"""The Triton kernels compiled, by the tests that elsewhere run them in Triton's interpreter."""

import pytest

from tests.unit.moe.test_cross_entropy import (  # noqa: F401
    small_blocks,
    test_loss_and_gradient,
    test_no_memory_beside_the_logits,
    test_numbers_that_are_none,
)
from tests.unit.moe.test_extreme_logits import test_gaps_of_logits  # noqa: F401
from tests.unit.moe.test_kernels import (  # noqa: F401
    compiled,
    test_combine,
    test_combine_of_no_tokens,
    test_combine_where_all_select_the_same,
    test_combine_with_long_sums,
    test_counts_by_tags,
    test_gates_of_scores_that_underflow,
    test_layer_with_and_without_kernels,
    test_nan_is_selected_and_seen,
    test_no_tokens,
    test_rows_of_tokens,
    test_rows_of_tokens_beyond_one_load_of_counts,
    test_selection,
    test_selection_with_one_gradient,
    test_ties,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
