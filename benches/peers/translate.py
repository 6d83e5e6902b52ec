"""An encoder-decoder that translates, in PyTorch: the twin of EmberLM's `EncoderDecoder` on data/verses-en-es.tsv.

    pip install torch numpy safetensors tokenizers sacrebleu
    python translate.py --check                               # against torch.nn.Transformer; seconds
    python translate.py --report verses.json                  # trains, translates the held-out pairs, scores
    python translate.py --steps 20 --held-out 20              # the same in little
    python translate.py --weights start.safetensors --batches batches.jsonl --dropout 0 --steps 20   # another's start
    python translate.py --weights start.safetensors --batches batches.jsonl --beside "PROGRAM ARGUMENTS"

Model: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762) with the norm before each half, and one after each stack.
Width 256, 4 heads, 3 encoder and 3 decoder layers, inner width 1024, ReLU, biases everywhere, layer norm with epsilon
1e-5. One table of 4,096 byte-level BPE tokens, learned on both sides of the training pairs, is the embedding of source
and target and the output projection; as embedding it is multiplied by sqrt(256). Sinusoidal positions, sine and cosine
alternating. Dropout 0.1 on embeddings, attention weights, inner activations and the output of each half. 6.6 million
parameters, drawn from N(0, 0.02), those that write into the residual stream divided by the root of the number of halves
in their stack, biases 0.

Training: 2,560 steps of AdamW (betas 0.9 and 0.98, epsilon 1e-8, decay 0.1 on the weights of linear layers alone), rate
`1e-3 min(step / 400, sqrt(400 / step))`, which warms up over 400 steps (`--warmup`), gradients clipped to a global norm
of 1, the mean over target tokens of the cross-entropy with label smoothing 0.1. A batch has at most 1,500 target
tokens, padding included. In each epoch the pairs are shuffled, sorted by length in pools of 2,000, cut into batches,
and the batches are shuffled.

Data: a pair is held out by the rule of `PairCorpus::split_random` with seed 0, so both sides hold out the same 500. The
encoder reads the source's tokens and `<end>`; the decoder reads `<begin>` and the target's tokens and predicts these
and `<end>`. Held-out sources are translated greedily with a cache, 50 of like length at a time, until all have ended or
have twice as many tokens as the longest source and 16 more; BLEU and chrF2 are sacreBLEU's.

From files, to do what another program does:

- `--weights FILE.safetensors`: where training starts. Float32, linear weights `[d_input, d_output]`; for N from 0:

      embedding.tokens.weight                                  [4096, 256]
      encoder.blocks.N.mixer_norm.{gamma,beta}
      encoder.blocks.N.mixer.{query,key,value,output}.{weight,bias}
      encoder.blocks.N.feed_forward_norm.{gamma,beta}
      encoder.blocks.N.feed_forward.{up,down}.{weight,bias}    up [256, 1024], down [1024, 256]
      encoder.norm.{gamma,beta}
      decoder.blocks.N.mixer_norm, mixer                       self-attention, as above
      decoder.blocks.N.cross_norm, cross                       attention to the encoder's output, as mixer
      decoder.blocks.N.feed_forward_norm, feed_forward         as above
      decoder.norm.{gamma,beta}

  The number of rows of `embedding.tokens.weight` may be another. `--save-weights FILE` writes such a file after the last step.
- `--batches FILE.jsonl`: a batch a line, `{"source": [[5, 9, 2], ..], "target": [[1, 7, 8, 2], ..]}`: token ids without
  padding, as the encoder reads them, and as the decoder reads and predicts them, `<begin>` and `<end>` included. Step
  `k` takes line `k` and begins again after the last. Nothing is shuffled.
- `--tokenizer FILE.json`: a file of Hugging Face's `tokenizers` that has `<begin>` and `<end>`.

With `--dropout 0` and the same files the losses must be the other program's, up to rounding.

`--serve` answers commands on standard input, each with a line of JSON, after one with `contender` and `parameters`:

- `steps N`: the next N training steps. `step_ms`, `losses`, `target_tokens` (without padding) of each;
  `median_step_ms`; `cpu_utilisation` and `peak_bytes` as in decoder.py.
- `decode N`: greedy decoding of the sources of the next N batches, each for 40 tokens, whatever comes: `seconds` and
  `tokens`.

`--beside PROGRAM` starts a program that answers to `steps` in the same way, and this script with `--serve`, and lets
them take turns: medians, ratios over the program's time, and how far the losses differ.
"""

import argparse
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from common import HERE, THREADS, begin_memory, load_burn_weights, peak_bytes, save_burn_weights
from decoder import optimizer_of
from side_by_side import HEADER, row, summary

BEGIN, END = "<begin>", "<end>"
IGNORED = -100  # F.cross_entropy's own
MAX_LENGTH = 1024
MAX_TARGET_TOKENS = 1500
POOL = 2000
PEAK_RATE = 1e-3
SMOOTHING = 0.1
DECODED_AT_ONCE = 50
TIMED_TOKENS = 40


@dataclass(frozen=True)
class Sizes:
    vocab_size: int = 4096
    d_model: int = 256
    n_heads: int = 4
    n_encoder_layers: int = 3
    n_decoder_layers: int = 3
    d_ff: int = 1024
    dropout: float = 0.1


class Attention(nn.Module):
    """Multi-head attention of `x` to itself or to `memory`."""

    def __init__(self, sizes):
        super().__init__()
        self.n_heads, self.dropout = sizes.n_heads, sizes.dropout
        for name in ["query", "key", "value", "output"]:
            setattr(self, name, nn.Linear(sizes.d_model, sizes.d_model))

    def heads(self, projection, x):
        return projection(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def keys_and_values(self, x):
        return self.heads(self.key, x), self.heads(self.value, x)

    def attend(self, x, keys, values, visible=None, causal=False):
        rate = self.dropout if self.training else 0.0
        query = self.heads(self.query, x)
        y = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, dropout_p=rate, is_causal=causal)
        return self.output(y.transpose(1, 2).flatten(2))

    def forward(self, x, memory=None, visible=None, causal=False):
        return self.attend(x, *self.keys_and_values(x if memory is None else memory), visible, causal)


class FeedForward(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.up = nn.Linear(sizes.d_model, sizes.d_ff)
        self.down = nn.Linear(sizes.d_ff, sizes.d_model)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x):
        return self.down(self.dropout(F.relu(self.up(x))))


class EncoderBlock(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.mixer_norm = nn.LayerNorm(sizes.d_model)
        self.mixer = Attention(sizes)
        self.feed_forward_norm = nn.LayerNorm(sizes.d_model)
        self.feed_forward = FeedForward(sizes)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x, visible):
        x = x + self.dropout(self.mixer(self.mixer_norm(x), visible=visible))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderBlock(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.mixer_norm = nn.LayerNorm(sizes.d_model)
        self.mixer = Attention(sizes)
        self.cross_norm = nn.LayerNorm(sizes.d_model)
        self.cross = Attention(sizes)
        self.feed_forward_norm = nn.LayerNorm(sizes.d_model)
        self.feed_forward = FeedForward(sizes)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x, memory, visible):
        # Padding is at the end, where no real position sees it.
        x = x + self.dropout(self.mixer(self.mixer_norm(x), causal=True))
        x = x + self.dropout(self.cross(self.cross_norm(x), memory, visible))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Stack(nn.Module):
    def __init__(self, block, n_layers, sizes):
        super().__init__()
        self.blocks = nn.ModuleList(block(sizes) for _ in range(n_layers))
        self.norm = nn.LayerNorm(sizes.d_model)

    def forward(self, x, *others):
        for block in self.blocks:
            x = block(x, *others)
        return self.norm(x)


def sinusoids(length, d_model):
    """Vaswani et al., section 3.5: sine at even components, cosine at odd ones."""
    frequencies = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class EncoderDecoder(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.embedding = nn.ModuleDict({"tokens": nn.Embedding(sizes.vocab_size, sizes.d_model)})
        self.encoder = Stack(EncoderBlock, sizes.n_encoder_layers, sizes)
        self.decoder = Stack(DecoderBlock, sizes.n_decoder_layers, sizes)
        self.dropout = nn.Dropout(sizes.dropout)
        self.scale = math.sqrt(sizes.d_model)
        self.register_buffer("positions", sinusoids(MAX_LENGTH, sizes.d_model).float(), persistent=False)
        halves = {"encoder": 2 * sizes.n_encoder_layers, "decoder": 3 * sizes.n_decoder_layers}
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("output.weight", "down.weight"))
                n_halves = halves[name.partition(".")[0]] if writes else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(n_halves))
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def embed(self, tokens, first_position=0):
        positions = self.positions[first_position : first_position + tokens.shape[1]]
        return self.dropout(self.embedding.tokens(tokens) * self.scale + positions)

    def encode(self, source, visible):
        return self.encoder(self.embed(source), visible)

    def scores(self, hidden):
        return F.linear(hidden, self.embedding.tokens.weight)

    def forward(self, source, visible, inputs):
        memory = self.encode(source, visible)
        return self.scores(self.decoder(self.embed(inputs), memory, visible))


def pad(rows, value):
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def pad_sources(rows):
    """The sources, and which of their positions are not padding, as attention takes it."""
    source = pad(rows, 0)
    lengths = torch.tensor([len(row) for row in rows])
    visible = torch.arange(source.shape[1]) < lengths[:, None]
    return source, None if visible.all() else visible[:, None, None]


class Batch:
    """`sources` and `targets` are lists of token ids, without padding."""

    def __init__(self, sources, targets):
        self.sources = sources
        self.source, self.visible = pad_sources(sources)
        self.inputs = pad([row[:-1] for row in targets], 0)
        self.targets = pad([row[1:] for row in targets], IGNORED)
        self.n_target_tokens = sum(len(row) - 1 for row in targets)


def loss_of(model, batch):
    scores = model(batch.source, batch.visible, batch.inputs)
    return F.cross_entropy(
        scores.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, label_smoothing=SMOOTHING
    )


def rate_at(step, warmup):
    """The learning rate of a step, which count from 1."""
    return PEAK_RATE * min(step / warmup, math.sqrt(warmup / step))


class Trainer:
    """A model in training on an endless sequence of batches."""

    def __init__(self, model, batches, warmup):
        self.model, self.batches, self.warmup = model.train(), batches, warmup
        self.optimizer = optimizer_of(model, PEAK_RATE)
        for group in self.optimizer.param_groups:
            group["betas"] = (0.9, 0.98)
        self.n_steps = 0

    def step(self, batch):
        """One update; returns the loss of the batch."""
        self.n_steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.n_steps, self.warmup)
        self.optimizer.zero_grad()
        loss = loss_of(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def timed_steps(self, n_steps):
        """The figures of some steps; making the tensors of a batch is not in the times."""
        self.optimizer.zero_grad()
        resident = begin_memory()
        losses, seconds, cpu_seconds, tokens = [], [], [], []
        for _ in range(n_steps):
            batch = next(self.batches)
            begin, cpu_begin = time.perf_counter(), time.process_time()
            losses.append(self.step(batch))
            cpu_seconds.append(time.process_time() - cpu_begin)
            seconds.append(time.perf_counter() - begin)
            tokens.append(batch.n_target_tokens)
        return {
            "step_ms": [1e3 * each for each in seconds],
            "losses": losses,
            "target_tokens": tokens,
            "median_step_ms": 1e3 * statistics.median(seconds),
            "cpu_utilisation": sum(cpu_seconds) / sum(seconds),
            "peak_bytes": peak_bytes(resident),
        }


class Cached:
    """A decoder on one batch of sources, with the keys and values so far in tensors allocated once."""

    def __init__(self, model, sources, capacity):
        source, self.visible = pad_sources(sources)
        memory = model.encode(source, self.visible)
        self.model, self.length = model, 0
        self.layers = []
        for block in model.decoder.blocks:
            shape = (len(sources), block.mixer.n_heads, capacity, memory.shape[2] // block.mixer.n_heads)
            own = memory.new_zeros(shape), memory.new_zeros(shape)
            self.layers.append((block, own, block.cross.keys_and_values(memory)))

    def scores(self, tokens):
        """Scores of the token after `tokens`, `[batch_size, 1]`, which follow on those before."""
        x = self.model.embed(tokens, self.length)
        for block, own, memory in self.layers:
            normed = block.mixer_norm(x)
            for cache, new in zip(own, block.mixer.keys_and_values(normed)):
                cache[:, :, self.length : self.length + 1] = new
            keys, values = (cache[:, :, : self.length + 1] for cache in own)
            x = x + block.mixer.attend(normed, keys, values)
            x = x + block.cross.attend(block.cross_norm(x), *memory, self.visible)
            x = x + block.feed_forward(block.feed_forward_norm(x))
        self.length += 1
        return self.model.scores(self.model.decoder.norm(x[:, -1]))


@torch.inference_mode()
def decode(model, sources, begin, end, n_tokens):
    """What greedy decoding makes of some sources: at most `n_tokens` ids each, without `begin` and `end`; with no `end`
    exactly that many."""
    cached = Cached(model, sources, n_tokens)
    new = torch.full((len(sources), 1), begin)
    columns, ended = [], torch.zeros(len(sources), dtype=torch.bool)
    while len(columns) < n_tokens and not ended.all():
        new = cached.scores(new).argmax(dim=-1, keepdim=True)
        columns.append(new)
        if end is not None:
            ended |= new[:, 0] == end
    rows = torch.cat(columns, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def translate(model, sources, begin, end):
    """Translations of all sources, in their order."""
    model.eval()
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    translations = [None] * len(sources)
    for first in range(0, len(order), DECODED_AT_ONCE):
        chosen = order[first : first + DECODED_AT_ONCE]
        limit = min(2 * len(sources[chosen[-1]]) + 16, MAX_LENGTH)
        for i, ids in zip(chosen, decode(model, [sources[i] for i in chosen], begin, end, limit)):
            translations[i] = ids
    return translations


WORD = 2**64 - 1


def mix(z):
    """A step of splitmix64."""
    z = (z + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def fnv(content):
    """The 64-bit FNV-1a hash."""
    value = 0xCBF29CE484222325
    for byte in content:
        value = ((value ^ byte) * 0x100000001B3) & WORD
    return value


def read_pairs(path, n_held_out, seed=0):
    """The training pairs and the held-out pairs of text, by the rule of `PairCorpus::split_random`."""
    lines = path.read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split("\t")[:2]) for line in lines if line]
    by_number = {}
    for i, (source, _) in enumerate(pairs):
        by_number.setdefault(mix(fnv(source.encode()) ^ mix(seed)), []).append(i)
    held_out = set()
    for _, same_source in sorted(by_number.items()):
        if len(held_out) + len(same_source) <= n_held_out:
            held_out.update(same_source)
    parts = [], []
    for i, pair in enumerate(pairs):
        parts[i in held_out].append(pair)
    return parts


def learn_tokenizer(pairs, vocab_size):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((side for pair in pairs for side in pair), trainer)
    return tokenizer


def load_tokenizer(path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    if None in (tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)):
        sys.exit(f"{path} lacks {BEGIN} or {END}")
    return tokenizer


class Ids:
    """Text as token ids and back."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.begin, self.end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)

    def sources(self, texts):
        return [[*encoding.ids, self.end] for encoding in self.tokenizer.encode_batch(texts)]

    def targets(self, texts):
        return [[self.begin, *encoding.ids, self.end] for encoding in self.tokenizer.encode_batch(texts)]

    def pairs(self, pairs):
        sources, targets = zip(*pairs)
        return list(zip(self.sources(sources), self.targets(targets)))

    def texts(self, rows):
        return self.tokenizer.decode_batch(rows)


def epoch(pairs, generator):
    """Lists of pairs of ids, each of at most MAX_TARGET_TOKENS padded target tokens or of one pair; every pair once."""
    order = pairs.copy()
    generator.shuffle(order)
    batches = []
    for first in range(0, len(order), POOL):
        rows = []
        for pair in sorted(order[first : first + POOL], key=lambda pair: (len(pair[1]), len(pair[0]))):
            # The next pair is the longest so far.
            if rows and (len(rows) + 1) * (len(pair[1]) - 1) > MAX_TARGET_TOKENS:
                batches.append(rows)
                rows = []
            rows.append(pair)
        batches.append(rows)
    generator.shuffle(batches)
    return batches


def endless(pairs, seed):
    generator = random.Random(seed)
    while True:
        for rows in epoch(pairs, generator):
            yield Batch(*zip(*rows))


def endless_from(path):
    """The batches of a file, over and over."""
    lines = path.read_text().splitlines()
    if not lines:
        sys.exit(f"{path} has no batches")
    while True:
        for number, line in enumerate(lines, 1):
            try:
                content = json.loads(line)
                yield Batch(content["source"], content["target"])
            except (KeyError, TypeError, ValueError) as error:
                sys.exit(f"{path}, line {number}: not a batch: {error!r}")


def load_model(args):
    """A model with the weights of the file, or with new ones."""
    torch.manual_seed(args.seed)
    sizes = Sizes(dropout=args.dropout)
    if not args.weights:
        return EncoderDecoder(sizes)
    from safetensors import safe_open

    try:
        with safe_open(args.weights, "pt") as tensors:
            vocab_size = tensors.get_slice("embedding.tokens.weight").get_shape()[0]
        model = EncoderDecoder(Sizes(vocab_size=vocab_size, dropout=args.dropout))
        load_burn_weights(model, args.weights)
    except Exception as error:  # safetensors' own errors are of several kinds.
        sys.exit(f"{args.weights}: {error}")
    return model


def load_data(args, vocab_size):
    """The text as ids, the training pairs as ids and the held-out pairs as text."""
    training, held_out = read_pairs(args.pairs, args.held_out)
    ids = Ids(load_tokenizer(args.tokenizer) if args.tokenizer else learn_tokenizer(training, vocab_size))
    if ids.tokenizer.get_vocab_size() > vocab_size:
        sys.exit(f"the tokenizer has {ids.tokenizer.get_vocab_size()} tokens, the model {vocab_size}")
    return ids, ids.pairs(training), held_out


def batches_of(args, training):
    return endless_from(args.batches) if args.batches else endless(training, args.seed)


def train(trainer, n_steps):
    """Trains; returns what the report holds of it."""
    losses, seconds, n_tokens = [], 0.0, 0
    for step in range(1, n_steps + 1):
        batch = next(trainer.batches)
        begin = time.perf_counter()
        losses.append(trainer.step(batch))
        seconds += time.perf_counter() - begin
        n_tokens += batch.n_target_tokens
        if step % 100 == 0 or step in (1, n_steps):
            recent = statistics.mean(losses[-100:])
            print(f"step {step}: mean loss of the last 100 {recent:.4f} nats a token, {seconds:.0f} s", flush=True)
    return {"losses": losses, "training_seconds": seconds, "target_tokens_per_second": n_tokens / seconds}


def evaluate(model, ids, held_out):
    """Scores of the held-out pairs by sacreBLEU."""
    from sacrebleu.metrics import BLEU, CHRF

    sources, references = zip(*held_out)
    begin = time.perf_counter()
    rows = translate(model, ids.sources(sources), ids.begin, ids.end)
    seconds = time.perf_counter() - begin
    translations = ids.texts(rows)
    bleu, chrf = BLEU(), CHRF()
    scores = {
        "bleu": bleu.corpus_score(translations, [references]).score,
        "chrf": chrf.corpus_score(translations, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
        "decoding_seconds": seconds,
        "decoded_tokens_per_second": sum(map(len, rows)) / seconds,
    }
    print(f"{len(held_out)} held-out pairs: BLEU {scores['bleu']:.2f}, chrF2 {scores['chrf']:.2f}, {seconds:.1f} s")
    for source, translation, reference in list(zip(sources, translations, references))[:3]:
        print(f"\n  {source}\n  {translation}\n  {reference}")
    return scores


def train_and_evaluate(args):
    model = load_model(args)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters} parameters, torch {torch.__version__}, {args.threads} threads", flush=True)
    ids, training, held_out = load_data(args, model.embedding.tokens.num_embeddings)
    result = train(Trainer(model, batches_of(args, training), args.warmup), args.steps) if args.steps else {}
    if args.save_weights:
        save_burn_weights(model, args.save_weights)
    if held_out:
        result |= evaluate(model, ids, held_out)
    if args.report:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        content = {"parameters": n_parameters, "torch": torch.__version__, "settings": settings, **result}
        args.report.write_text(json.dumps(content, indent=2) + "\n")


def serve(args):
    """Answers commands until the end of standard input."""
    model = load_model(args)
    training = None if args.batches else load_data(args, model.embedding.tokens.num_embeddings)[1]
    trainer = Trainer(model, batches_of(args, training), args.warmup)

    def answer(content):
        print(json.dumps(content), flush=True)

    answer({"contender": "pytorch", "parameters": sum(p.numel() for p in model.parameters())})
    for line in sys.stdin:
        match line.split():
            case ["steps", n] if n.isdecimal() and int(n) > 0:
                trainer.model.train()
                answer(trainer.timed_steps(int(n)))
            case ["decode", n] if n.isdecimal() and int(n) > 0:
                trainer.model.eval()
                answer(timed_decoding(model, [next(trainer.batches).sources for _ in range(int(n))]))
            case _:
                sys.exit(f"not a command: {line.strip()}")


def timed_decoding(model, batches):
    begin = time.perf_counter()
    n_tokens = 0
    for sources in batches:
        # What a model without training writes does not end by itself; token 0 begins it.
        n_tokens += sum(map(len, decode(model, sources, 0, None, TIMED_TOKENS)))
    return {"seconds": time.perf_counter() - begin, "tokens": n_tokens}


class Served:
    """A program that answers commands."""

    def __init__(self, command):
        environment = {**os.environ, "RAYON_NUM_THREADS": str(THREADS)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.command = shlex.join(command)
        self.name = self.answer()["contender"]

    def answer(self):
        line = self.process.stdout.readline()
        try:
            return json.loads(line)
        except ValueError:
            sys.exit(f"{self.command} did not answer with JSON: {line.strip()!r}")

    def ask(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def beside(args):
    """Training steps of a program and of this one, in turn."""
    own = [sys.executable, str(HERE / "translate.py"), "--serve", "--dropout", str(args.dropout)]
    own += ["--warmup", str(args.warmup), "--seed", str(args.seed), "--threads", str(args.threads)]
    for option in ["weights", "batches", "tokenizer", "pairs"]:
        value = getattr(args, option)
        own += [f"--{option}", str(value)] if value else []
    contenders = [Served(shlex.split(args.beside)), Served(own)]
    for served in contenders:
        served.ask("steps 3")  # These also allocate buffers and optimizer state.
    rounds = [[] for _ in contenders]
    for _ in range(args.rounds):
        for served, answers in zip(contenders, rounds):
            answers.append(served.ask(f"steps {args.round_steps}"))
            time.sleep(0.5)  # Its threads may go on waiting in a loop for a while.
    for served in contenders:
        served.stop()
    print_comparison(contenders, rounds)


def print_comparison(contenders, rounds):
    ours, theirs = rounds
    n_steps = sum(len(answer["step_ms"]) for answer in ours)
    mean_tokens = sum(sum(answer["target_tokens"]) for answer in theirs) / n_steps
    print(f"{mean_tokens:.0f} target tokens a step, {len(ours)} rounds, {n_steps} steps, {THREADS} threads")
    print(HEADER)
    for served, answers in zip(contenders, rounds):
        figures = [{"peak_bytes": None, "cpu_utilisation": None, "gflops": None, **answer} for answer in answers]
        print(row(summary(served.name, figures, ours, SimpleNamespace(tokens_per_step=mean_tokens))))
    losses = [[loss for answer in answers for loss in answer["losses"]] for answers in rounds]
    difference = max(abs(a - b) for a, b in zip(*losses))
    least, most = min(losses[0]), max(losses[0])
    print(f"largest difference of a loss: {difference:.1e}; the losses are {least:.3f} to {most:.3f}")


def same_parameters(model, reference):
    """Pairs of a parameter of ours and the name and rows of the same one in `nn.Transformer`."""
    d_model = model.embedding.tokens.embedding_dim
    for stack in ["encoder", "decoder"]:
        attentions = {"mixer": "self_attn"}
        if stack == "decoder":
            attentions["cross"] = "multihead_attn"
        for n, block in enumerate(getattr(model, stack).blocks):
            layer = f"{stack}.layers.{n}"
            parts = {f"{half}_norm": f"norm{i}" for i, half in enumerate([*attentions, "feed_forward"], 1)}
            parts |= {"feed_forward.up": "linear1", "feed_forward.down": "linear2"}
            parts |= {f"{ours}.output": f"{theirs}.out_proj" for ours, theirs in attentions.items()}
            for kind in ["weight", "bias"]:
                for ours, theirs in parts.items():
                    yield block.get_parameter(f"{ours}.{kind}"), f"{layer}.{theirs}.{kind}", slice(None)
                for ours, theirs in attentions.items():
                    for i, name in enumerate(["query", "key", "value"]):
                        rows = slice(i * d_model, (i + 1) * d_model)
                        yield block.get_parameter(f"{ours}.{name}.{kind}"), f"{layer}.{theirs}.in_proj_{kind}", rows
        for kind in ["weight", "bias"]:
            yield getattr(model, stack).norm.get_parameter(kind), f"{stack}.norm.{kind}", slice(None)


def largest_difference(a, b):
    return (a - b).abs().max().item()


def require(what, difference, bound):
    print(f"{what}: {difference:.1e}")
    if not difference <= bound:
        sys.exit(f"{what}: the bound is {bound:.0e}")


def check_transformer(model, batch):
    """Scores and all gradients are those of `torch.nn.Transformer` with the same parameters."""
    # It says that norms before the halves rule out its nested tensors.
    warnings.filterwarnings("ignore", message="enable_nested_tensor")
    reference = nn.Transformer(
        model.embedding.tokens.embedding_dim,
        model.encoder.blocks[0].mixer.n_heads,
        len(model.encoder.blocks),
        len(model.decoder.blocks),
        model.encoder.blocks[0].feed_forward.up.out_features,
        dropout=0.0,
        batch_first=True,
        norm_first=True,
    ).double()
    pairs = list(same_parameters(model, reference))
    assert sum(ours.numel() for ours, *_ in pairs) == sum(p.numel() for p in reference.parameters())
    with torch.no_grad():
        for ours, name, rows in pairs:
            reference.get_parameter(name)[rows] = ours
    padding = ~batch.visible[:, 0, 0]
    causal = nn.Transformer.generate_square_subsequent_mask(batch.inputs.shape[1], dtype=torch.float64) < 0
    table = model.embedding.tokens.weight.detach().clone().requires_grad_()

    def embed(tokens):
        return table[tokens] * math.sqrt(model.embedding.tokens.embedding_dim) + model.positions[: tokens.shape[1]]

    hidden = reference(
        embed(batch.source),
        embed(batch.inputs),
        tgt_mask=causal,
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    real = batch.targets != IGNORED
    theirs, ours = hidden @ table.T, model(batch.source, batch.visible, batch.inputs)
    require("scores beside torch.nn.Transformer", largest_difference(ours[real], theirs[real]), 1e-10)
    weight = torch.randn(theirs[real].shape, dtype=torch.float64)
    (ours[real] * weight).sum().backward()
    (theirs[real] * weight).sum().backward()
    differences = [largest_difference(model.embedding.tokens.weight.grad, table.grad)]
    differences += [largest_difference(p.grad, reference.get_parameter(name).grad[rows]) for p, name, rows in pairs]
    largest = model.embedding.tokens.weight.grad.abs().max().item()
    require("gradients beside torch.nn.Transformer, over the largest", max(differences) / largest, 1e-10)


@torch.no_grad()
def check_decoding(model, batch):
    """Decoding with a cache chooses what whole passes choose."""
    model.eval()
    n_tokens, begin = 12, 1
    cached = torch.tensor(decode(model, batch.sources, begin, None, n_tokens))
    whole = torch.full((len(batch.sources), 1), begin)
    for _ in range(n_tokens):
        new = model(batch.source, batch.visible, whole)[:, -1].argmax(dim=-1, keepdim=True)
        whole = torch.cat([whole, new], dim=1)
    require("tokens decoded with a cache that differ", (cached != whole[:, 1:]).sum().item(), 0)


def check_files(model, sizes, batch):
    """Weights that were written and read again give the same loss."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_burn_weights(model, path)
        other = EncoderDecoder(sizes).double()
        load_burn_weights(other, path)
    difference = largest_difference(loss_of(model, batch), loss_of(other, batch))
    require("difference of the loss after writing and reading the weights", difference, 0)


def check_batches():
    """An epoch has every pair once, in batches within the limit."""
    generator = random.Random(1)
    pairs = [([i] * generator.randint(1, 90), [i] * generator.randint(2, 90)) for i in range(5000)]
    batches = epoch(pairs, generator)
    seen = sorted(source[0] for batch in batches for source, _ in batch)
    require("pairs of an epoch that are missing or twice", sum(a != b for a, b in zip(seen, range(5000))), 0)
    require("pairs of an epoch beyond the 5000", len(seen) - 5000, 0)
    padded = [len(batch) * max(len(target) - 1 for _, target in batch) for batch in batches]
    require("target tokens of the largest batch", max(padded), MAX_TARGET_TOKENS)


def check():
    torch.manual_seed(1)
    sizes = Sizes(vocab_size=37, d_model=24, n_heads=3, n_encoder_layers=2, n_decoder_layers=3, d_ff=40, dropout=0.0)
    model = EncoderDecoder(sizes).double()
    for parameter in model.parameters():
        # None at a value (0 or 1) that would hide its use.
        nn.init.normal_(parameter, mean=0.0 if parameter.dim() == 2 else 0.7, std=0.3)
    rows = torch.Generator().manual_seed(2)
    random_row = lambda length: torch.randint(37, (length,), generator=rows).tolist()
    batch = Batch([random_row(n) for n in (7, 4, 1, 9)], [random_row(n) for n in (5, 8, 2, 11)])
    check_transformer(model, batch)
    check_decoding(model, batch)
    check_files(model, sizes, batch)
    check_batches()


def arguments():
    def at_least(least):
        def parse(text):
            value = int(text)
            if value < least:
                raise argparse.ArgumentTypeError(f"must be at least {least}")
            return value

        return parse

    pairs = HERE.parent.parent / "data" / "verses-en-es.tsv"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=pairs, metavar="FILE.tsv", help="source TAB target a line")
    parser.add_argument("--held-out", type=at_least(0), default=500, metavar="N", help="held-out pairs; 500")
    parser.add_argument("--steps", type=at_least(0), default=2560, help="0 only translates")
    parser.add_argument("--warmup", type=at_least(1), default=400, metavar="STEPS")
    parser.add_argument("--dropout", type=float, default=0.1, metavar="RATE")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--threads", type=at_least(1), default=THREADS)
    parser.add_argument("--weights", type=Path, metavar="FILE.safetensors", help="where training starts")
    parser.add_argument("--batches", type=Path, metavar="FILE.jsonl", help="the batches, instead of own ones")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE.json", help="a tokenizer, instead of an own one")
    parser.add_argument("--save-weights", type=Path, metavar="FILE.safetensors", help="write the trained weights")
    parser.add_argument("--report", type=Path, metavar="FILE.json")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="with --beside")
    parser.add_argument("--round-steps", type=at_least(1), default=10, help="steps of each side a round, with --beside")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with torch.nn.Transformer, and end")
    mode.add_argument("--serve", action="store_true", help="answer commands on standard input")
    mode.add_argument("--beside", metavar="PROGRAM", help="time a program that serves, beside this one")
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.check:
        check()
    elif args.serve:
        serve(args)
    elif args.beside:
        beside(args)
    else:
        train_and_evaluate(args)


if __name__ == "__main__":
    main()
