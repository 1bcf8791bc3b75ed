"""Whole published models: tiny random ones of transformers, saved by it and loaded here."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from attention_jax.pretrained import load_pretrained
from tests.parity.model_rows import ROWS


@pytest.fixture(scope="module", params=list(ROWS))
def pair(request, tmp_path_factory):
    row = ROWS[request.param]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(row.model_type, **row.options)
    config._attn_implementation = "eager"
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    print(sum(p.numel() for p in peer.parameters()))
