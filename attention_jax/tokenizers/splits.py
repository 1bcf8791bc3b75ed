"""How byte-level vocabularies split a text into words before merging: by the names that GGUF files use.

The names are llama.cpp's `tokenizer.ggml.pre`. Each rule's expressions apply one after another to what those
before left together. Where llama.cpp writes out an expression that its own engine lacks, the original of the
published tokenizer.json stands here: llama.cpp's copies of gpt-4o and tekken treat only A to Z as capitals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from attention_jax.hints import near
from attention_jax.optional import need

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SIGNS}|{_REST}"
_WORD_WITH_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_QWEN35 = rf"{_CONTRACTION}|{_WORD_WITH_MARKS}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_SIGNS_AND_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS_AND_SLASH}|{_REST}"
O200K = (
    rf"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_SIGNS_AND_SLASH}|{_REST}"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}"
)


class Split(NamedTuple):
    """The rule of a vocabulary.

    whole_words: a word that is a token stays whole, whatever its merges say (`ignore_merges`). adds_bos:
    whether bos precedes a text where the file does not say so.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


_RULES = {
    "default": Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais exaone4 trillion granite-docling": Split((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Split((r"\p{N}", _GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Split((LLAMA3,), True, True),
    "dbrx smaug-bpe glm4 chatglm-bpe": Split((LLAMA3,)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open": Split((_QWEN2,)),
    "qwen35": Split((_QWEN35,)),
    "tekken": Split((_TEKKEN,), True, True),
    "gpt-4o llama4 kanana2 minimax-m2": Split((O200K,)),
    "deepseek-v3 hunyuan-dense": Split((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    "falcon": Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
}
SPLITS = {name: split for names, split in _RULES.items() for name in names.split()}


def split_of(name: object) -> Split:
    """The rule of a name. ValueError for one that is not implemented."""
    if isinstance(name, str) and name in SPLITS:
        return SPLITS[name]
    if name is None:
        raise ValueError("it does not say how text is split (tokenizer.ggml.pre): convert the model again")
    close = near(name, SPLITS)
    hint = f"; did you mean {close}?" if close else ""
    raise ValueError(f"the pre-tokenizer {str(name)[:60]!r} (tokenizer.ggml.pre) is not implemented{hint}")


def pre_tokenizer(split: Split) -> Any:
    """The `tokenizers` pre-tokenizer of a rule, which also spells bytes as characters."""
    tokenizers = need("tokenizers", "a tokenizer of a published model")
    need("tokenizers.pre_tokenizers", "a tokenizer of a published model")
    kinds = tokenizers.pre_tokenizers
    steps = [kinds.Split(tokenizers.Regex(expression), "isolated") for expression in split.expressions]
    return kinds.Sequence([*steps, kinds.ByteLevel(add_prefix_space=False, use_regex=False)])
