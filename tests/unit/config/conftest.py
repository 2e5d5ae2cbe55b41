"""A small valid configuration that the tests of this folder vary."""

import pytest

MINIMAL = """\
run: {dir: runs/test}
model:
  num_layers: 4
  hidden_size: 64
  ffn_hidden_size: 128
  num_attention_heads: 8
  seq_length: 128
  vocab_size: 512
optimizer: {lr: 1e-3}
training: {train_iters: 100, global_batch_size: 16, micro_batch_size: 2}
"""


@pytest.fixture
def minimal(tmp_path):
    """Path of a file with the minimal configuration."""
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path
