"""Whole published models: tiny random ones of transformers, saved by it, loaded, run and saved again here."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from attention_jax.generation import decode_step, prefill
from attention_jax.mixers import Context
from attention_jax.model import apply, prepare_for_decoding
from attention_jax.pretrained import load_pretrained, save_pretrained
from tests.parity.model_rows import ROWS

B, T, PROMPT = 2, 17, 6
TOLERANCE = 1e-5  # of the largest entry


class Pair:
    """A model of transformers and the same model loaded from the folder that it was saved to."""

    def __init__(self, row, folder):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(row.model_type, **row.options)
        config._attn_implementation = row.attention
        self.row, self.folder = row, folder
        self.peer = transformers.AutoModelForCausalLM.from_config(config).eval()
        _draw(self.peer)
        self.peer.save_pretrained(folder)
        self.config, self.params, _ = load_pretrained(folder)
        self.tokens_BT = (
            np.random.default_rng(0).integers(3, row.options["vocab_size"], (B, T)).astype(np.int32)
        )
        self.run = jax.jit(functools.partial(apply, self.config, ctx=Context(capture={"hidden"})))

    @functools.cached_property
    def expected(self):
        """(logits_BTV, the output of every layer but the last, behind which there is a norm)."""
        with torch.no_grad():
            out = self.peer(torch.tensor(self.tokens_BT).long(), output_hidden_states=True)
        return out.logits.numpy(), [h.numpy() for h in out.hidden_states[self.row.first_hidden : -1]]


def _draw(peer):
    """Weights that make every part matter: kernels of std 0.2, everything else off its initial value."""
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.1))
        for name, x in peer.named_buffers():  # 0 otherwise, and without a gradient
            if name.endswith("e_score_correction_bias"):
                x.add_(torch.randn_like(x) * 0.1)


@pytest.fixture(scope="module", params=list(ROWS))
def pair(request, tmp_path_factory):
    return Pair(ROWS[request.param], tmp_path_factory.mktemp(request.param) / "model")


def _close(found, expected, tolerance=TOLERANCE):
    error = np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(expected).max()
    assert error <= tolerance, error


def test_logits_and_hidden_states(pair):
    logits, hidden = pair.expected
    assert np.abs(logits).max() > 0.5
    out = pair.run(pair.params, pair.tokens_BT)
    _close(out.logits, logits)
    for aux, expected in zip(out.aux, hidden, strict=False):
        _close(aux["hidden"], expected)


def test_left_padded_cached_decoding(pair):
    """Rows of unequal prompts, then a token at a time, against whole rows of the peer."""
    lengths = np.array([PROMPT, PROMPT - 3])
    slots = np.arange(PROMPT) - (PROMPT - lengths)[:, None]
    tokens = np.take_along_axis(pair.tokens_BT, np.maximum(slots, 0), axis=1)
    params = prepare_for_decoding(pair.config, pair.params)
    state = prefill(pair.config, params, tokens, np.maximum(slots, -1), capacity=T)
    step, rows = jax.jit(functools.partial(decode_step, pair.config)), np.arange(B)
    while True:
        at = np.asarray(state.positions_B)
        _close(state.logits_BV, pair.expected[0][rows, at - 1])
        if at.max() == T:
            break
        state = step(params, state, pair.tokens_BT[rows, at])


def test_saving(pair, tmp_path):
    """transformers loads what is saved, with the same bits and the same logits."""
    save_pretrained(tmp_path / "model", pair.config, pair.params, like=pair.folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation=pair.row.attention
    )
    ours, theirs = again.state_dict(), pair.peer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        logits = again.eval()(torch.tensor(pair.tokens_BT).long()).logits.numpy()
    np.testing.assert_array_equal(logits, pair.expected[0])


@pytest.mark.slow
def test_the_older_spelling(pair, tmp_path):
    """config.json and the tensors' names as they are on the hub describe the same model."""
    if pair.row.old is None:
        pytest.skip("the hub has no other spelling of this family's config.json")
    values = json.loads((pair.folder / "config.json").read_text()) | pair.row.old
    values = {key: value for key, value in values.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = load_file(pair.folder / "model.safetensors")
    tensors = {pair.row.old_names(name): x for name, x in tensors.items()}
    layer = next(re.match(r".*?\.0\.", f".{name}").group()[1:] for name in tensors if ".0." in f".{name}")
    buffers = {layer + name: np.ones((1, 1, 4, 4), np.float32) for name in pair.row.buffers}
    assert not buffers.keys() & tensors.keys()
    save_file(tensors | buffers, tmp_path / "model.safetensors")
    again = load_pretrained(tmp_path)
    assert again.config == pair.config
    jax.tree.map(np.testing.assert_array_equal, again.params, pair.params)


@pytest.mark.slow
def test_gradients(pair):
    """Of the mean negative log-likelihood by every parameter, in the tensors' own names and layout."""
    from attention_jax.pretrained import family_of
    from attention_jax.pretrained.load import saved_tensors

    targets = np.roll(pair.tokens_BT, -1, axis=1)
    peer_logits = pair.peer(torch.tensor(pair.tokens_BT).long()).logits
    loss = torch.nn.functional.cross_entropy(
        peer_logits.flatten(0, 1), torch.tensor(targets).long().flatten()
    )
    pair.peer.zero_grad()
    loss.backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        logits_BTV = apply(pair.config, params, pair.tokens_BT).logits
        nll = (
            jax.nn.logsumexp(logits_BTV, -1) - jnp.take_along_axis(logits_BTV, targets[..., None], -1)[..., 0]
        )
        return nll.mean()

    found = dict(saved_tensors(family_of(pair.row.model_type), pair.config, gradient(pair.params)))
    # As transformers saves them: it holds the experts of some families in other shapes than their files.
    expected = {name: p.grad for name, p in pair.peer.named_parameters()}
    expected = revert_weight_conversion(pair.peer, expected)
    largest = max(x.abs().max() for x in expected.values()).item()
    for name, x in expected.items():
        name = name if name in found else pair.row.old_names(name)
        error = np.abs(found[name] - x.numpy()).max()
        assert error <= 10 * TOLERANCE * max(largest, 1e-3), (name, error)


def test_mxfp4_is_unpacked_to_the_same_bits(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from attention_jax.pretrained.files import open_tensors
    from attention_jax.pretrained.mxfp4 import unpacked

    rng = np.random.default_rng(0)
    arrays = {
        "w_blocks": rng.integers(0, 256, (2, 5, 3, 16), dtype=np.uint8),
        "w_scales": rng.integers(100, 150, (2, 5, 3), dtype=np.uint8),
    }
    expected = convert_moe_packed_tensors(*map(torch.tensor, arrays.values()))
    save_file(arrays, tmp_path / "model.safetensors")
    found = unpacked(open_tensors(tmp_path)).read("w")
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.astype(np.float32), expected.float().numpy())
