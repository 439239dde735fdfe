"""Markers of transformers' own tests, which strict marker checking would refuse."""

import pytest


MARKERS = (
    *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "flex_attention_test"),
    *("torch_compile_test", "torch_export_test", "generate", "order", "is_training_test", "is_pipeline_test"),
    *("is_agent_test", "is_expert_parallel_test", "is_fsdp_test", "is_staging_test", "is_tensor_parallel_test"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Registers them."""
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: a marker of transformers' tests")
