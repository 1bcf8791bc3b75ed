"""transformers' models in float64: inside `double()`, their hard conversions to float32 give float64.

What is replaced, by name, and the conversions that it reaches in the families of `model_rows.py`:

| replaced | where models use it |
|---|---|
| `torch.float32`, `torch.float` | the norms' `x.to(torch.float32)`; `softmax(..., dtype=torch.float32)`; `inv_freq` of RoPE and its angles; GPT-J's and Falcon's scores; the ALiBi slopes of BLOOM and Falcon; Mamba-2's residual and gate |
| `Tensor.float()` | Gemma's norms; the angles' positions; Cohere's rotated q and k; GPT-J's sinusoids; MPT's slopes and softmax; Mamba-2's steps, decays, inputs and logits |
| `BloomGelu.forward` | the 0.79788456 of its value and its gradient is sqrt(2 / pi) to nine digits: the constant of float32 |
| the default dtype | tensors made from Python numbers, such as those of YaRN and LongRoPE |
"""  # noqa: E501 (a table)

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from transformers.models.bloom import modeling_bloom


@contextlib.contextmanager
def double() -> Iterator[None]:
    """Models built and called inside compute in float64 alone."""
    float64, default = torch.float64, torch.get_default_dtype()
    torch.set_default_dtype(float64)
    try:
        with (
            mock.patch.object(torch, "float32", float64),
            mock.patch.object(torch, "float", float64),
            mock.patch.object(modeling_bloom.BloomGelu, "forward", _gelu_tanh),
            mock.patch.object(torch.Tensor, "float", lambda self, **options: self.to(float64, **options)),
        ):
            yield
    finally:
        torch.set_default_dtype(default)


def _gelu_tanh(self, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")
