"""Published models: their descriptions, weights and tokenizers, read and written."""

from attention_jax.pretrained.families import FAMILIES, family_of
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.models import Pretrained, load_pretrained, save_pretrained

__all__ = ["FAMILIES", "Family", "Pretrained", "family_of", "load_pretrained", "save_pretrained"]
