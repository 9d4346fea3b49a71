"""What fits where: memory of a GRPO run by model and GPU size, computed by data.memory_needs; and that function against
measured peaks on this machine.

    python benchmarks/memory.py                                              # the table; nothing is run
    python benchmarks/memory.py --measure DIR --problems gsm8k/train.jsonl   # a real model, in several settings

The models are those of Qwen2.5 by their configs, in bfloat16 with fp32 masters, as on any GPU; 5% of its memory are
left for what an allocator can't use. The flags are those that `train_grpo.py` names where a run doesn't fit: first
those that change the time only, then --prompts-per-step.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import Qwen2Config

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from learning import machine, read_scalars, run_script  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import train_grpo  # noqa: E402
import train_pg  # noqa: E402
from evaluate import format_table  # noqa: E402

# hidden size, width of the MLP, layers, heads, key heads, tied embeddings; from the models' config.json
QWEN = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
}
GPUS = 24, 48, 80, 141  # GB
SETTINGS = "", "--gradient-checkpointing", "--micro-batch-tokens 1024", "--micro-batch-tokens 8192", "--baseline value"


@dataclass
class Args:
    prompts_per_step: int = 32
    group_size: int = 8
    max_new_tokens: int = 512
    prompt: int = 256
    """tokens of the longest prompt"""
    measure: str | None = None
    """model directory or hub name: run train_grpo.py with it in several settings, and compare"""
    problems: str = "arithmetic"
    """with --measure: its problems"""


def table(args: Args) -> list[list]:
    same = {name: getattr(args, name) for name in ("prompts_per_step", "group_size", "max_new_tokens")}
    run, rows = train_grpo.Args(**same), []
    for name, (hidden, width, layers, heads, keys, tied) in QWEN.items():
        config = Qwen2Config(
            vocab_size=151_936 if tied else 152_064,
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys,
            tie_word_embeddings=tied,
        )
        size = data.parameters(config)
        as_is = data.peak(data.memory_needs(config, size, run, torch.bfloat16, args.prompt, False), False)
        row = [f"{name} ({size / 1e9:.2f}e9)", f"{as_is / 1e9:.0f} GB"]
        for memory in GPUS:
            change = data.flags_that_fit(config, size, run, torch.bfloat16, args.prompt, memory * 0.95e9, False)
            row.append("doesn't fit" if change is None else data.as_flags(change) or "as it is")
        rows.append(row)
    return rows


def measure(args: Args) -> list[list]:
    """One row a setting: computed and measured peak of two small iterations of train_pg.py, which takes what
    train_grpo.py does, but passes backward through every row, whatever the rewards; the last setting adds a critic."""
    rows, tokenizer, config = [], common.load_tokenizer(args.measure), common.load_config(args.measure)
    small = {"prompts_per_step": 4, "max_new_tokens": 64, "micro_batch_tokens": 4096, "baseline": "batch-mean"}
    problems = data.load_train_problems(args.problems, None)
    prompts = data.encode_prompts(tokenizer, [p.question for p in problems], data.SYSTEM_PROMPT)
    device, size = common.resolve_device("auto"), data.parameters(config)
    cpu = device.type == "cpu"
    dtype, longest = common.resolve_dtype("auto", device), max(map(len, prompts))
    for setting in SETTINGS:
        run = train_pg.Args(**small, model=args.measure, problems=args.problems)
        run = tyro.cli(train_pg.Args, args=setting.split(), default=run)
        computed = data.peak(data.memory_needs(config, size, run, dtype, longest, cpu), cpu) / 1e9
        computed -= 0 if cpu else 0.6  # a GPU's peak is of tensors alone
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in small.items()) + f" {setting}"
        with tempfile.TemporaryDirectory() as directory:
            flags += f" --model {args.measure} --problems {args.problems} --run-root {directory} --iterations 2"
            run_dir, _, _ = run_script("train_pg.py", 1, f"{flags} --eval-every 0 --eval-problems 4 --save-every 0")
            peak = read_scalars(run_dir)["memory/peak_gb"][-1][1]
        rows.append([setting or "4 x 8 x 64", computed, peak, computed / peak])
        print(*rows[-1], file=sys.stderr)
    return rows


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.measure:
        print(f"{args.measure}, {args.problems}\n{machine()}\n")
        print(format_table(["setting", "computed GB", "measured GB", "ratio"], measure(args)))
    else:
        sizes = f"{args.prompts_per_step} x {args.group_size} completions of {args.max_new_tokens} tokens"
        print(f"train_grpo.py, {sizes}, prompts of up to {args.prompt} tokens, bfloat16\n")
        print(format_table(["", "as it is", *(f"{memory} GB" for memory in GPUS)], table(args)))
