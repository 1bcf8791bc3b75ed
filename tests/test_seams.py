"""Interfaces for other code: capture, masks of a call, states from configs, direct construction, tabulate."""

import dataclasses
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import attention_jax
from attention_jax import biases, masks
from attention_jax.caches import Cache, CacheOptions
from attention_jax.generation import decode_step, prefill
from attention_jax.mixers import (
    CAPTURES,
    Attention,
    AttentionConfig,
    Context,
    MixerConfig,
    NSAConfig,
    base,
    make_config,
    make_mixer,
    mixer_kinds,
)
from attention_jax.model import ModelConfig, apply, bind, encode, init_params, init_state
from attention_jax.positions import RoPE
from tests.harness import Harness
from tests.mixers import D_MODEL
from tests.params import random_params

B, T = 2, 12
KINDS = list(mixer_kinds())
# Small enough for rows of T tokens.
SMALL = {
    "cosformer": {"horizon": 64},
    "linformer": {"length": 16, "projected_length": 4},
    "nystromformer": {"landmarks": 4},
    "nsa": {"compress_block": 4, "compress_stride": 2, "select_block": 4, "select_count": 3, "window": 4},
    "mamba2": {"head_dim": 16, "state_dim": 8},
}
NO_MAP = {"nsa": "three maps", "linformer": "keys are no tokens", "nystromformer": "a product of three maps"}


def harness(kind: str) -> Harness:
    config = make_config(kind, **SMALL.get(kind, {}))
    return Harness(config, causal=config.direction != "bidirectional")


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal((B, T, D_MODEL), np.float32)


def memory_of(kind: str, x) -> dict:
    return {"memory_BSD": x[:, :7]} if mixer_kinds()[kind].reads_memory else {}


@pytest.mark.parametrize("kind", KINDS)
def test_capture_gives_what_the_output_is_made_of_and_changes_no_bit(kind, x):
    """y without capture is bit for bit y with it; queries, keys, values and weights have one layout."""
    built = harness(kind)
    ctx = Context(**memory_of(kind, x))
    everything = dataclasses.replace(ctx, capture=CAPTURES)
    mixer = nnx.merge(built.graphdef, built.params)
    plain, full = (jax.jit(lambda x, c=c: mixer.mix(x, ctx=c))(x) for c in (ctx, everything))
    assert_array_equal(plain.y, full.y)
    assert plain.aux == {}
    names = {"queries", "keys", "values"} | ({"attention"} if kind not in NO_MAP else set())
    assert full.aux.keys() == names
    if "attention" in full.aux:
        w_BNTS = np.asarray(full.aux["attention"])
        assert w_BNTS.shape[::2] == (B, T) and w_BNTS.dtype == np.float32
        N, v_BSKM = w_BNTS.shape[1], np.asarray(full.aux["values"], np.float64)
        assert w_BNTS.shape[3] == v_BSKM.shape[1] and not max(N, K := full.aux["keys"].shape[2]) % min(N, K)
        if mixer.causal and not mixer.config.reads_memory:
            assert_array_equal(np.triu(w_BNTS, 1), 0)
        if mixer.config.takes_mask and kind != "differential":
            assert_allclose(w_BNTS.sum(-1), 1, rtol=1e-5)


# What W v goes into: the norm of the heads' outputs or the output projection, with no gate in between.
INTO = {kind: "norm" for kind in ("retention", "gla", "lightning", "deltanet", "gated_deltanet", "kda")}
INTO |= {"differential": "head_norm"}
INTO |= {kind: "out" for kind in ("softmax", "cross", "forgetting", "mla", "linear", "cosformer", "based")}
INTO |= {"hedgehog": "out", "performer": "out", "linear-rope": "out"}
DIRECTIONS = [(kind, True) for kind in INTO] + [
    (kind, False)
    for kind in INTO
    if kind in ("linear", "cosformer", "based", "hedgehog", "performer", "linear-rope")
]


@pytest.mark.parametrize(("kind", "causal"), DIRECTIONS)
def test_captured_weights_times_captured_values_are_what_the_layer_goes_on_with(monkeypatch, kind, causal, x):
    """In packed rows with invalid slots, causal and bidirectional; weights of hidden pairs are 0."""
    options = SMALL.get(kind, {}) | ({"rope": RoPE(), "num_kv_heads": 2} if kind == "linear-rope" else {})
    built = Harness(make_config(kind.removesuffix("-rope"), **options), causal=causal)
    mixer = nnx.merge(built.graphdef, built.params)
    module, seen = getattr(mixer, INTO[kind]), []
    original = type(module).__call__

    def record(self, first, *others):
        if self is module:
            seen.append(first)
        return original(self, first, *others)

    monkeypatch.setattr(type(module), "__call__", record)
    segments = np.tile([0] * 5 + [1] * 5 + [-1] * 2, (B, 1))
    ids = {
        "positions_BT": np.tile([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, -1, -1], (B, 1)),
        "segment_ids_BT": segments,
    }
    memory = memory_of(kind, x) if kind in mixer_kinds() else {}
    ctx = Context(**(memory or ids), capture={"attention", "values"})
    aux, into = jax.jit(lambda x: (mixer.mix(x, ctx=ctx).aux, seen[-1]))(x)
    w_BNTS, v_BSNM = np.asarray(aux["attention"], np.float64), np.asarray(aux["values"], np.float64)
    if not memory:
        hidden = (segments[:, :, None] != segments[:, None]) | (segments[:, :, None] < 0)
        assert_array_equal(w_BNTS[np.broadcast_to(hidden[:, None], w_BNTS.shape)], 0)
        assert np.any(np.triu(w_BNTS, 1)) != causal
    v_BSNM = np.repeat(v_BSNM, w_BNTS.shape[1] // v_BSNM.shape[2], axis=2)
    wanted = np.einsum("bnts,bsnm->btnm", w_BNTS, np.where(np.isfinite(v_BSNM), v_BSNM, 0))
    assert_allclose(np.reshape(into, wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_an_unknown_capture_is_refused_by_name():
    with pytest.raises(ValueError, match="capture must be a set of names, got 'keys': write {'keys'}"):
        Context(capture="keys")
    with pytest.raises(ValueError, match="capture: unknown name 'maps'; choose from attention, queries"):
        Context(capture={"maps"})


@pytest.fixture(scope="module")
def small():
    config = ModelConfig(
        vocab_size=31,
        d_model=16,
        num_layers=5,
        mixers=(
            make_config("softmax", num_heads=2, sink_logits=True, rope=RoPE()),
            make_config("gla", num_heads=2),
        ),
        mlp_width=24,
    )
    return config, random_params(config)


def test_a_model_collects_what_its_layers_capture_unrolled_and_scanned(small):
    config, params = small
    tokens = jnp.arange(2 * T).reshape(2, T) % 31
    ctx = Context(capture={"attention", "hidden"})
    outputs = [
        jax.jit(lambda t, c=c: apply(c, params, t, ctx=ctx))(tokens)
        for c in (config, dataclasses.replace(config, scan_layers=True))
    ]
    for output in outputs:
        assert [set(layer) for layer in output.aux] == [{"attention", "hidden"}] * 5
    for unrolled, scanned in zip(*(output.aux for output in outputs), strict=True):
        for name in unrolled:
            assert_allclose(scanned[name], unrolled[name], rtol=1e-5, atol=1e-6)
    hidden, model = outputs[0].aux[-1]["hidden"], bind(config, params)
    assert_allclose(model.logits(model.final_norm(hidden)), outputs[0].logits, rtol=1e-5, atol=1e-6)
    assert apply(config, params, tokens).aux == ({},) * 5


def test_an_empty_capture_is_the_same_program(small):
    config, params = small
    tokens = jnp.zeros((1, 4), int)
    contexts = (None, Context(), Context(capture=frozenset()))
    programs = [jax.make_jaxpr(lambda p, c=c: apply(config, p, tokens, ctx=c).logits) for c in contexts]
    assert len({str(program(params)) for program in programs}) == 1


MASKED = [kind for kind, config in mixer_kinds().items() if config.takes_mask]


@pytest.mark.parametrize("kind", MASKED)
def test_masks_of_a_call_are_intersected_with_the_layers_own(kind, x):
    """A Mask, an array, and both equal the layer built with their intersection; a state takes a Mask."""
    window, sinks = masks.SlidingWindow(5), masks.SlidingWindow(3) | masks.Sinks(2)
    config = make_config(kind, mask=window)
    built, wanted = (Harness(c) for c in (config, dataclasses.replace(config, mask=window & sinks)))
    ctx = Context(**memory_of(kind, x))
    expected = wanted.parallel(x, ctx)
    S = 7 if memory_of(kind, x) else T
    table_TS = np.asarray(sinks.dense(np.arange(T)[None], np.arange(S)[None]))[0]
    assert np.abs(expected - built.parallel(x, ctx)).max() > 1e-3
    for given in (
        {"mask": sinks},
        {"mask_BNTS": jnp.asarray(table_TS)[None, None]},
        {"mask": sinks, "mask_BNTS": jnp.ones((1, 1, T, S), bool)},
    ):
        assert_allclose(built.parallel(x, dataclasses.replace(ctx, **given)), expected, rtol=1e-5, atol=1e-6)
    cached = dataclasses.replace(ctx, mask=sinks, positions_BT=jnp.tile(jnp.arange(T), (B, 1)))
    y, state = built.call(built.params, x, built.state(), cached)
    assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="ctx.mask_BNTS"):
        built.run(built.params, x, state, dataclasses.replace(cached, mask_BNTS=jnp.ones((1, 1, T, T), bool)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MASKED])
def test_masks_of_a_call_are_refused_by_name_elsewhere(kind, x):
    mixer = make_mixer(
        kind, D_MODEL, rngs=nnx.Rngs(0), causal=mixer_kinds()[kind].direction != "bidirectional",
        **SMALL.get(kind, {}),
    )  # fmt: skip
    for name, mask in (("mask", masks.Causal()), ("mask_BNTS", jnp.ones((1, 1, T, T), bool))):
        with pytest.raises(
            ValueError, match=f"{kind} does not support the mask of a call: ctx.{name} must be None"
        ):
            mixer(x, ctx=Context(**{name: mask}))


STATEFUL = [kind for kind, config in mixer_kinds().items() if config.direction != "bidirectional"]


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_config_alone_makes_the_state_of_its_mixer(kind):
    """As the built mixer makes it; its size in bytes is told; rows are copied by `fork`."""
    built = harness(kind)
    state = built.config.init_state(D_MODEL, B, 24)
    jax.tree.map(assert_array_equal, state, built.state())
    assert isinstance(state, Cache)
    assert state.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
    numbered = jax.tree.map(lambda leaf: leaf + jnp.arange(B).reshape(B, *[1] * (leaf.ndim - 1)), state)
    forked = numbered.fork(jnp.array([1, 1, 0]))
    jax.tree.map(lambda new, old: assert_array_equal(new, np.asarray(old)[[1, 1, 0]]), forked, numbered)
    with pytest.raises(ValueError, match="fork: row 2 is outside the batch, rows 0..1"):
        state.fork([0, 2])


@pytest.mark.parametrize("kind", STATEFUL)
def test_no_buffer_of_a_fresh_state_is_there_twice(kind):
    """Else the state cannot be donated."""
    leaves = jax.tree.leaves(harness(kind).state())
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size]
    assert len(set(pointers)) == len(pointers)


def test_bfloat16_states_come_from_configs_too():
    state = NSAConfig(num_heads=2).init_state(32, 1, 64, cache=CacheOptions(jnp.bfloat16))
    assert state.selected.k_BSKH.dtype == state.compressed.v_BCKH.dtype == jnp.bfloat16
    assert (
        make_config("gla").init_state(32, 1, 64, cache=CacheOptions(jnp.bfloat16)).matrix_BNHM.dtype
        == jnp.float32
    )


def test_prefill_and_decode_step_give_the_uncached_logits(small):
    """Two prompts, one left-padded; a row that is not active keeps its caches and its position."""
    config, params = small
    tokens = np.random.default_rng(0).integers(0, 31, (2, 9))
    positions = np.array([np.arange(5), [-1, -1, 0, 1, 2]])
    whole = jax.jit(lambda t: apply(config, params, t).logits)
    step = jax.jit(lambda s, t, active: decode_step(config, params, s, t, active))
    for scan_layers in (False, True):
        scanned = dataclasses.replace(config, scan_layers=scan_layers)
        state = jax.jit(lambda t, p, c=scanned: prefill(c, params, t, p, capacity=16))(
            tokens[:, :5], positions
        )
        assert_array_equal(state.positions_B, [5, 3])
        assert_allclose(state.logits_BV[0], whole(tokens)[0, 4], rtol=1e-5, atol=1e-5)
        if scan_layers:
            continue
        paused = step(state, tokens[:, 5], np.array([True, False]))
        assert_array_equal(paused.positions_B, [6, 3])
        jax.tree.map(lambda new, old: assert_array_equal(new[1], old[1]), paused.caches, state.caches)
        for t in (5, 6, 7, 8):
            state = step(state, tokens[:, t], np.array([True, True]))
            assert_allclose(state.logits_BV[0], whole(tokens)[0, t], rtol=1e-5, atol=1e-5)
            alone = np.concatenate([tokens[1, 2 : t + 1], np.zeros(9 - (t - 1), int)])[None]
            assert_allclose(state.logits_BV[1], whole(alone)[0, t - 2], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of capacity 4"):
        prefill(config, params, tokens[:, :5], capacity=4)


def test_the_memory_is_filled_by_the_prefill():
    config = ModelConfig(
        vocab_size=31,
        d_model=16,
        num_layers=2,
        mixers=(make_config("softmax", num_heads=2), make_config("cross", num_heads=2)),
    )
    params = random_params(config)
    assert [state.nbytes for state in init_state(config, 2, 8)] == [2 * (8 * (2 * 16 * 4 + 4) + 4), 0]
    memory = jax.random.normal(jax.random.key(1), (2, 3, 16))
    tokens = jnp.arange(8).reshape(2, 4)
    start = jax.jit(lambda t, m: prefill(config, params, t, capacity=8, memory_BSD=m))
    state = start(tokens[:, :3], memory)
    assert state.caches[1].k_BSKH.shape == (2, 3, 2, 8)
    with pytest.raises(ValueError, match="the state of cross-attention holds the memory of the first call"):
        apply(
            config, params, tokens[:, 3:], state.caches, ctx=Context(jnp.array([[3], [3]]), memory_BSD=memory)
        )
    logits = jax.jit(lambda s, t: decode_step(config, params, s, t))(state, tokens[:, 3]).logits_BV
    whole = jax.jit(lambda t, m: apply(config, params, t, ctx=Context(memory_BSD=m)).logits)(tokens, memory)
    assert_allclose(logits, whole[:, 3], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs ctx.memory_BSD"):
        prefill(config, params, tokens, capacity=8)
    with pytest.raises(ValueError, match="no encoder"):
        encode(config, params, tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": "foo"}, "qk_norm must be one of rms, l2, .*, None, got 'foo'"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 0.99\], got 1.5"),
        ({"sink_logits": 4}, r"sink_logits must be true or false, got 4; .*Sinks\(n\)"),
        ({"rope": {}}, "rope must be a RoPE or null, got {}"),
        ({"num_head": 4}, "mixer 'softmax' has no option 'num_head'; did you mean num_heads"),
        ({"num_heads": 5}, "d_model 32 is not divisible by num_heads 5"),
        ({"config": make_config("gla")}, "Attention takes a AttentionConfig or its fields"),
        (
            {"config": AttentionConfig(), "num_heads": 2},
            r"as keywords, got AttentionConfig and \['num_heads'\]",
        ),
    ],
)
def test_direct_construction_makes_the_checks_of_the_config(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Attention(32, rngs=nnx.Rngs(0), **options)
    assert "\n" not in str(error.value)


def test_direct_construction_and_the_config_make_the_same_mixer():
    direct = Attention(32, num_heads=2, mask="SlidingWindow(3)", rngs=nnx.Rngs(0))
    built = AttentionConfig(num_heads=2, mask="SlidingWindow(3)").build(32, nnx.Rngs(0))
    assert direct.config == built.config
    jax.tree.map(assert_array_equal, nnx.state(direct), nnx.state(built))


@pytest.mark.parametrize("kind", KINDS)
def test_tabulate_works_on_every_mixer(kind, x):
    options = SMALL.get(kind, {})
    causal = mixer_kinds()[kind].direction != "bidirectional"
    mixer = make_mixer(kind, D_MODEL, rngs=nnx.Rngs(0), causal=causal, **options)
    ctx = {"ctx": Context(**memory)} if (memory := memory_of(kind, x)) else {}
    table = nnx.tabulate(mixer, x, **ctx, console_kwargs={"width": 200})
    assert type(mixer).__name__ in table and "Total Parameters" in table
    # A failed table once left the process unable to call any module.
    assert mixer(x, **ctx).shape == x.shape


def test_tabulate_works_on_the_language_model(small):
    config, params = small
    table = nnx.tabulate(bind(config, params), jnp.zeros((1, 4), int), console_kwargs={"width": 200})
    assert "LanguageModel" in table and "Total Parameters" in table


_PUBLISHED = "attention_jax/pretrained/"


def test_a_mechanism_is_known_to_its_own_file_and_one_registration():
    """No other file of library and trainer names its classes: they ask for traits.

    A published architecture is made of certain mechanisms, so that the files of those name them.
    """
    root = pathlib.Path(__file__).parent.parent
    files = [p for folder in ("attention_jax", "train") for p in (root / folder).rglob("*.py")]
    prose = re.compile(r'"""(?:.|\n)*?"""|"[^"\n]*"|#.*')
    code = {str(path.relative_to(root)): prose.sub("", path.read_text()) for path in files}
    for config in mixer_kinds().values():
        for cls in (config, config.module):
            word = re.compile(rf"(?<![\w.`]){cls.__name__}(?!\w)")
            known = {path for path, text in code.items() if word.search(text) and _PUBLISHED not in path}
            own = "/".join(cls.__module__.split(".")) + ".py"
            assert known - {"attention_jax/__init__.py"} == {own, "attention_jax/mixers/__init__.py"}, (
                cls.__name__,
                known,
            )


def test_a_kind_is_registered_by_its_definition():
    assert all(isinstance(config(), MixerConfig) for config in mixer_kinds().values())
    assert len({config.module for config in mixer_kinds().values()}) == len(mixer_kinds())


@pytest.mark.parametrize(("length", "frames"), [(256, 16), (32, 11)], ids=["blocked", "dense"])
def test_few_functions_lie_between_apply_and_the_first_product_of_attention(monkeypatch, length, frames):
    """Who follows a batch with a debugger passes this many functions of the library, `apply` included."""
    root = str(pathlib.Path(__file__).parent.parent / "attention_jax")
    config = ModelConfig(
        vocab_size=31, d_model=32, num_layers=2, mixers=(make_config("softmax", num_kv_heads=2, rope=RoPE()),)
    )
    stacks = []

    def record(function):
        def called(*args, **options):
            own = [f.name for f in traceback.extract_stack() if f.filename.startswith(root)]
            if "dot_product_attention" in own:
                stacks.append(own)
            return function(*args, **options)

        return called

    monkeypatch.setattr(jax.lax, "dot_general", record(jax.lax.dot_general))
    monkeypatch.setattr(jnp, "einsum", record(jnp.einsum))
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    jax.eval_shape(lambda p, t: apply(config, p, t), params, jax.ShapeDtypeStruct((1, length), jnp.int32))
    assert len(stacks[0]) == frames, stacks[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttentionConfig(num_heads=4.0), "num_heads must be an integer, got 4.0"),
        (lambda: AttentionConfig(num_heads="4"), "num_heads must be an integer, got '4'"),
        (lambda: AttentionConfig(num_heads=True), "num_heads must be an integer, got True"),
        (lambda: AttentionConfig(use_bias=1), "use_bias must be true or false, got 1"),
        (lambda: AttentionConfig(scale="2"), "scale must be a number or None, got '2'"),
        (lambda: AttentionConfig(mask=masks.Causal), r"mask must be a Mask .* write Causal\(\)"),
        (lambda: ModelConfig(num_layers="1"), "num_layers must be an integer, got '1'"),
        (lambda: ModelConfig(mixers=AttentionConfig()), "mixers must be a sequence .* put it in a tuple"),
        (lambda: Context(capture="attention"), "capture must be a set of names, got 'attention'"),
        (lambda: Attention(8, num_heads=2, rngs=jax.random.key(0)), "rngs must be nnx.Rngs"),
        (lambda: init_params(ModelConfig(vocab_size=8), 0), "key must be a PRNG key .* got int"),
        (lambda: biases.ALiBi(jnp.ones(4)), "ALiBi takes the number of query heads"),
    ],
)
def test_a_wrong_type_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_numpy_integers_and_whole_floats_for_floats_are_numbers():
    assert AttentionConfig(num_heads=np.int64(2), scale=1, softcap=np.float32(2.0)).num_heads == 2


def test_inputs_of_a_wrong_shape_are_refused_in_our_words(small):
    config, params = small
    layer = Attention(8, num_heads=2, rngs=nnx.Rngs(0))
    for x in (jnp.ones((1, 4, 6)), jnp.ones((4, 8))):
        with pytest.raises(ValueError, match=r"x must be \[B, T, 8\], got"):
            layer(x)
    for tokens in (jnp.zeros(4, int), jnp.zeros((1, 4))):
        with pytest.raises(ValueError, match=r"tokens must be integers \[B, T\], got"):
            apply(config, params, tokens)
    ctx = Context(capture={"attention"})
    with pytest.raises(ValueError, match=r"call Attention.mix\(...\)"):
        layer(jnp.ones((1, 4, 8)), ctx=ctx)
    with pytest.raises(ValueError, match=r"call LanguageModel.run\(...\)"):
        bind(config, params)(jnp.zeros((1, 4), int), ctx=ctx)


def test_every_mask_is_exported_at_the_top():
    patterns = {
        n for n in masks.__all__ if isinstance(m := getattr(masks, n), type) and issubclass(m, masks.Mask)
    }
    assert {name for name in patterns if getattr(masks, name).about} <= set(attention_jax.__all__)


@pytest.fixture
def registry(monkeypatch):
    """The registered kinds, restored after the test."""
    monkeypatch.setattr(base.MixerConfig, "_members", base.MixerConfig.kinds())


def test_a_kind_or_config_that_another_class_has_is_refused(registry):
    """Else a model of the library would silently be built with the new class."""
    message = (
        r"^kind 'softmax' of .*Mine is already that of AttentionConfig in attention_jax.mixers.attention: "
    )
    with pytest.raises(ValueError, match=message):

        class Mine(AttentionConfig):
            kind: str = "softmax"

    with pytest.raises(
        ValueError, match=r"^config_type AttentionConfig of .*Other already builds Attention: "
    ):

        class Other(Attention):
            config_type = AttentionConfig

    assert mixer_kinds()["softmax"] is AttentionConfig and AttentionConfig.module is Attention


def test_a_definition_may_be_run_again(registry):
    """As a cell of a notebook."""
    for _ in range(2):

        @dataclasses.dataclass(frozen=True)
        class Again(AttentionConfig):
            kind: str = dataclasses.field(default="again")

        class AgainAttention(Attention):
            config_type = Again

        assert mixer_kinds()["again"] is Again and Again.module is AgainAttention


def test_a_config_without_a_kind_of_its_own_is_built_from_keywords():
    @dataclasses.dataclass(frozen=True)
    class Wide(AttentionConfig):
        extra: int = 1

    class WideAttention(Attention):
        config_type = Wide

    mixer = WideAttention(D_MODEL, num_heads=2, extra=3, rngs=nnx.Rngs(0))
    assert mixer.config == Wide(num_heads=2, extra=3)
    with pytest.raises(ValueError, match="mixer 'softmax' has no option 'extr'; did you mean extra"):
        WideAttention(D_MODEL, extr=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mixer 'softmax' has no option 'kind'"):
        Attention(D_MODEL, kind="gla", rngs=nnx.Rngs(0))
    assert type(Attention(D_MODEL, rngs=nnx.Rngs(0)).config) is AttentionConfig


@pytest.mark.parametrize("rows", [2, [True, False], np.array([False, True]), [0.5], [[0, 1]], []])
def test_rows_to_fork_are_integers(rows):
    """A boolean array would select rows, as a mask does."""
    with pytest.raises(ValueError, match=r"^fork: rows must be integers \[B'\], got "):
        make_config("gla").init_state(D_MODEL, B, 24).fork(rows)


@pytest.mark.parametrize("kind", ["softmax", "forgetting", "nsa", "gla"])
def test_fork_copies_rows_of_scanned_layers_too(kind):
    """A model whose layers are scanned in training has a state per layer, as any other."""
    config = ModelConfig(
        vocab_size=11, d_model=D_MODEL, num_layers=3, mixers=(make_config(kind),), scan_layers=True
    )
    states = jax.tree.map(
        lambda leaf: leaf + jnp.arange(B).reshape(B, *[1] * (leaf.ndim - 1)).astype(leaf.dtype),
        init_state(config, B, 64),
    )
    assert len(states) == config.num_layers
    state, rows = states[2], np.array([1, 1, 0])
    jax.tree.map(lambda new, old: assert_array_equal(new, np.asarray(old)[rows]), state.fork(rows), state)
    with pytest.raises(ValueError, match="fork: row 2 is outside the batch, rows 0..1"):
        state.fork([2])


def test_positions_of_a_prefill_are_checked_and_made_int32_per_row(small):
    config, params = small
    tokens = np.arange(6, dtype=np.int32).reshape(2, 3)
    plain = prefill(config, params, tokens, capacity=8)
    for positions in (np.arange(3), np.arange(3, dtype=np.int16)[None], [[0, 1, 2], [0, 1, 2]]):
        state = prefill(config, params, tokens, positions, capacity=8)
        assert state.positions_B.dtype == jnp.int32 and state.positions_B.tolist() == [3, 3]
        assert_array_equal(state.logits_BV, plain.logits_BV)
    for wrong in (np.zeros((2, 1), int), np.zeros(3, int), np.zeros(2)):
        with pytest.raises(ValueError, match=r"^tokens_B must be integers \[2\], got "):
            decode_step(config, params, plain, wrong)
    for positions in (np.arange(4), np.zeros((3, 3), np.int32), np.zeros((2, 3))):
        with pytest.raises(ValueError, match=r"^positions_BT must be integers \[2, 3\], got "):
            prefill(config, params, tokens, positions, capacity=8)
    with pytest.raises(ValueError, match=r"^prompts must be left-padded: "):
        prefill(config, params, tokens, np.array([[0, 1, 2], [0, 1, -1]]), capacity=8)
