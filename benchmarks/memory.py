"""Estimates how much memory a run takes, with which flags it fits, and which model fits on which GPU.

    python benchmarks/memory.py train_grpo.py --model NAME --max-new-tokens 512   # with its flags, on this machine
    python benchmarks/memory.py                                                   # the table of models and GPUs
    python benchmarks/memory.py --measure DIR --problems gsm8k/train.jsonl        # the estimate against measured peaks

No GPU has confirmed the estimates. The suggested flags cost only time; if those don't suffice, --prompts-per-step falls
too. The table takes the configs of Qwen2.5 (8B: Qwen3), in bfloat16 with fp32 masters as by default on a GPU, and
leaves 5% of its memory for what an allocator can't use.
"""

import importlib
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import train_grpo  # noqa: E402
import train_pg  # noqa: E402
from benchmarks.learning import machine, read_scalars, run_script  # noqa: E402
from data import encode_demonstrations, encode_problems, load_train_problems, mix_demonstrations  # noqa: E402
from plumbing.flags import as_flag, fail, from_flat, parse_args, reason, to_flat  # noqa: E402
from plumbing.pairs import encode_pairs, load_preference_pairs  # noqa: E402
from plumbing.statistics import format_table  # noqa: E402

RL = "train_pg", "train_ppo", "train_grpo", "train_kimi"
SCRIPTS = *RL, "train_sft", "train_dpo", "train_rm"

# hidden size, width of the MLP, layers, query heads, key heads, tied embeddings; from the models' config.json
QWEN = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
    "8B": (4096, 12288, 36, 32, 8, False),  # Qwen3's
}
GPUS = 24, 48, 80, 141  # GB
SETTINGS = "", "--gradient-checkpointing", "--micro-batch-tokens 1024", "--micro-batch-tokens 8192", "--baseline value"
LIBRARIES = 0.6e9  # bytes taken by Python, torch and, on a GPU, CUDA


@dataclass
class Args:
    prompts_per_step: int = 32
    group_size: int = 8
    max_new_tokens: int = 512
    prompt: int = 256
    """tokens of the longest prompt"""
    measure: str | None = None
    """model directory or hub name to run train_pg.py with, in several settings, to compare the estimates with peaks"""
    problems: str = "arithmetic"
    """with --measure: training problems"""


@dataclass(frozen=True)
class Case:
    """A run on a machine."""

    script: str  # one of SCRIPTS
    args: object  # the script's Args
    config: object  # the config of --model
    size: int  # number of its parameters
    prompt: int  # prompt tokens in the longest row of the data
    completion: int  # completion tokens in that row
    dtype: torch.dtype
    cpu: bool


# ---- What each script loads ------------------------------------------------------------------------------------------


def trained_models(script: str, args) -> int:
    """The number of trained models: the policy (or the reward model) and the critic, if there is one."""
    return 1 + (script == "train_ppo" or (script == "train_pg" and args.baseline == "value"))


def frozen_models(script: str, args) -> list[str]:
    """Paths of the models that are not trained: reference, reward model, judge, verifier."""
    reference = script in ("train_ppo", "train_grpo") and args.kl_coef > 0
    paths = [args.model if reference else None]
    if script in RL:
        paths += [args.rewards.reward_model, args.rewards.judge_model, args.rewards.verifier_model]
    return [path for path in paths if path]


def batch_shape(script: str, args) -> tuple[int, int, int]:
    """P and G of an iteration's batch, and the completions in one update."""
    if script not in RL:
        G = 1 if script == "train_sft" else 2  # a demonstration, or a pair
        return args.minibatch_size, G, args.minibatch_size * G
    P, G = args.prompts_per_step, args.group_size
    if script == "train_pg":
        return P, G, P * G
    return P, G, args.minibatch_size or (P if script == "train_grpo" else max(1, P // 4)) * G


def longest_row(script: str, args, tokenizer, config) -> tuple[int, int]:
    """Tokens of the prompt and of the completion in the longest row of the script's data."""
    if script in RL:
        problems = load_train_problems(args.problems, args.setup.eval_data)
        problems = encode_problems(tokenizer, problems, args.setup.system_prompt, config, args.max_new_tokens)
        return max(len(problem.prompt_ids) for problem in problems), args.max_new_tokens
    context = common.context_length(config)
    if script == "train_sft":
        demonstrations = mix_demonstrations(args.data, args.demonstrations, args.keep)
        demonstrations = encode_demonstrations(tokenizer, demonstrations, args.setup.system_prompt, context)
        return max(((len(d.prompt_ids), len(d.completion_ids)) for d in demonstrations), key=sum)
    system_prompt = args.system_prompt if script == "train_rm" else args.setup.system_prompt
    few = min(40, args.selection.pair_problems)  # they suffice: problems are alike
    flags = replace(args.selection, pair_problems=few)
    pairs = encode_pairs(tokenizer, load_preference_pairs(args.data, args.seed, flags), system_prompt, context)
    return max(((len(p.prompt_ids), max(len(p.chosen_ids), len(p.rejected_ids))) for p in pairs), key=sum)


# ---- Memory estimate -------------------------------------------------------------------------------------------------


def attention_widths(config) -> tuple[int, int]:
    """Widths of a token's queries and of its keys, summed over heads; values are as wide as keys."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim


def cache_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = config.get_text_config()
    return 2 * config.num_hidden_layers * attention_widths(config)[1] * dtype.itemsize


def free_memory(device: torch.device) -> float:
    """Free bytes; inf if unknown."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else common.free_host_memory()


def parameters(config) -> int:
    """Number of the causal LM's parameters, counted without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def memory_needs(case: Case) -> dict[str, float]:
    """Bytes that a run takes, by purpose."""
    script, args, size, config = case.script, case.args, case.size, case.config.get_text_config()
    heads, hidden, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    queries, keys = attention_widths(config)
    width = next((w for w in (getattr(config, n, None) for n in ("intermediate_size", "n_inner")) if w), 4 * hidden)
    trained, (P, G, minibatch), item = trained_models(script, args), batch_shape(script, args), case.dtype.itemsize
    frozen = [size if p == args.model else parameters(common.load_config(p)) for p in frozen_models(script, args)]

    # Autograd keeps per token of a Llama-like layer: in the model's dtype 4 x the MLP's width, 2 x the queries', 3 x
    # the keys' and 4 x the hidden size; in fp32, for the norms, 2 x the hidden size.
    row, together = case.prompt + case.completion, 2 if script in ("train_dpo", "train_rm") else 1  # a pair stays whole
    tokens = min(max(args.optimization.micro_batch_tokens, together * row), minibatch * row)
    rows = tokens / row
    tokens *= (case.completion + case.prompt / G) / row  # a group's prompt is computed once, see engine.py
    layer = tokens * (item * (4 * width + 2 * queries + 3 * keys + 4 * hidden) + 8 * hidden)
    mask = 0
    if not case.cpu:  # a CPU computes a layer's attention again in the backward pass
        # Queries, keys, values and outputs of the prompts; then of the completions, each row with its prompt's keys.
        # These have a mask, and torch's kernel with a mask wants a key and a value for every query head.
        shared = keys if item == 2 else queries  # without a mask, 16-bit kernels take fewer key heads
        attended = case.prompt / G * (2 * queries + 2 * shared) + 2 * queries * (case.completion + row)
        layer += rows * item * attended
        mask = rows * item * case.completion * row  # one for all layers
    kept = layers * tokens * hidden * item + layer if args.optimization.gradient_checkpointing else layers * layer
    scores = 3 * 4 * tokens * heads * row if case.cpu else 0  # attention scores of one layer; a GPU's kernel keeps none
    at_once = common.logits_at_once(torch.device("cpu" if case.cpu else "cuda"))
    head = 3 * 4 * min(tokens * config.vocab_size, at_once) + 4 * config.vocab_size * hidden
    sampling = 0.0
    if script != "train_rm":  # SFT and DPO sample only in evaluations, one completion per prompt
        rows = P * G if script in RL else P
        cached = P * case.prompt + rows * args.max_new_tokens
        sampling = cached * cache_bytes(config, case.dtype) + 3 * 4 * rows * config.vocab_size
    if script == "train_dpo" and args.loss != "simpo":
        sampling += size * item  # an evaluation loads the reference
    optimizer, gradients = size * trained * (8 if item == 4 else 12), size * trained * 4  # two moments, fp32 masters
    if args.optimization.offload_optimizer and case.cpu:
        optimizer = size * trained * 12  # if offloaded, fp32 weights have masters too
    elif args.optimization.offload_optimizer:  # the GPU holds only one weight's gradient
        optimizer, gradients = 0, item * max(config.vocab_size * hidden, 3 * hidden * width)
    return {
        "weights": (size * trained + sum(frozen)) * item,
        "optimizer": optimizer,
        "sampling": sampling,
        "training": gradients + kept + scores + mask + (0 if script == "train_rm" else head),  # gradients in fp32
    }


def peak(case: Case) -> float:
    """Peak bytes, libraries included. On a CPU sampling and training take turns, and the allocator, which keeps parts
    of freed memory, takes a seventh more (measured). On a GPU both count: the sampler's graphs keep their buffers."""
    needs = memory_needs(case)
    turns = needs["sampling"], needs["training"]
    total = LIBRARIES + needs["weights"] + needs["optimizer"] + (max(turns) if case.cpu else sum(turns))
    return total * 1.15 if case.cpu else total


def flags_that_fit(case: Case, memory: float) -> dict | None:
    """The first change of flags with which the run fits into `memory` bytes: {} if it fits unchanged, None if nothing
    helps. Changes that cost only time come before those that change the run."""
    flags = to_flat(case.args)
    P, budget = flags.get("prompts_per_step", 1), flags["micro_batch_tokens"]
    budgets = [budget, *(2**n for n in range(14, 9, -1) if 2**n < budget)]
    switches = [{}, {"gradient_checkpointing": True}]
    switches += [] if case.cpu else [{"offload_optimizer": True} | switch for switch in switches]
    for prompts in (P // 2**n for n in range(20)):
        if prompts < P and (prompts < 2 or prompts * flags["group_size"] < (flags.get("minibatch_size") or 0)):
            return None
        for switch in switches:
            for budget in budgets:
                change = {"micro_batch_tokens": budget} | switch
                change |= {"prompts_per_step": prompts} if case.script in RL else {}
                change = {name: value for name, value in change.items() if value != flags[name]}
                if peak(replace(case, args=from_flat(case.args, change))) <= memory:
                    return change
    return None


def as_flags(change: dict) -> str:
    return " ".join(as_flag(name) + ("" if value is True else f" {value}") for name, value in change.items())


# ---- The three commands ----------------------------------------------------------------------------------------------


def report(script: str, argv: list[str]) -> str:
    """The memory that the script takes with these flags on this machine, and flags with which it fits."""
    if script not in SCRIPTS:
        fail(f"{script}.py: one of {', '.join(f'{name}.py' for name in SCRIPTS)} is expected")
    args = parse_args(importlib.import_module(script).Args, argv)
    setup = args if script == "train_rm" else args.setup
    device = common.resolve_device(setup.device)
    dtype, cpu, free = common.resolve_dtype(setup.dtype, device), device.type == "cpu", free_memory(device)
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    prompt, completion = longest_row(script, args, tokenizer, config)
    try:
        case = Case(script, args, config, parameters(config), prompt, completion, dtype, cpu)
        needs, total, change = memory_needs(case), peak(case), flags_that_fit(case, free)
    except (AttributeError, ValueError, TypeError) as error:  # not a transformer, or not a causal LM
        fail(f"--model {args.model}: the memory of this architecture can't be estimated ({reason(error)})")
    what = f"{script}.py: {case.size / 1e6:.1f}e6 parameters, {str(dtype).removeprefix('torch.')}, "
    what += f"at most {prompt} tokens of prompt and {completion} of completion"
    rows = [[name, value / 1e9] for name, value in (needs | {"libraries": LIBRARIES}).items()]
    rows += [["total, about", total / 1e9], ["free now", free / 1e9]]
    turns = "the total counts the larger of sampling and training, plus a seventh" if cpu else "all at the same time"
    advice = f"it would fit with {as_flags(change)}" if change else "no flags make it fit; take a smaller model"
    return f"{what}\n\n{format_table(['', 'GB'], rows)}\n({turns})\n\n{'it fits' if change == {} else advice}"


def table(args: Args) -> list[list]:
    same = {name: getattr(args, name) for name in ("prompts_per_step", "group_size", "max_new_tokens")}
    run, rows = from_flat(train_grpo.Args(), same), []
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
        size = parameters(config)
        case = Case("train_grpo", run, config, size, args.prompt, args.max_new_tokens, torch.bfloat16, cpu=False)
        row = [f"{name} ({size / 1e9:.2f}e9)", f"{peak(case) / 1e9:.0f} GB"]
        for memory in GPUS:
            change = flags_that_fit(case, memory * 0.95e9)
            row.append("doesn't fit" if change is None else as_flags(change) or "as it is")
        rows.append([*row, f"{16 * size / 1e9:.0f} GB"])  # masters, two moments and a gradient, in float32
    return rows


def measure(args: Args) -> list[list]:
    """One row per setting: computed and measured peak of two small iterations of train_pg.py. It takes the memory that
    train_grpo.py takes, but gives every row a backward pass whatever the rewards. The last setting adds a critic."""
    rows, tokenizer, config = [], common.load_tokenizer(args.measure), common.load_config(args.measure)
    device, size = common.resolve_device("auto"), parameters(config)
    cpu, dtype = device.type == "cpu", common.resolve_dtype("auto", device)
    small = f"--model {args.measure} --problems {args.problems} --prompts-per-step 4 --max-new-tokens 64"
    small += " --micro-batch-tokens 4096 --baseline batch-mean"
    for setting in SETTINGS:
        run = parse_args(train_pg.Args, f"{small} {setting}".split())
        longest = longest_row("train_pg", run, tokenizer, config)
        computed = peak(Case("train_pg", run, config, size, *longest, dtype, cpu)) / 1e9
        computed -= 0 if cpu else LIBRARIES / 1e9  # a GPU's peak counts tensors only
        with tempfile.TemporaryDirectory() as directory:
            flags = f"{small} {setting} --run-root {directory} --iterations 2 --eval-every 0 --eval-problems 4"
            run_dir, _, _ = run_script("train_pg.py", 1, f"{flags} --save-every 0")
            measured = read_scalars(run_dir)["memory/peak_gb"][-1][1]
        rows.append([setting or "4 x 8 x 64", computed, measured, computed / measured])
        print(*rows[-1], file=sys.stderr)
    return rows


def main(args: Args) -> None:
    if args.measure:
        print(f"{args.measure}, {args.problems}\n{machine()}\n")
        print(format_table(["setting", "computed GB", "measured GB", "ratio"], measure(args)))
    else:
        sizes = f"{args.prompts_per_step} x {args.group_size} completions of {args.max_new_tokens} tokens"
        print(f"train_grpo.py, {sizes}, prompts of up to {args.prompt} tokens, bfloat16\n")
        print(format_table(["", "as it is", *(f"{memory} GB" for memory in GPUS), "host, if offloaded"], table(args)))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].endswith(".py"):
        print(report(Path(sys.argv[1]).stem, sys.argv[2:]))
    else:
        main(tyro.cli(Args, description=__doc__))
