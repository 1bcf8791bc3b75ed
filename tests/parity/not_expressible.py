"""What published models do that no option of ours expresses, by family, with the reason.

Each is a skipped test. A row leaves this table when an option is added, and becomes a row of a comparison.
"""

_EPSILON = "our norms' epsilon is not an option"

NOT_EXPRESSIBLE: dict[str, str] = {
    # Softmax attention.
    "falcon-rw": "ALiBi slopes divided by sqrt(head_dim): the bias `alibi` has no factor for its slopes",
    "mpt-alibi-bias-max": "an alibi_bias_max other than 8: the bias `alibi` has no factor for its slopes",
    "mpt-clip-qkv": "clip_qkv: no option clips queries, keys and values",
    "phi-qk-layernorm": "LayerNorm of queries and keys: qk_norm is rms or l2",
    "olmo2": "RMS norm of queries and keys over all heads together: qk_norm is over each head",
    "qk-norm-epsilon": f"rms_norm_eps other than 1e-6 (Llama 4 publishes 1e-5) in qk_norm: {_EPSILON}",
    "qwen2-bias": "bias in q, k and v but none in the output: use_bias gives all four; keep the output's "
    "at 0 (the row qwen2 does)",
    "gemma4": "`proportional` RoPE, which rotates a share of the pairs: no such scaling",
    "yarn-one-mscale": "YaRN with one of mscale and mscale_all_dim: transformers then ignores it, we do not",
    "dynamic-rope": "frequencies that follow the length of the text (dynamic NTK, LongRoPE): ours are fixed "
    "by `length`, so that keys in a cache stay valid",
    "deepseek-attention-bias": "biases in latent attention: mla has none",
    "mla-latent-norm-epsilon": f"an epsilon other than 1e-6 of latent attention's norms: {_EPSILON}",
    "kimi-linear-mla-without-rotation": "a key part shared by all heads but not rotated: the row "
    "kimi-linear-mla stops the rotation by LinearScaling(factor=1e30)",
    "t5-shared-table": "one table of relative positions for all layers: each layer has its own; copy it",
    "longformer-global-projections": "projections of their own for global tokens: we have one set "
    "(the row longformer ties them)",
    "bigbird": "random blocks drawn for each head and not symmetric, the last block global: our BigBird mask "
    "is symmetric, the same for all heads, and its global blocks are the first; a mixer takes no mask array",
    "nystromformer-original": "Z_0 scaled by one maximum over batch and heads, so that rows depend on their "
    "neighbours: ours is scaled for each matrix (the row nystromformer has the peer's exact option)",
    "diffllama-epsilon": f"rms_norm_eps other than 1e-5: {_EPSILON}",
    "gated-options": "scale, softcap, sink logits, bias or temperature beside an output gate: the kind gated "
    "lacks them",
    # Recurrences.
    "qwen3-next-epsilon": f"the published rms_norm_eps 1e-6 of the gated norm, ours is 1e-5: {_EPSILON} "
    "(the row qwen3-next-gated-deltanet gives the peer 1e-5)",
    "minimax-epsilon": f"the epsilon 1e-6 of lightning attention's norm, ours is 1e-5: {_EPSILON} (the row "
    "minimax-lightning gives the peer 1e-5)",
    "mamba2-epsilon": f"layer_norm_epsilon other than 1e-5: {_EPSILON}",
    "kimi-linear-gate-bias": "no bias in the output gate: gate_up always has one; keep it at 0 (the row "
    "kimi-linear-kda does)",
    "retention-rms-norm": "RMS norm of the heads' outputs (torchscale, fla): ours is the paper's group norm",
    "forgetting-output-gate": "an output gate and norms of the heads' outputs beside the forget gate: "
    "not options",
    "hedgehog-bias": "a bias in the feature map; and fla's feature maps cannot be imported without triton",
    # fla's functions that have no counterpart.
    "nsa-block-named-twice": "fla counts a block named twice twice, we once",
}
