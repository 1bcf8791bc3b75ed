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
from attention_jax.pretrained import family_of, load_pretrained, save_pretrained
from attention_jax.pretrained.load import saved_tensors
from tests.parity.double import double
from tests.parity.model_rows import ROWS
from tests.parity.table import MODELS

B, T, PROMPT = 2, 17, 6
TOLERANCE = 1e-5  # of the largest entry
DOUBLE = 1e-10


class Pair:
    """A model of transformers and the same model loaded from the folder that it was saved to."""

    def __init__(self, name, folder):
        torch.manual_seed(0)
        self.name, self.row, self.folder = name, ROWS[name], folder
        self.peer = self.new_peer()
        _draw(self.peer)
        self.peer.save_pretrained(folder)
        self.config, self.params, _ = load_pretrained(folder)
        self.tokens_BT = (
            np.random.default_rng(0).integers(3, self.row.options["vocab_size"], (B, T)).astype(np.int32)
        )
        self.run = jax.jit(functools.partial(apply, self.config, ctx=Context(capture={"hidden"})))

    def new_peer(self):
        """A model of transformers with its initial weights."""
        config = transformers.AutoConfig.for_model(self.row.model_type, **self.row.options)
        config._attn_implementation = self.row.attention
        return transformers.AutoModelForCausalLM.from_config(config).eval()

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
    return Pair(request.param, tmp_path_factory.mktemp(request.param) / "model")


def _error(found, expected):
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(expected).max())


def _close(found, expected, tolerance=TOLERANCE):
    error = _error(found, expected)
    assert error <= tolerance, error
    return error


def _note(measured, pair, bound, errors):
    measured(pair.name, source=MODELS, errors=errors, bounds=[bound])


def test_logits_and_hidden_states(pair, measured):
    logits, hidden = pair.expected
    assert np.abs(logits).max() > 0.5
    out = pair.run(pair.params, pair.tokens_BT)
    _note(measured, pair, TOLERANCE, {"float32 logits": _close(out.logits, logits)})
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


def _peer_gradients(pair, peer):
    """Gradients by name of the mean negative log-likelihood; and the peer's output."""
    out = peer(torch.tensor(pair.tokens_BT).long(), output_hidden_states=True)
    targets = torch.tensor(np.roll(pair.tokens_BT, -1, axis=1)).long()
    peer.zero_grad()
    torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten()).backward()
    # As transformers saves them: it holds the experts of some families in other shapes than their files.
    gradients = revert_weight_conversion(peer, {name: p.grad for name, p in peer.named_parameters()})
    return {name: g.numpy() for name, g in gradients.items()}, out


def _gradients(pair, config, params):
    """The same of the loaded model, in the tensors' own names and layout; and its output."""
    targets = np.roll(pair.tokens_BT, -1, axis=1)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        out = apply(config, params, pair.tokens_BT, ctx=Context(capture={"hidden"}))
        chosen = jnp.take_along_axis(out.logits, targets[..., None], -1)[..., 0]
        return (jax.nn.logsumexp(out.logits, -1) - chosen).mean(), out

    gradients, out = gradient(params)
    return dict(saved_tensors(family_of(pair.row.model_type), config, gradients)), out


def _gradient_error(pair, found, expected):
    """The largest difference over all parameters, relative to the largest gradient."""
    largest = max(max(np.abs(g).max() for g in expected.values()), 1e-3)
    ours = {name: found[name if name in found else pair.row.old_names(name)] for name in expected}
    return float(max(np.abs(ours[name] - g).max() for name, g in expected.items()) / largest)


@pytest.mark.slow
def test_gradients(pair, measured):
    """Of the mean negative log-likelihood by every parameter."""
    expected, _ = _peer_gradients(pair, pair.peer)
    error = _gradient_error(pair, _gradients(pair, pair.config, pair.params)[0], expected)
    _note(measured, pair, 10 * TOLERANCE, {"float32 gradients": error})
    assert error <= 10 * TOLERANCE, error


@pytest.mark.slow
def test_double(pair, measured):
    """In float64 rounding shrinks by eight orders of magnitude, and mistakes do not."""
    with double(), jax.enable_x64(True):
        peer = pair.new_peer().double()
        peer.load_state_dict(pair.peer.state_dict())
        expected, peer_out = _peer_gradients(pair, peer)
        hidden = peer_out.hidden_states[pair.row.first_hidden : -1]
        config, params, _ = load_pretrained(pair.folder, dtype="float64", compute_dtype="float64")
        gradients, out = _gradients(pair, config, params)
        assert {x.dtype.name for x in (out.logits, *gradients.values())} == {"float64"}
        errors = {
            "float64 logits": _error(out.logits, peer_out.logits.detach().numpy()),
            "float64 hidden states": max(
                _error(aux["hidden"], h.detach().numpy()) for aux, h in zip(out.aux, hidden, strict=False)
            ),
            "float64 gradients": _gradient_error(pair, gradients, expected),
        }
    _note(measured, pair, DOUBLE, errors)
    assert max(errors.values()) <= DOUBLE, errors


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
