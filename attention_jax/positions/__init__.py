"""Position encodings: RoPE with its scalings and xPos, sinusoids, and Llama 4's query temperature."""

from attention_jax.positions.absolute import Temperature, sinusoidal
from attention_jax.positions.rope import RoPE, XPos
from attention_jax.positions.scalings import DynamicNTK, LinearScaling, Llama3, LongRoPE, Scaling, YaRN

__all__ = [
    "DynamicNTK",
    "LinearScaling",
    "Llama3",
    "LongRoPE",
    "RoPE",
    "Scaling",
    "Temperature",
    "XPos",
    "YaRN",
    "sinusoidal",
]
