"""Text to token ids and back: bytes, characters, tokenizers and chat templates of published models."""

from attention_jax.tokenizers.base import Decodes, Pieces, StreamDecoder, Tokenizer
from attention_jax.tokenizers.chat import ChatTemplate
from attention_jax.tokenizers.gguf import gguf_tokenizer
from attention_jax.tokenizers.hugging_face import HuggingFaceTokenizer
from attention_jax.tokenizers.load import dumps, from_json, load, load_tokenizer
from attention_jax.tokenizers.plain import ByteTokenizer, CharTokenizer, make
from attention_jax.tokenizers.published import EncodedChat, PublishedTokenizer, SpecialTokens
from attention_jax.tokenizers.sentence_piece import SentencePieceTokenizer
from attention_jax.tokenizers.tiktoken_ranks import TiktokenTokenizer
from attention_jax.tokenizers.turns import Turn, turns_of
from attention_jax.tokenizers.writing import write_tokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "ChatTemplate",
    "Decodes",
    "EncodedChat",
    "HuggingFaceTokenizer",
    "Pieces",
    "PublishedTokenizer",
    "SentencePieceTokenizer",
    "SpecialTokens",
    "StreamDecoder",
    "TiktokenTokenizer",
    "Tokenizer",
    "Turn",
    "dumps",
    "from_json",
    "gguf_tokenizer",
    "load",
    "load_tokenizer",
    "make",
    "turns_of",
    "write_tokenizer",
]
