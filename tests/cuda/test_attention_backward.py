"""CUDA attention's gradients, from PTX."""

import pytest
import torch

from fastformer.testing import attention_inputs
from tests.ops.attention_judge import judge_attention

pytestmark = pytest.mark.usefixtures("gradient_emulator")

BF16, F16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("D", (64, 128))
def test_full_and_edge_blocks(D):
    inputs = attention_inputs(1, 2, 140, 300, D, H_kv=1, dtype=BF16, requires_grad=True)
    judge_attention(inputs | {"causal": "lower_right", "return_lse": True}, backend="cuda")
