"""What is said about a word that is not known: how to write it here, which word is near, or nothing.

A user may write the word of another library. The tables say what to write instead; the spelling decides only
about words that are in none of them, and only where it is close.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

_CUTOFF = 0.7  # of difflib's ratio: softmx is near softmax (0.92), gqa is not near gla (0.67)


def near(word: Any, known: Iterable[str]) -> str | None:
    """The known word whose spelling is near, capitals and separators apart; None where none is."""
    plain = {_plain(name): name for name in known}
    found = difflib.get_close_matches(_plain(word), plain, 1, _CUTOFF)
    return plain[found[0]] if found else None


def hint(
    key: str, value: Any, known: Iterable[Any], tables: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """What to append to the message about a wrong value of `key`, such as "; write bfloat16", or "".

    known: the values that are allowed; those that are not text are left out. tables: by key, what the caller
    has to say beside `VALUES`, each made by `by_word`.
    """
    for table in (VALUES, tables or {}):
        if (said := look_up(table.get(key, {}), value)) is not None:
            return f"; {said}"
    found = near(value, [word for word in known if isinstance(word, str)]) if isinstance(value, str) else None
    return f"; did you mean {found}?" if found else ""


def by_word(words_of: Mapping[str, str]) -> dict[str, str]:
    """A table from word to sentence, of one from sentence to words, which are separated by spaces."""
    return {word: said for said, words in words_of.items() for word in words.split()}


def look_up(table: Mapping[str, str], word: Any) -> str | None:
    """The sentence about a word, in any capitals and with any separators; None where there is none."""
    return table.get(_plain(word))


def quoted(text: Any) -> str:
    """A name from a file for a message: one line, at most 60 characters."""
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _plain(word: Any) -> str:
    """In lower case, without spaces, dots, hyphens and underscores."""
    return re.sub(r"[\s_.\-]", "", str(word)[:100].lower())


# Words are written as `_plain` returns them.
_MECHANISMS = by_word(
    {
        "multi-head attention is kind softmax": "mha mhsa multiheadattention",
        "softmax attention is kind softmax": (
            "attention selfattention attn vanilla transformer dotproduct dotproductattention"
        ),
        "full attention is kind softmax; its mask Full() is the default": "full",
        "causal attention is kind softmax in a causal model, or with mask: Causal()": "causal",
        "grouped-query attention is kind softmax with num_kv_heads below num_heads": (
            "gqa groupedquery groupedqueryattention"
        ),
        "multi-query attention is kind softmax with num_kv_heads: 1": "mqa multiquery multiqueryattention",
        "attention in blocks is kind softmax with impl: null, which chooses it by shape and device": (
            "flash flashattention fa2 fa3 xformers memoryefficient"
        ),
        "scaled dot-product attention is kind softmax": "sdpa",
        "attention with a function of positions is kind softmax with a mask or a bias": "flex flexattention",
        "local attention: write kind softmax with mask: SlidingWindow(128)": "local localattention",
        "sliding-window attention: write kind softmax with mask: SlidingWindow(128)": (
            "slidingwindow slidingwindowattention swa window windowed"
        ),
        "dilated attention: write kind softmax with mask: Dilated(8, 4)": "dilated",
        "strided attention: write kind softmax with mask: Strided(8)": "strided",
        "strided attention: write kind softmax with mask: Strided(8) | SlidingWindow(8)": "sparsetransformer",
        "block-local attention: write kind softmax with mask: BlockLocal(64)": "blocklocal",
        "chunked attention: write kind softmax with mask: Chunked(128)": "chunked chunkedattention",
        "Longformer: write kind softmax with mask: Longformer(128, (0,))": "longformer",
        "BigBird: write kind softmax with mask: BigBird(64)": "bigbird",
        "a prefix language model: write kind softmax with mask: Prefix(16) | Causal()": "prefixlm",
        "attention sinks: write kind softmax with mask: SlidingWindow(128) | Sinks(4)": "streamingllm",
        "attention sinks: write kind softmax with mask: SlidingWindow(128) | Sinks(4); a learned sink is sink_logits: true": (
            "sinks attentionsinks"
        ),
        "relative positions are options of kind softmax: rope, or bias: t5 or alibi": "relative relativeposition",
        "ALiBi is kind softmax with bias: alibi": "alibi",
        "T5's relative positions are kind softmax with bias: t5": "t5",
        "rotary positions are kind softmax with rope: {}": "rope rotary",
        "cross-attention is kind cross, with model.encoder": "crossattention encoderdecoder",
        "gated attention is kind gated": "gatedattention",
        "the forgetting transformer is kind forgetting": "fox forgettingtransformer",
        "differential attention is kind differential": "diff differentialattention difftransformer",
        "multi-head latent attention is kind mla": "latent multiheadlatentattention",
        "DeepSeek's attention is kind mla, and its sparse attention kind nsa": "deepseek",
        "native sparse attention is kind nsa": "nativesparseattention",
        "sparse attention is kind softmax with a mask such as BigBird(64), or kind nsa": "sparse",
        "linear attention is kind linear": "linearattention lineartransformer",
        "efficient attention is kind linear with feature_map: softmax": "efficient efficientattention",
        "FAVOR+ is kind performer": "favor favor+",
        "random features are kind performer": "rfa",
        "the Taylor features are kind based": "taylor",
        "Nystrom attention is kind nystromformer": "nystrom",
        "RetNet is kind retention": "retnet",
        "lightning attention is kind lightning": "lightningattention",
        "gated linear attention is kind gla": "gatedlinearattention",
        "Mamba's selective state space is here as kind mamba2; Mamba-1 is not implemented": "mamba",
        "Mamba-1 is not implemented; kind mamba2 comes nearest": "mamba1",
        "the state space dual is kind mamba2": "ssd",
        "a state space model is kind mamba2": "ssm",
        "S4 is not implemented; kind mamba2 comes nearest": "s4",
        "S4D is not implemented; kind mamba2 comes nearest": "s4d",
        "S5 is not implemented; kind mamba2 comes nearest": "s5",
        "H3 is not implemented; kind mamba2 comes nearest": "h3",
        "Mamba's selective state space is here as kind mamba2": "s6",
        "the delta rule is kind deltanet, with a gate kind gated_deltanet": "deltarule",
        "Gated DeltaNet is kind gated_deltanet": "gdn",
        "Kimi Delta Attention is kind kda": "kimi kimidelta",
        "RWKV is not implemented; kinds gla and kda come nearest": "rwkv rwkv7",
        "HGRN is not implemented; kind gla comes nearest": "hgrn",
        "xLSTM is not implemented; kind gla comes nearest": "xlstm",
        "mLSTM is not implemented; kind gla comes nearest": "mlstm",
        "test-time training is not implemented; kind deltanet comes nearest": "ttt",
        "Titans is not implemented; kind gated_deltanet comes nearest": "titans",
        "Hyena is not implemented; kind mamba2 comes nearest": "hyena",
        "Reformer's hashing is not implemented; kind nsa selects blocks by content": "reformer",
        "the routing transformer is not implemented; kind nsa selects blocks by content": "routing",
        "MoBA is not implemented; kind nsa selects blocks by content": "moba",
    }
)

#: By key of a configuration, what to write instead of a value that is not known.
VALUES: dict[str, dict[str, str]] = {
    "kind": _MECHANISMS,
    "dtype": by_word(
        {
            "float16 is not supported: write bfloat16": "fp16 float16 half",
            "write bfloat16": "16 bf16",
            "write float32": "fp32 f32 float single 32",
            "write float64": "fp64 f64 double",
            "float8 is not supported: write bfloat16": "fp8",
            "integers are not supported: write bfloat16": "int8",
        }
    ),
    "remat": by_word(
        {
            "nothing_saveable recomputes everything": "full all true",
            "nothing_saveable recomputes everything, everything_saveable nothing": "everything",
            "dots_saveable recomputes all but matrix products": "minimal dots selective",
            "null turns it off": "none off false",
        }
    ),
    "impl": by_word(
        {
            "attention in blocks is chunked, or null": ("flash flashattention memoryefficient sdpa xformers"),
            "the readable form is reference, of linear mixers recurrent": "dense naive eager math xla jax scan",
            "the form with the whole matrix of weights is quadratic, of softmax reference": "parallel",
            "Pallas kernels are mosaic_tpu and mosaic_gpu": "pallas splash",
            "there are no Triton kernels; Pallas kernels are mosaic_tpu and mosaic_gpu": "triton",
            "null chooses the best": "auto default best",
        }
    ),
    "feature_map": by_word(
        {
            "elu(x) + 1 is elu1": "elu elu+1",
            "features of exp(q.k) are kind performer (random) or kind based (Taylor)": "exp",
            "FAVOR+ is kind performer": "favor",
            "the Taylor features are kind based": "taylor",
            "cosFormer is kind cosformer": "cos",
            "relu(x)^2 is squared_relu": "relu2",
            "max(x, 0) is relu": "reglu",
            "write identity": "none linear",
        }
    ),
    "mlp": by_word(
        {
            "SiLU is used in swiglu": "silu swish",
            "the gated kinds are swiglu and geglu": "glu gated",
            "the tanh form of GELU is gelu_tanh, gated geglu_tanh": "gelunew gelupytorchtanh geluapproximate",
            "there is no ReLU: write gelu": "relu",
        }
    ),
    "norm": by_word(
        {
            "write rmsnorm": "rms",
            "write layernorm": "ln layer",
        }
    ),
    "qk_norm": by_word(
        {
            "write rms": "rmsnorm",
            "write rms or l2": "true",
            "write layer": "layernorm ln",
            "a scale per head is rms_per_head": "perhead",
            "a layer norm with a scale per head is layer_per_head": "cohere layerperhead",
            "over all heads together, as OLMo 2, is rms_all_heads": "olmo olmo2 full",
            "unscaled is l2": "cosine",
            "null turns it off": "none",
        }
    ),
    "bias": by_word(
        {
            "a learned one is t5, a fixed one alibi": "relative",
            "fixed slopes are alibi": "slopes",
            "write t5": "t5relative",
        }
    ),
    "layout": by_word(
        {
            "pairs (j, j + width/2) are half": "neox llama split",
            "pairs (2j, 2j + 1) are interleaved": "gptj",
        }
    ),
    "scaling": by_word(
        {
            "the NTK-aware base is dynamic_ntk": "ntk dynamic ntkaware",
            "position interpolation is linear": "pi interpolation",
            "Llama 3.1's is llama3": "llama llama31",
            "Phi-3's is longrope": "su",
        }
    ),
    "mask": by_word(
        {
            "write Full()": "none bidirectional",
            "write SlidingWindow(128)": "local window swa",
            "write Sinks(4)": "sink",
            "write SlidingWindow(128) | Sinks(4)": "streamingllm",
            "write Causal()": "autoregressive lowertriangular tril",
            "documents are kept apart by data.packing: documents, or segment_ids": "document segment",
            "write RandomBlocks(64, 2)": "random",
            "the complement of a mask is written ~mask": "not",
            "masks are intersected by &": "and",
            "masks are united by |": "or",
        }
    ),
}
