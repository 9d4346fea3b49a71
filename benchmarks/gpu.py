"""Checks correctness and speed on this GPU: one command, about ten minutes, one table.

    python benchmarks/gpu.py                             # random weights in the shapes of Qwen2.5-0.5B and -1.5B
    python benchmarks/gpu.py --device cpu --sizes mini   # the same checks on a CPU, in a minute

Each row shows the value found, the value wanted and, if they don't agree, what that means. Random weights run as fast
as trained ones. Their keys are as large as Qwen2.5's, because only large keys reveal attention that rounds its scores.
"""

import contextlib
import gc
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import tyro
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import train_grpo  # noqa: E402
from benchmarks import memory  # noqa: E402
from benchmarks.learning import machine, read_scalars  # noqa: E402
from benchmarks.speed import bandwidth_floor, sampling_speeds  # noqa: E402
from plumbing.engine import BATCHES, GroupDecoder, PackedGroups, PaddedRows, batch_class, decoder_class  # noqa: E402
from plumbing.flags import from_flat  # noqa: E402
from plumbing.statistics import format_table  # noqa: E402

# hidden size, width of the MLP, layers, vocabulary; 14 query heads (1.5B: 12) and 2 key-value heads
SHAPES = {"mini": (224, 304, 2, 512), "0.5B": (896, 4864, 24, 151_936), "1.5B": (1536, 8960, 28, 151_936)}
TOKENIZER = "models/tiny-arithmetic"


@dataclass
class Args:
    sizes: list[str] = field(default_factory=lambda: ["0.5B", "1.5B"])
    """model sizes for speed and memory (mini, 0.5B, 1.5B); exactness is always checked on mini"""
    rows: list[int] = field(default_factory=lambda: [64, 256])
    """completions sampled at once, in groups of 8"""
    new_tokens: int = 256
    """tokens in each completion"""
    device: str = "auto"


class Row(NamedTuple):
    check: str
    found: str
    wanted: str = ""
    good: bool | None = None  # None: nothing to compare with
    meaning: str = ""  # shown if it is not good


def make_model(folder: Path, size: str) -> str:
    """Saves a model of this shape with random weights and the embedded model's tokenizer; returns its directory."""
    path = folder / size
    if not path.exists():
        hidden, width, layers, vocabulary = SHAPES[size]
        shape = {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": layers,
        }
        heads = {"num_attention_heads": 12 if size == "1.5B" else 14, "num_key_value_heads": 2}
        ids = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "tie_word_embeddings": True}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, **heads, **ids), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if size == "mini" and parameter.dim() > 1:
                    parameter.mul_(3)  # logits far from uniform, so that differences show
                if name.endswith("k_proj.bias"):
                    parameter.normal_(0, 27)
        model.to(torch.bfloat16).save_pretrained(path)
        common.load_tokenizer(TOKENIZER).save_pretrained(path)
    return str(path)


def make_prompts(count: int, length: int = 200) -> list[list[int]]:
    return [[3 + (7 * i + j) % 90 for j in range(length - i % 40)] for i in range(count)]


# ---- Is it exact? --------------------------------------------------------------------------------------------------


def check_fast_path(mini: str, device: torch.device) -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16)[: 1 + common.has_bfloat16(device)]:
        model = common.load_policy(mini, None, device, dtype)
        meaning = "sampling and training take the slow path; the note on stderr says why"
        yield Row(
            f"fast path, {str(dtype)[6:]}",
            batch_class(model).__name__,
            "PackedGroups",
            batch_class(model) is PackedGroups,
            meaning,
        )
    yield Row("decoder", decoder_class(model).__name__)


def check_gap(mini: str, device: torch.device) -> Iterator[Row]:
    """The gap between sampler and trainer in bf16, against bf16's own error: the trainer in bf16 and in float32."""
    if not common.has_bfloat16(device):
        return
    model = common.load_policy(mini, None, device, torch.bfloat16)
    rollout = common.sample_groups(model, make_prompts(8, 60), 4, 60, seed=3)
    with torch.no_grad():
        trained, _ = common.completion_logprobs(model, rollout, list(range(32)))
        exact, _ = common.completion_logprobs(model.float(), rollout, list(range(32)))
    gap, cost = ((trained - other)[rollout.mask].abs().mean().item() for other in (rollout.sampler_logprobs, exact))
    meaning = "sampler and trainer disagree, so ratios are noise: report it with the versions above"
    yield Row("gap of sampler and trainer, bf16", f"{gap:.4f}", f"under half of {cost:.4f}", gap < cost / 2, meaning)


def check_gradients(mini: str, device) -> Iterator[Row]:
    gradients = []
    for packed in (False, True):
        model = common.load_policy(mini, None, device, torch.float32)
        batch_class(model)
        BATCHES[model] = PackedGroups if packed else PaddedRows
        rollout = common.make_rollout(make_prompts(6, 40), [[*range(5, 9 + i), 1] for i in range(24)], 4, device)
        common.completion_logprobs(model, rollout, list(range(24)))[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    yield Row("packed gradients, float32", f"{error:.1e}", "under 1e-3", error < 1e-3, "training is wrong: report it")


def check_graphs(mini: str, device) -> Iterator[Row]:
    """Compares greedy completions with and without CUDA graphs; the weights change in place before the second batch."""
    model, before = common.load_policy(mini, None, device, torch.float32), common.decoder_class
    batch_class(model)
    for batch in ("first", "second"):
        texts = []
        for kind in (GroupDecoder, decoder_class(model)):
            common.decoder_class = lambda _, kind=kind: kind
            texts.append(
                common.sample_groups(model, make_prompts(16, 80), 4, 40, temperature=0).completion_ids.tolist()
            )
        common.decoder_class = before
        same = sum(a == b for a, b in zip(*texts, strict=True)) / len(texts[0])
        meaning = "decoding steps read outdated tensors: report it"
        yield Row(f"equal completions, {batch} batch", f"{same:.2f}", "0.97 or more", same >= 0.97, meaning)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)


def check_release(mini: str, device) -> Iterator[Row]:
    gc.collect()
    model = common.load_policy(mini, None, device)
    common.sample_groups(model, make_prompts(4, 30), 4, 10)
    dropped = weakref.ref(model)
    del model
    gone = dropped() is None
    yield Row("a deleted model is freed", str(gone), "True", gone, "evaluate.py --stages keeps all models in memory")


# ---- How fast is it? -----------------------------------------------------------------------------------------------


def check_speed(path: str, size: str, args: Args, device, dtype) -> Iterator[Row]:
    ours = common.load_policy(path, None, device, dtype)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    for rows in args.rows:
        prompts = make_prompts(rows // 8)
        mine, theirs, _ = sampling_speeds(ours, stock, prompts, 8, args.new_tokens, 2)
        found = f"{mine:.0f} tokens/s, {mine / theirs:.1f} x generate"
        wanted, good, slow = "", None, "slower than it should be: look at time/sample of a run"
        if device.type == "cuda":
            share, aim = bandwidth_floor(ours, prompts, 8, args.new_tokens) * mine, 0.35 if rows <= 64 else 0.5
            found += f", {share:.0%} of the bandwidth floor"
            wanted, good = f"5 x, {aim:.0%} at 1.5B", mine > 5 * theirs and (share >= aim or size != "1.5B")
        yield Row(f"sampling {size}, {rows} rows", found, wanted, good, slow)


def check_run(path: str, size: str, args: Args, device, dtype, folder: Path) -> Iterator[Row]:
    """Two iterations of train_grpo.py, with a KL so that every row gets a backward pass, and a third after a resume."""
    G, P = 8, max(2, args.rows[0] // 8)
    flags = {
        "model": path,
        "group_size": G,
        "prompts_per_step": P,
        "max_new_tokens": args.new_tokens,
        "device": args.device,
    }
    flags |= {
        "kl_coef": 0.01,
        "eval_problems": 2,
        "eval_every": 0,
        "iterations": 2,
        "save_every": 2,
        "learning_rate": 1e-6,
    }
    flags |= {"run_root": str(folder), "run_name": f"run-{size}", "dtype": str(dtype)[6:]}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = from_flat(train_grpo.Args(), flags)
    train_grpo.main(run)
    scalars = read_scalars(folder / f"run-{size}")
    split = {part: scalars[f"time/{part}"][-1][1] for part in ("sample", "reward", "logprobs", "update")}
    yield Row(f"GRPO step {size}, {P} x {G} x {args.new_tokens}", ", ".join(f"{k} {v:.2f} s" for k, v in split.items()))
    config, tokenizer = common.load_config(path), common.load_tokenizer(path)
    longest = memory.longest_row("train_grpo", run, tokenizer, config)
    case = memory.Case("train_grpo", run, config, memory.parameters(config), *longest, dtype, device.type == "cpu")
    computed = (memory.peak(case) - (0 if case.cpu else memory.LIBRARIES)) / 1e9
    measured = scalars["memory/peak_gb"][-1][1]
    good = None if case.cpu else 0.7 < measured / computed < 1.1
    meaning = "benchmarks/memory.py's estimate is off: leave more room than it says"
    yield Row(f"peak memory {size}", f"{measured:.1f} GB", f"{computed:.1f} GB computed", good, meaning)
    again = flags | {"iterations": 3, "resume": str(folder / f"run-{size}"), "run_name": None}
    train_grpo.main(from_flat(train_grpo.Args(), again))
    steps = len(read_scalars(folder / f"run-{size}")["reward/total"])
    yield Row(f"save and resume {size}", f"{steps} iterations logged", "3", steps == 3, "runs don't resume: report it")


def check_all(args: Args, folder: Path, device) -> Iterator[Row]:
    dtype = common.resolve_dtype("auto", device)
    yield Row("torch, transformers", f"{torch.__version__}, {transformers.__version__}")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        yield Row("memory free", f"{free / 1e9:.0f} of {total / 1e9:.0f} GB")
        planned = torch.backends.cuda.cudnn_sdp_enabled()
        yield Row("cuDNN attention", str(planned), "False", not planned, "it makes a plan for every new shape: slow")
    mini = make_model(folder, "mini")
    for check in (check_fast_path, check_gap, check_gradients, check_graphs, check_release):
        yield from check(mini, device)
    for size in args.sizes:
        path = make_model(folder, size)
        yield from check_speed(path, size, args, device, dtype)
        gc.collect()
        yield from check_run(path, size, args, device, dtype, folder)


def main(args: Args) -> None:
    device, rows = common.resolve_device(args.device), []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for row in check_all(args, Path(folder), device):
            rows.append([row.check, row.found, row.wanted, {True: "ok", False: "BAD", None: ""}[row.good]])
            print(*rows[-1], "" if row.good in (True, None) else f"({row.meaning})", sep="  ", file=sys.stderr)
            if row.good is False:
                rows.append([f"  -> {row.meaning}", "", "", ""])
    print(f"{machine()}\n\n{format_table(['check', 'found', 'wanted', ''], rows)}")
    if any(row[3] == "BAD" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main(tyro.cli(Args))
