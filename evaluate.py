"""Evaluation of a model on held-out problems: accuracy with intervals, pass@k, majority vote, thinking budget.

As a command it compares models and writes the samples file:

    python evaluate.py --model runs/.../final
    python evaluate.py --num-samples 8                             # pass@k, majority vote
    python evaluate.py --split all --num-samples 8 --output samples.jsonl               # N-best for later stages
    python evaluate.py --stages base=models/tiny-arithmetic grpo=runs/.../final --temperatures 0.5 1.5   # side by side

Accuracy is reported *sampled at temperature 1* (the policy that RL trains) and greedy, each with a 95% interval.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import common
from common import Rollout, continue_groups, derive_seed, sample_groups
from data import MODES, decode, encode_problems, ids_after, load_problems
from plumbing.evaluation import evaluate
from plumbing.files import write_jsonl
from plumbing.flags import SYSTEM_PROMPT, AtLeast1, Positive, check_output, fail, start
from plumbing.statistics import (
    diversity,
    format_table,
    group_by,
    interval,
    majority_accuracy,
    paired_difference,
    paired_problems,
    summarize,
)
from rewards import Verifier


def sample_within_budget(
    policy, prompts, group_size, max_new_tokens, temperature, seed, tokenizer, budget, stop_sentence
) -> Rollout:
    """Samples with Qwen3's thinking budget (arXiv:2505.09388, section 4.3). A completion that is still thinking after
    `budget` tokens gets the stop sentence, which closes the think block, and then answers. Any other unfinished one
    just continues. max_new_tokens: limit after the budget. The stop sentence counts towards the completion's length."""
    rollout = sample_groups(policy, prompts, group_size, budget, temperature, seed)
    heads = [ids[real].tolist() for ids, real in zip(rollout.completion_ids, rollout.mask, strict=True)]
    stops, inserts = stop_ids(tokenizer, stop_sentence, heads), []
    for text, finished, stop in zip(decode(tokenizer, rollout), rollout.finished.tolist(), stops, strict=True):
        thinking = "<think>" in text and "</think>" not in text
        inserts.append(None if finished else stop if thinking else [])
    whole = continue_groups(policy, rollout, inserts, max_new_tokens, temperature, derive_seed("answers", seed))
    return replace(whole, loss_mask=None)


def stop_ids(tokenizer, stop_sentence: str, before: list[list[int]]) -> list[list[int]]:
    """Token ids of the stop sentence after the ids before it. Without a </think>, it gets one at its end."""
    sentence = stop_sentence if "</think>" in stop_sentence else stop_sentence + "</think>"
    return ids_after(tokenizer, before, [sentence] * len(before))


# ---- The command ---------------------------------------------------------------------------------------------------


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """local model directory or hub name"""
    stages: tuple[str, ...] = ()
    """NAME=DIRECTORY ...: several models to compare, instead of --model; one table row each"""
    problems: str = "arithmetic"
    """"arithmetic" ("arithmetic:7-8" for difficulties 7 and 8), a .jsonl file, or a hub dataset; by default only its
    held-out part is evaluated (see --split)"""
    split: Literal["eval", "train", "all"] = "eval"
    """which part of --problems: held out for evaluation (a hub dataset's test or validation split) | for training |
    both (of such a hub dataset the same as train)"""
    eval_problems: AtLeast1 = 500
    """number of problems"""
    num_samples: AtLeast1 = 1
    """completions per problem, sampled at --temperature; more than one gives pass@k and the majority vote"""
    temperature: Positive = 1.0
    """sampling temperature; greedy accuracy is reported beside it"""
    temperatures: tuple[Positive, ...] = ()
    """additional temperatures; each adds a column with its accuracy"""
    max_new_tokens: AtLeast1 = 40
    """length limit of a completion, tokens (--think-budget not included); 40 is for the embedded arithmetic model"""
    modes: str = ""
    """thinking modes to evaluate (think,no_think): the flag is appended to the user's turn; one table row each"""
    think_budget: AtLeast1 | None = None
    """number of tokens after which --stop-sentence ends the thinking, and the model goes on to its answer"""
    stop_sentence: str = "</think>"
    """inserted text; </think> is appended if it has none. Qwen3's begins "Considering the limited time by ..." """
    system_prompt: str = SYSTEM_PROMPT
    """system turn of the chat template; '' for none"""
    format_style: Literal["answer-tags", "think"] = "answer-tags"
    """format that the format rate counts: <think>..</think><answer>..</answer> | <think>..</think>, then text"""
    judge_model: str | None = None
    """causal LM that is asked, if the rules find no match, whether the answer equals the reference answer"""
    verifier_model: str | None = None
    """reward model (train_rm.py) that scores unmatched answers, instead of --judge-model: above 0 is right. Train it
    with --system-prompt '' on the pairs of curate.py --make verifier"""
    reward_model: str | None = None
    """reward model (train_rm.py) whose mean score is reported; with it, problems may lack an answer"""
    output: str | None = None
    """write the samples file here: one line per problem, with its completions"""
    batch_size: AtLeast1 = 256
    """completions sampled at once"""
    micro_batch_tokens: AtLeast1 = 8192
    """tokens that --judge-model, --verifier-model or --reward-model reads at once"""
    seed: int = 0
    """random seed"""
    device: str = "auto"
    """auto (the GPU if there is one) | cpu | cuda"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU that has it, else float32"""


def main(args: Args) -> None:
    check_output(args.output, args.problems)
    modes = [mode.strip() for mode in args.modes.split(",")] if args.modes else [""]
    if unknown := [mode for mode in modes if args.modes and mode not in MODES]:
        fail(f"--modes {args.modes}: {unknown[0]!r} is none of {', '.join(MODES)}")
    stages = [stage.partition("=")[::2] for stage in args.stages] or [("", args.model)]
    if bad := [name for name, path in stages if not path]:
        fail(f"--stages {bad[0]}: NAME=DIRECTORY is expected")
    several = len(stages) * len(modes) > 1
    if several and args.output:
        fail("--output: holds the samples of one model in one mode: evaluate one at a time")
    device = common.resolve_device(args.device)
    dtype = common.resolve_dtype(args.dtype, device)
    problems = load_problems(args.problems, args.split, args.eval_problems, unanswered=bool(args.reward_model))
    flag = "--stages" if args.stages else "--model"
    for _, path in stages:
        common.load_config(path, flag)
    verify, rows, first = Verifier(args, device, dtype, args.micro_batch_tokens), [], None
    for name, path in stages:
        tokenizer, config, policy = common.load_tokenizer(path, flag), common.load_config(path), None
        reward_model = args.reward_model and common.load_reward_model(args.reward_model, tokenizer, device, dtype)
        room, limits, sample = args.max_new_tokens, "--max-new-tokens", sample_groups
        if args.think_budget:
            limits = "--think-budget + --stop-sentence + --max-new-tokens"
            room += args.think_budget + len(stop_ids(tokenizer, args.stop_sentence, [[]])[0])
            budget = {"budget": args.think_budget, "stop_sentence": args.stop_sentence}
            sample = partial(sample_within_budget, tokenizer=tokenizer, **budget)
        for mode in modes:
            encoded = encode_problems(tokenizer, problems, args.system_prompt, config, room, limits, mode)
            policy = policy or common.load_policy(path, tokenizer, device, dtype)
            run = partial(
                evaluate,
                policy,
                tokenizer,
                encoded,
                max_new_tokens=args.max_new_tokens,
                format_style=args.format_style,
                batch_size=args.batch_size,
                seed=args.seed,
                progress=not several,
                verify=verify,
                sample=sample,
                reward_model=reward_model,
                max_tokens=args.micro_batch_tokens,
            )
            records, greedy = run(args.num_samples, temperature=args.temperature), run(1, temperature=0.0)
            others = [summarize(run(args.num_samples, temperature=t))["accuracy"] for t in args.temperatures]
            label = ", ".join(part for part in (name, mode) if part) or "all"
            rows.append(accuracy_row(label, records, greedy) + others)
            if several:
                rows[-1] += [""] * 2 if first is None else difference_cells(records, first)
                first = first or records
            del run  # it holds the policy, whose memory the next model needs
        del reward_model
    if not several:
        for field in ("difficulty", "topic"):
            greedy_groups = group_by(greedy, field)
            for value, group in group_by(records, field).items():
                row = accuracy_row(f"{field} {value}", group, greedy_groups[value])
                rows.append(row + [""] * len(args.temperatures))
    header = ["", "problems", f"accuracy (T={args.temperature:g})", "95% interval", "greedy", "95% interval"]
    header += ["format", "greedy format", "length"] + ["score"] * bool(args.reward_model)
    header += [f"T={t:g}" for t in args.temperatures] + ["minus the first", "95% interval"] * several
    print(format_table(header, rows))
    if not several:
        summary = summarize(records) | diversity(records)
        shown = ["length_right", "length_wrong", "truncated", "no_answer", "reflection_words", "entropy"]
        if args.num_samples > 1:
            shown.append("distinct")
            if all(problem.answer for problem in problems):  # else different answers can be right: no vote
                summary["majority"] = majority_accuracy(records)
                shown.append("majority")
            shown += [name for name in summary if name.startswith("pass_at_")]
        print("  ".join(f"{name} {summary[name]:.3f}" for name in shown))
        if shares := verify.summary():
            shown = (f"{name.removeprefix('verifier/')} {share:.3f}" for name, share in shares.items())
            print("right by: " + "  ".join(shown))
    if args.output:  # last, so that what can't be written costs no table
        write_jsonl(args.output, [record | ({"mode": modes[0]} if modes[0] else {}) for record in records])
        print(f"samples file: {args.output}")


def accuracy_row(name: str, sampled: list[dict], greedy: list[dict]) -> list:
    summary, best = summarize(sampled), summarize(greedy)
    judged = sum(record["completions"][0]["correct"] is not None for record in sampled)
    ranges = ["{:.3f}-{:.3f}".format(*interval(s["accuracy"], judged)) for s in (summary, best)]
    columns = [name, len(sampled), summary["accuracy"], ranges[0], best["accuracy"], ranges[1]]
    scores = [
        completion["model"] for record in sampled for completion in record["completions"] if "model" in completion
    ]
    score = [sum(scores) / len(scores)] if scores else []
    return [*columns, summary["format"], best["format"], summary["length"], *score]


def difference_cells(records: list[dict], first: list[dict]) -> list[str]:
    """Sampled accuracy minus the first row's, paired by problem: all answer the same ones."""
    pairs = paired_problems(records, first)
    if not pairs[0]:
        return ["no problem", "judged in both"]
    mean, low, high = paired_difference(*pairs)
    return [f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}"]


if __name__ == "__main__":
    start(main, Args)
