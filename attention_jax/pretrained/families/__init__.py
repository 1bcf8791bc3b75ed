"""The families of published models that can be loaded, by their model_type in config.json."""

from attention_jax.hints import near
from attention_jax.pretrained.families import (
    cohere,
    deepseek,
    experts,
    falcon,
    gemma,
    gpt,
    gpt_oss,
    granite,
    kimi,
    llama,
    llama4,
    mamba,
    minimax,
    mpt,
    olmo,
    phi,
    qwen_next,
)
from attention_jax.pretrained.family import Family

#: All families, in the order in which they are listed.
FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES,
    *gpt.FAMILIES,
    *falcon.FAMILIES,
    *mpt.FAMILIES,
    *phi.FAMILIES,
    *cohere.FAMILIES,
    *granite.FAMILIES,
    *gemma.FAMILIES,
    *olmo.FAMILIES,
    *experts.FAMILIES,
    *gpt_oss.FAMILIES,
    *llama4.FAMILIES,
    *mamba.FAMILIES,
    *deepseek.FAMILIES,
    *minimax.FAMILIES,
    *qwen_next.FAMILIES,
    *kimi.FAMILIES,
)


def family_of(model_type: str) -> Family:
    """The family of a model_type; ValueError, with what was probably meant, for one that is not supported."""
    known = {name: family for family in FAMILIES for name in family.model_types}
    if model_type not in known:
        meant = near(model_type, known)
        more = f"; did you mean {meant}?" if meant else "; see `python -m attention_jax.pretrained`"
        raise ValueError(f"model_type {model_type!r} is not supported{more}")
    return known[model_type]
