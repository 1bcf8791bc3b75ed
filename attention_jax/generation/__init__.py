"""Text generation with a language model: prefill, then decoding with the states of all layers."""

from attention_jax.generation.decode import DecodeState, decode_step, prefill
from attention_jax.generation.generate import generate, stream
from attention_jax.generation.sampling import Sampling, sample

__all__ = ["DecodeState", "Sampling", "decode_step", "generate", "prefill", "sample", "stream"]
