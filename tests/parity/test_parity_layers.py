"""Whole layers: our mixers against layers written elsewhere, with the same weights.

docs/parity.md has the measured errors, and the conventions that differ.
"""

import zlib

import numpy as np
import pytest

from tests.parity import ours, peers, recurrent_rows, softmax_rows

PEERS = softmax_rows.PEERS | recurrent_rows.PEERS


@pytest.mark.parametrize("name", PEERS)
def test_a_layer_computes_what_its_peer_computes(name, measured):
    peer = PEERS[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    module = peers.draw(peer.build(), rng)
    x, cotangent = (rng.normal(size=(peers.B, peers.T, peers.D)).astype(np.float32) for _ in range(2))
    mixer = ours.Mixer(peer.config, peers.D, causal=peer.causal)
    given = peer.weights(peers.arrays(module), 1.0)
    assert given.keys() | set(peer.fixed) == mixer.start.keys() and not given.keys() & set(peer.fixed)
    params = mixer.start | {path: np.array(x, np.float32) for path, x in given.items()}

    y_peer, grads_peer, dx_peer = peers.forward_and_gradients(peer, module, x, cotangent)
    y, grads, dx = mixer.forward_and_gradients(params, x, cotangent)
    found = {
        "forward": peers.error(y, y_peer),
        "input gradient": peers.error(dx, dx_peer),
        "weight gradients": peers.weight_error(grads, peer.weights(grads_peer, 0.0)),
    }
    if peer.cached:
        found["decoded"] = peers.error(mixer.decoded(params, x), y_peer)
    y_double = peers.in_float64(peer, module, x)
    measured(
        name, source=peer.source, errors=found, bounds=[peer.bound, peer.gradient_bound],
        peer_rounding=peers.error(y_peer, y_double), our_rounding=peers.error(y, y_double),
    )  # fmt: skip
    for what, value in found.items():
        bound = peer.gradient_bound if "gradient" in what else peer.bound
        assert value <= bound, f"{name}, {what}: relative error {value:.2e} > {bound:.0e}; all: {found}"
