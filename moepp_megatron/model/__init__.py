"""The model: from configuration to Megatron modules with layout-independent weights."""
