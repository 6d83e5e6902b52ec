"""The decoder of `pretrain` in PyTorch: same shapes, same initialisation, same optimizer, same data.

    python decoder.py --preset tiny --steps 1500 --evaluate-at 200,800,1500 --report tiny.json
    python decoder.py --preset small --time-only 20
    python decoder.py --preset llama --time-only 20 --compile --json

A byte-level, decoder-only transformer without biases: tied embedding, learned positions, pre-norm
layer norm, exact GELU, `F.scaled_dot_product_attention`; the preset `llama` has rotary positions, RMS
norm and SwiGLU instead. Float32 on the CPU, eager mode unless `--compile` is given. The model trains on
the first nine tenths of the text; the validation loss is the mean over the whole last tenth, in nats
per byte.

`--json` adds a line with the figures of `--time-only`: the times; `cpu_utilisation`, the processor time of
all threads over the time on the clock, so that 2 is two busy cores, those that wait in a loop included;
`gflops`, by `flops_per_step` below; `peak_bytes`, the most that is resident during the steps less what is
resident between steps, with model and optimizer state but without gradients.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import begin_memory, peak_bytes

VOCAB_SIZE = 256  # bytes


@dataclass(frozen=True)
class Preset:
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    seq_length: int
    batch_size: int
    learning_rate: float
    llama: bool = False  # RMS norm, rotary positions, SwiGLU

    @property
    def tokens_per_step(self):
        return self.batch_size * self.seq_length


# The names and sizes of benches/src/shapes.rs.
PRESETS = {
    "tiny": Preset(4, 128, 4, 512, 256, 8, 2e-3),
    "small": Preset(6, 384, 6, 1536, 256, 8, 1e-3),
    "long": Preset(4, 256, 4, 1024, 1024, 2, 1e-3),
    "wide": Preset(2, 768, 12, 3072, 128, 8, 1e-3),
    "llama": Preset(6, 384, 6, 1024, 256, 8, 1e-3, llama=True),
}


def flops_per_step(preset):
    """What a step has to calculate, counted as the Rust side does: `6 x tokens x parameters in matrices`
    (2 forward, 4 backward; the tied embedding counts once, as the output projection) and for attention
    `14 x d_head x visible pairs x heads x layers x batch` (2 products forward, 5 backward, which calculates
    the scores again). Norms, activations, softmax, loss and optimizer are not counted."""
    n_feed_forward = (3 if preset.llama else 2) * preset.d_model * preset.d_ff
    n_matrices = preset.n_layers * (4 * preset.d_model**2 + n_feed_forward) + VOCAB_SIZE * preset.d_model
    n_pairs = preset.seq_length * (preset.seq_length + 1) // 2
    # d_head x heads = d_model
    attention = 14 * preset.d_model * n_pairs * preset.n_layers * preset.batch_size
    return 6 * preset.tokens_per_step * n_matrices + attention


def norm_of(preset):
    if preset.llama:
        return nn.RMSNorm(preset.d_model, eps=1e-5)
    return nn.LayerNorm(preset.d_model, eps=1e-5, bias=False)


class Rotary(nn.Module):
    """Rotary positions, theta 10,000: components i and i + d/2 form a pair ("rotate half")."""

    def __init__(self, d_head, seq_length):
        super().__init__()
        frequencies = 10_000.0 ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        angles = torch.arange(seq_length, dtype=torch.float64)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x):
        a, b = x.chunk(2, dim=-1)
        length = x.shape[-2]
        return x * self.cos[:length] + torch.cat([-b, a], dim=-1) * self.sin[:length]


class Attention(nn.Module):
    def __init__(self, preset):
        super().__init__()
        d_model = preset.d_model
        self.n_heads = preset.n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, rotary=None):
        batch_size, seq_length, d_model = x.shape

        def heads(y):
            return y.view(batch_size, seq_length, self.n_heads, -1).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        if rotary is not None:
            query, key = rotary(query), rotary(key)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(batch_size, seq_length, d_model))


class FeedForward(nn.Module):
    def __init__(self, preset):
        super().__init__()
        self.up = nn.Linear(preset.d_model, preset.d_ff, bias=False)
        self.down = nn.Linear(preset.d_ff, preset.d_model, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class SwiGlu(nn.Module):
    def __init__(self, preset):
        super().__init__()
        self.gate = nn.Linear(preset.d_model, preset.d_ff, bias=False)
        self.up = nn.Linear(preset.d_model, preset.d_ff, bias=False)
        self.down = nn.Linear(preset.d_ff, preset.d_model, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, preset):
        super().__init__()
        self.mixer_norm = norm_of(preset)
        self.mixer = Attention(preset)
        self.feed_forward_norm = norm_of(preset)
        self.feed_forward = SwiGlu(preset) if preset.llama else FeedForward(preset)

    def forward(self, x, rotary=None):
        x = x + self.mixer(self.mixer_norm(x), rotary)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    def __init__(self, preset):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, preset.d_model)
        self.positions = None if preset.llama else nn.Embedding(preset.seq_length, preset.d_model)
        self.rotary = Rotary(preset.d_model // preset.n_heads, preset.seq_length) if preset.llama else None
        self.blocks = nn.ModuleList(Block(preset) for _ in range(preset.n_layers))
        self.norm = norm_of(preset)
        # The projections that write into the residual stream start smaller, as in GPT-2.
        residual_std = 0.02 / math.sqrt(2 * preset.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("mixer.output.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=residual_std if writes else 0.02)

    def forward(self, tokens):
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, self.rotary)
        return F.linear(self.norm(x), self.tokens.weight)


def loss_of(model, tokens, targets, reduction="mean"):
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction=reduction)


def optimizer_of(model, learning_rate):
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    decayed = {id(weight) for weight in linear}
    rest = [p for p in model.parameters() if id(p) not in decayed]
    groups = [{"params": linear, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), eps=1e-8)


def learning_rate_at(step, steps, peak):
    """Linear warm-up over 100 steps (a tenth of the run where that is shorter), then a cosine that
    arrives at a tenth of the peak with the last step. Steps count from 1."""
    warm_up = min(100, steps // 10)
    if step <= warm_up:
        return peak * step / warm_up
    progress = (step - warm_up) / (steps - warm_up)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def read_text(path):
    """The training part and the validation part of the file's bytes."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    split = len(data) * 9 // 10
    return data[:split], data[split:]


class Trainer:
    def __init__(self, preset, train, steps, learning_rate, seed, compiled=False):
        torch.manual_seed(seed)
        self.model = Decoder(preset)
        # Only steps run compiled: a validation has other shapes.
        self.run = torch.compile(self.model) if compiled else self.model
        self.optimizer = optimizer_of(self.model, learning_rate)
        self.preset, self.train, self.steps, self.peak = preset, train, steps, learning_rate
        self.offsets = torch.Generator().manual_seed(seed)
        self.window = torch.arange(preset.seq_length + 1)

    def step(self, step):
        """One update; returns the loss of its batch, as a tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.steps, self.peak)
        n_offsets = len(self.train) - self.preset.seq_length
        offsets = torch.randint(n_offsets, (self.preset.batch_size, 1), generator=self.offsets)
        windows = self.train[offsets + self.window].long()
        self.optimizer.zero_grad()
        loss = loss_of(self.run, windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


@torch.inference_mode()
def validation_loss(model, data, preset):
    """Mean nats per byte over non-overlapping windows: every byte but the first is predicted once."""
    length = preset.seq_length
    n_predicted = len(data) - 1
    whole = n_predicted // length * length
    data = data.long()
    inputs, targets = data[:whole].view(-1, length), data[1 : whole + 1].view(-1, length)
    starts = range(0, len(inputs), preset.batch_size)
    batches = [(inputs[i : i + preset.batch_size], targets[i : i + preset.batch_size]) for i in starts]
    if whole < n_predicted:
        batches.append((data[whole:-1][None], data[whole + 1 :][None]))
    total = torch.zeros((), dtype=torch.float64)
    for tokens, following in batches:
        total += loss_of(model, tokens, following, reduction="sum").double()
    return total.item() / n_predicted


def pretrain(trainer, validation, evaluate_at):
    """Trains and evaluates; returns what the report holds of it."""
    preset = trainer.preset
    evaluations, step_seconds = [], []
    for step in range(1, trainer.steps + 1):
        start = time.perf_counter()
        loss = trainer.step(step)
        step_seconds.append(time.perf_counter() - start)
        if step in evaluate_at:
            start = time.perf_counter()
            held_out = validation_loss(trainer.model, validation, preset)
            seconds = time.perf_counter() - start
            evaluations.append({"step": step, "training_loss": loss.item(), "validation_loss": held_out})
            print(
                f"step {step}: training loss {loss.item():.4f}, "
                f"validation loss {held_out:.4f} nats per byte ({seconds:.1f} s)",
                flush=True,
            )
    # The first two steps also allocate buffers and optimizer state.
    timed = step_seconds[2:]
    n_tokens = preset.tokens_per_step
    return {
        "evaluations": evaluations,
        "tokens_per_second": n_tokens * len(timed) / sum(timed) if timed else None,
        "median_step_ms": 1e3 * statistics.median(timed) if timed else None,
        "training_seconds": sum(step_seconds),
    }


def time_steps(trainer, n_steps, n_untimed):
    """Times `n_steps` training steps after `n_untimed` others."""
    step_seconds, cpu_seconds = [], []
    for step in range(1, n_untimed + n_steps + 1):
        if step == n_untimed:
            # The last untimed step is in the memory's share, and touches again what was given back.
            trainer.optimizer.zero_grad()
            resident = begin_memory()
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.step(step)
        cpu_seconds.append(time.process_time() - cpu_start)
        step_seconds.append(time.perf_counter() - start)
    step_seconds, cpu_seconds = step_seconds[n_untimed:], cpu_seconds[n_untimed:]
    median = statistics.median(step_seconds)
    return {
        "timed_steps": n_steps,
        "median_step_ms": 1e3 * median,
        "min_step_ms": 1e3 * min(step_seconds),
        "tokens_per_second": trainer.preset.tokens_per_step / median,
        "cpu_utilisation": sum(cpu_seconds) / sum(step_seconds),
        "gflops": flops_per_step(trainer.preset) / median / 1e9,
        "peak_bytes": peak_bytes(resident),
    }


def arguments():
    def positive(text):
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError("must be at least 1")
        return value

    def step_list(text):
        return sorted({positive(part) for part in text.split(",")})

    text = Path(__file__).resolve().parent / "../../data/austen.txt"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=text, metavar="FILE", help="the corpus, read as bytes")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--steps", type=positive, default=1500)
    parser.add_argument("--evaluate-at", type=step_list, metavar="STEPS", help="e.g. 200,800; the last step if absent")
    parser.add_argument("--lr", type=float, help="peak learning rate; the preset's if absent")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, metavar="FILE.json")
    parser.add_argument("--time-only", type=positive, metavar="N", help="only time N training steps")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--json", action="store_true", help="one more line, of JSON; with --time-only")
    args = parser.parse_args()
    args.evaluate_at = args.evaluate_at or [args.steps]
    if args.evaluate_at[-1] > args.steps:
        parser.error(f"--evaluate-at {args.evaluate_at[-1]} lies beyond the last step, {args.steps}")
    if args.json and not args.time_only:
        parser.error("--json prints what --time-only measures: give both")
    return args


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    learning_rate = preset.learning_rate if args.lr is None else args.lr
    train, validation = read_text(args.text)
    # A compiled model is compiled in its first step, and once more where a guard of it fails.
    n_untimed = 5 if args.compile else 3
    steps = args.time_only + n_untimed if args.time_only else args.steps
    trainer = Trainer(preset, train, steps, learning_rate, args.seed, args.compile)
    n_parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{args.preset}: {n_parameters} parameters, torch {torch.__version__}, {args.threads} threads", flush=True)

    if args.time_only:
        result = time_steps(trainer, args.time_only, n_untimed)
        print(f"{result['median_step_ms']:.1f} ms per step (median), {result['tokens_per_second']:.0f} tokens/s")
        if args.json:
            name = "pytorch compiled" if args.compile else "pytorch"
            print(json.dumps({"contender": name, "preset": args.preset, "threads": args.threads, **result}))
    else:
        result = pretrain(trainer, validation, args.evaluate_at)
        if result["tokens_per_second"] is not None:
            print(f"{result['tokens_per_second']:.0f} tokens/s in training, from the third step on")
    if args.report:
        report = {
            "preset": args.preset,
            "n_parameters": n_parameters,
            "steps": steps,
            "seed": args.seed,
            "learning_rate": learning_rate,
            "threads": args.threads,
            "torch": torch.__version__,
            "compiled": args.compile,
            "training_bytes": len(train),
            "validation_bytes": len(validation),
            **result,
        }
        args.report.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
