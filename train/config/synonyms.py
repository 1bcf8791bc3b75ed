"""What keys and values of other trainers are called here, in words as `attention_jax.hints` compares them."""

from __future__ import annotations

from attention_jax.hints import by_word

#: Keys of other libraries, in whatever section they are written.
KEYS = by_word(
    {
        "the learning rate is optimizer.learning_rate": "lr maxlr peaklr",
        "the last learning rate is optimizer.final_learning_rate": "minlr",
        "weight decay is optimizer.weight_decay": "wd",
        "Adam's epsilon is optimizer.epsilon; that of the norms is model.norm_eps": "eps",
        "Adam's betas are optimizer.beta1 and optimizer.beta2": "betas",
        "it is optimizer.beta1": "adambeta1",
        "it is optimizer.beta2": "adambeta2",
        "gradients are clipped by optimizer.clip_norm": (
            "gradclip clip maxgradnorm gradientclipping gradientclipval"
        ),
        "it is optimizer.accumulation_steps": "gradientaccumulationsteps gradaccum accumulategradbatches",
        "the warm-up is optimizer.warmup_steps": "warmup warmupiters",
        "the warm-up is optimizer.warmup_steps, a number of steps": "warmupratio",
        "the schedule is optimizer.schedule: cosine, wsd or constant": "scheduler lrscheduler",
        "it is optimizer.decay_steps": "lrdecayiters",
        "training is counted in steps, an update each": "epochs epoch numepochs nepochs maxepochs numtrainepochs",
        "the number of updates is steps": (
            "iters iterations maxiters maxsteps numsteps nsteps trainsteps totalsteps"
        ),
        "the rows per step are data.batch_size": "batch bs batches perdevicetrainbatchsize",
        "the rows per step are data.batch_size, in optimizer.accumulation_steps parts": "microbatchsize",
        "the tokens per row are data.sequence_length": (
            "seqlen seqlength maxseqlen maxlength length contextlength context ctxlen nctx blocksize"
        ),
        "learned positions are model.max_positions; the tokens per row data.sequence_length": (
            "maxpositionembeddings"
        ),
        "the model's width is model.d_model": (
            "hiddensize hiddendim hidden nembd embeddim embeddingdim embdim dim modeldim width"
        ),
        "the number of layers is model.num_layers": "nlayer nlayers layers depth numhiddenlayers numblocks",
        "the number of heads is num_heads of a mixer: model.mixers.0.num_heads": (
            "heads nhead nheads numattentionheads"
        ),
        "the key-value heads are num_kv_heads of a mixer: model.mixers.0.num_kv_heads": (
            "kvheads nkvheads numkeyvalueheads numgroups"
        ),
        "the width of a head is head_dim of a mixer: model.mixers.0.head_dim": "headsize dhead",
        "it is theta of a mixer's rope: model.mixers.0.rope.theta": "ropetheta ropebase",
        "RoPE's base is theta of a mixer's rope: model.mixers.0.rope.theta": "base",
        "a window is a mask of a mixer: model.mixers.0.mask=SlidingWindow(128)": "windowsize slidingwindow",
        "it is dropout of a mixer: model.mixers.0.dropout": "attentiondropout attnpdrop",
        "it is model.dropout, of the embeddings and the residual branches": "residpdrop",
        "the attention is a list of mixers: model.mixers.0.kind=gla": "attention attn",
        "the mixers are a list: model.mixers.0.kind=gla": "mixer mechanism",
        "the feed-forward is model.mlp, its width model.mlp_width": "ffn",
        "the feed-forward's width is model.mlp_width": "dff ffndim intermediatesize",
        "the feed-forward's width is model.mlp_width, in features": "mlpratio",
        "the activation goes with model.mlp: swiglu, geglu or gelu": "activation hiddenact",
        "biases of the feed-forward are model.use_bias, those of a mixer model.mixers.0.use_bias": "bias",
        "it is model.norm_eps": "rmsnormeps layernormeps",
        "it is model.init_std": "initializerrange",
        "it is model.tie_embeddings": "tiewordembeddings weighttying",
        "the number of token ids is model.vocab_size; null takes the tokenizer's": "vocab",
        "the dtype of the computation is model.dtype": "precision",
        "the dtype of the computation is model.dtype: bfloat16": "mixedprecision bf16 amp",
        "the dtype of the computation is model.dtype: float32 or bfloat16": "fp16",
        "rematerialisation is model.remat: nothing_saveable": (
            "gradientcheckpointing activationcheckpointing checkpointing"
        ),
        "positions are model.max_positions, model.sinusoidal, or rope or bias of a mixer": (
            "posemb positionembedding positionalencoding"
        ),
        "the run's folder is run_dir": "outdir outputdir logdir savedir workdir",
        "the text is data.files, a glob": "dataset datapath datadir trainfile file",
        "the held-out part is data.validation_fraction and data.validation_split": "valsplit",
        "it is evaluation.every": "evalinterval evalevery evalsteps",
        "it is evaluation.batches": "evaliters",
        "it is checkpoint.every": "saveevery saveinterval savesteps",
        "it is checkpoint.keep": "savetotallimit",
        "it is log_every": "loginterval loggingsteps",
        "the prompt of samples is evaluation.sample_prompt": "prompt",
        "the objective is objective; a synthetic task is data.task": "task",
        "the loss goes with objective: causal_lm, seq2seq or masked_lm": "loss",
        "it is seed": "randomseed",
        "jax chooses the device; the environment variable JAX_PLATFORMS=cpu selects one": "device",
        "the optimiser is AdamW; there is no other to choose": "optimizerkind optimizername optimizertype",
    }
)

#: By key, what to write instead of a value that is not known.
VALUES = {
    "optimizer": by_word(
        {
            "the optimiser is AdamW; give its keys, such as optimizer.learning_rate": (
                "adam adamw sgd lion muon adafactor momentum shampoo soap"
            ),
        }
    ),
    "schedule": by_word(
        {
            "a linear decay at the end is wsd; with decay_steps = steps - warmup_steps it is linear throughout": (
                "linear"
            ),
            "write wsd": "warmupstabledecay trapezoidal",
            "write constant": "none",
            "write cosine": "cos",
        }
    ),
    "tokenizer": by_word(
        {
            "write bytes": "byte",
            "write chars": "char character",
            "there are bytes and chars only": "bpe gpt2 sentencepiece words",
        }
    ),
    "packing": by_word(
        {
            "write stream for windows of the concatenated text": "none false",
            "write documents": "true",
        }
    ),
    "objective": by_word(
        {
            "the next token is causal_lm": "lm clm ar nexttoken",
            "write masked_lm": "mlm",
            "masked tokens are masked_lm": "bert",
            "write seq2seq": "translation encoderdecoder",
        }
    ),
}
