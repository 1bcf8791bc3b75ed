"""Text generation with a language model: prefill, then decoding with the states of all layers."""

from attention_jax.generation.choose import adjust, sample
from attention_jax.generation.decode import DecodeState, decode_step, extend, prefill
from attention_jax.generation.drafts import DraftModel, NGram
from attention_jax.generation.generate import generate, stream
from attention_jax.generation.results import Completion, Increment
from attention_jax.generation.sampling import Sampling
from attention_jax.generation.score import score
from attention_jax.generation.session import Session

__all__ = [
    "Completion",
    "DecodeState",
    "DraftModel",
    "Increment",
    "NGram",
    "Sampling",
    "Session",
    "adjust",
    "decode_step",
    "extend",
    "generate",
    "prefill",
    "sample",
    "score",
    "stream",
]
