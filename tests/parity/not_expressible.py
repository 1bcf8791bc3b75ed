"""What published models do that no option of ours expresses, by family, with the reason.

Each is a skipped test. A row leaves this table when an option is added, and becomes a row of a comparison.
"""

NOT_EXPRESSIBLE: dict[str, str] = {
    # Softmax attention.
    "gemma4": "`proportional` RoPE, which rotates a share of the pairs: no such scaling",
    "yarn-one-mscale": "YaRN with one of mscale and mscale_all_dim: transformers then ignores it, we do not",
    "dynamic-rope": "frequencies that follow the length of the text (dynamic NTK, LongRoPE): ours are fixed "
    "by `length`, so that keys in a cache stay valid",
    "t5-shared-table": "one table of relative positions for all layers: each layer has its own; copy it",
    "bigbird": "random blocks drawn for each head and not symmetric, the last block global: our BigBird mask "
    "is symmetric, the same for all heads, and its global blocks are the first; a mixer takes no mask array",
    "nystromformer-original": "Z_0 scaled by one maximum over batch and heads, so that rows depend on their "
    "neighbours: ours is scaled for each matrix (the row nystromformer has the peer's exact option)",
    "forgetting-shift": "keys and values mixed with those of the token before (FoX's Pro block): no option",
    # fla's functions that have no counterpart.
    "nsa-block-named-twice": "fla counts a block named twice twice, we once",
}
