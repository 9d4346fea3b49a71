"""Direct Preference Optimization (DPO; Rafailov et al. 2023, arXiv:2305.18290): a policy from preference pairs, without
a reward model and without sampling. Of a prompt's completions y+ was preferred to y-:

    L = - mean of log sigmoid(beta * Delta)                                                                      (eq. 7)
    Delta = (log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-)),  log pi(y) summed over y's tokens, EOS too

Its gradient raises log pi(y+) and lowers log pi(y-), weighted by beta * sigmoid(-beta Delta): most where the implicit
reward beta * log(pi / pi_ref) still ranks the pair wrongly. The larger beta, the closer to the reference, which is the
start model. Only the difference is trained: logps/chosen may fall too, as long as logps/rejected falls faster, and then
probability goes to completions that are in no pair. That is the method, not a bug; eval/* shows whether it hurts.

Options: --length-normalize takes means over tokens for sums. --loss ipo (arXiv:2310.12036): (Delta - 1/(2 beta))^2,
which stops at a margin where DPO never does. --loss simpo (arXiv:2405.14734): no reference,
-log sigmoid(beta (mean log pi(y+) - mean log pi(y-)) - gamma). --label-smoothing e: a pair is the wrong way round with
probability e.

Where it departs from the paper: all pairs that the N-best completions of a prompt induce are used, capped per prompt
(--max-pairs-per-prompt). --kl-coef adds a soft penalty, (log pi - log pi_ref)^2 / 2 a token; taken on the data's
completions it is no estimate of the KL, which is eval/kl, on completions sampled from the policy. No reference stays
in memory: its logprobs of the pairs are computed once and kept on disk; only an evaluation loads it again, for eval/kl.

    python train_dpo.py                                   # pairs of the embedded model's own samples
    python evaluate.py --split all --num-samples 8 --output samples.jsonl && python train_dpo.py --data samples.jsonl
    python train_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --problems openai/gsm8k:main \\
        --learning-rate 1e-6 --minibatch-size 32 --beta 0.1 --max-new-tokens 512  # with a GPU, not run on one yet

What you should see from the first command, in 47 s on 2 cores (AMD EPYC): held-out pairs ranked right from 0.50 to
0.93, logps/rejected falling by nats while logps/chosen moves little, accuracy sampled at temperature 1 from 0.37 to
0.71, greedy from 0.68 to 0.98. With --iterations 300 --pair-problems 3000 sampled accuracy levels off at 0.79: the
pairs are the start model's, and what the policy gets wrong now is no longer among them. With a beta of 0.3 or less
nothing stops it in time here: the pairs are ranked better still, and accuracy falls below the start.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

import common
import evaluate
from common import derive_seed, fail
from data import (
    SYSTEM_PROMPT,
    ProblemSampler,
    check_context,
    check_flags,
    check_memory,
    context_length,
    decode,
    encode_pairs,
    encode_prompts,
    is_held_out,
    load_eval_problems,
    load_preference_pairs,
    pair_micro_batches,
    pair_rollout,
)
from evaluate import Clock, Metrics, comparison_table, evaluate_policy, pair_table, ranked_right
from rewards import accuracy_reward


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """the policy to start from, and the reference: local model directory or hub name"""
    data: str = "arithmetic-pairs"
    """"arithmetic-pairs" (N-best samples of the embedded model, made at the start), a .jsonl file (prompt, chosen,
    rejected), or a samples file of evaluate.py; a tenth of the prompts, chosen by hash, is held out"""
    pair_problems: int = 1500
    """arithmetic-pairs: how many problems are sampled, eight times each"""
    pair_weight: Literal["uniform", "gap"] = "uniform"
    """weight of a pair in the loss; gap: proportional to the difference of its scores (samples files)"""
    min_gap: float = 0.5
    """scores of a samples file that differ by less are a near tie, no pair; where a right answer counts 1 and format
    0.2, as in arithmetic-pairs, 0.5 leaves pairs of a right and a wrong one"""
    max_pairs_per_prompt: int = 4
    """at most so many pairs of one prompt, chosen at random"""
    balance_topics: bool = False
    """as many pairs of every topic as there are of the rarest"""
    problems: str = "arithmetic"
    """its held-out problems are evaluated: "arithmetic", a .jsonl file (question, answer), or a hub dataset"""
    eval_data: str | None = None
    """held-out problems; without it a tenth of --problems, chosen by hash, is held out"""
    system_prompt: str = SYSTEM_PROMPT
    """system turn of the chat template ('' for none); the embedded model's template ignores it"""
    seed: int = 1
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the weights; auto: bfloat16 on a GPU (with fp32 master weights), float32 on a CPU"""
    iterations: int = 200
    """optimizer steps, and the length of the learning rate's cosine (so changing it on --resume bends that)"""
    minibatch_size: int = 64
    """pairs in one optimizer step"""
    max_new_tokens: int = 40
    """length limit of a completion in evaluations, tokens"""
    format_style: Literal["answer-tags", "think"] = "answer-tags"
    """answer-tags: <think>..</think><answer>..</answer>; think: <think>..</think> and then text with the answer in
    \\boxed{} or after #### (ask for that with --system-prompt)"""
    learning_rate: float = 1e-4
    """of AdamW at its peak, for the embedded model; 5e-7 to 5e-6 for real ones"""
    weight_decay: float = 0.0
    """of AdamW, on all weights"""
    warmup_iterations: int = 20
    """iterations over which the learning rate rises linearly"""
    micro_batch_tokens: int = 4096
    """tokens (prompt and completion of each row) in a forward and backward pass, at least a pair; not the result"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and compute the layer again there: less memory, slower"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    max_bad_updates: int = 10
    """updates with a non-finite loss or gradient are skipped; so many of them in a row end the run"""
    eval_every: int = 0
    """iterations between evaluations; 0: only before and after"""
    eval_problems: int = 300
    """held-out problems, and held-out pairs, in an evaluation"""
    save_every: int = 0
    """iterations between checkpoints; 0: none but final/"""
    keep_checkpoints: int = 0
    """so many of the newest checkpoints are kept; 0: all"""
    run_root: str = "runs"
    """where run directories are made"""
    resume: str | None = None
    """run directory to go on in, from its newest checkpoint, with its arguments"""

    loss: Literal["sigmoid", "ipo", "simpo"] = "sigmoid"
    """DPO's | IPO's square | SimPO's without a reference"""
    beta: float | None = None
    """beta; None: 1 on sums (for the embedded model, 0.1 for real ones), 5 on means, 2 for SimPO, 0.1 for IPO"""
    gamma: float = 1.0
    """gamma, SimPO's target margin; the other losses have none"""
    length_normalize: bool = False
    """a completion's logp is the mean over its tokens, not the sum; SimPO's always is"""
    label_smoothing: float = 0.0
    """probability that a pair is labelled the wrong way round (sigmoid and simpo)"""
    kl_coef: float = 0.0
    """weight of (log pi - log pi_ref)^2 / 2, the mean over the tokens of the pairs"""
    ref_cache: str | None = None
    """directory for the reference's logprobs, to share them among runs; without it each run directory has its own"""


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    beta: float,
    loss: str = "sigmoid",
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Logps of whole completions, sums or means over their tokens, all (B,); None: no reference, its logps count as 0.
    row_weights (B,): of the pairs, the loss is their weighted sum; None: the mean. Returns the loss and, over pairs,
    the means of its parts."""
    if loss == "simpo" and ref_chosen_logps is not None:
        raise ValueError("SimPO has no reference")
    chosen_rewards = beta * (chosen_logps - (0.0 if ref_chosen_logps is None else ref_chosen_logps))
    rejected_rewards = beta * (rejected_logps - (0.0 if ref_rejected_logps is None else ref_rejected_logps))
    margins = chosen_rewards - rejected_rewards  # beta * Delta: positive where the pair is ranked as labelled
    if loss == "ipo":
        per_row = (margins / beta - 1 / (2 * beta)) ** 2  # arXiv:2310.12036, eq. 17
    else:  # arXiv:2305.18290, eq. 7; with gamma arXiv:2405.14734, eq. 6
        logits = margins - gamma if loss == "simpo" else margins
        per_row = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    if row_weights is None:
        row_weights = torch.full_like(per_row, 1 / len(per_row))
    metrics = {
        "rewards/chosen": chosen_rewards.mean().item(),
        "rewards/rejected": rejected_rewards.mean().item(),
        "rewards/margin": margins.mean().item(),
        "rewards/accuracy": ranked_right(margins).mean().item(),
        "logps/chosen": chosen_logps.mean().item(),
        "logps/rejected": rejected_logps.mean().item(),
    }
    return (row_weights * per_row).sum(), metrics


def sequence_logps(logprobs: Tensor, mask: Tensor, mean: bool) -> Tensor:
    """(R, T) logprobs, 0 on padding -> (R,) of whole completions: the sum over tokens, or the mean."""
    return logprobs.sum(1) / mask.sum(1) if mean else logprobs.sum(1)


@torch.no_grad()
def reference_logprobs(ref, prompts, completions, max_tokens: int, cache: Path) -> Tensor:
    """(2N, T) logprobs of N pairs' tokens under the reference, 0 on padding; row 2i is pair i's chosen completion, row
    2i + 1 its rejected one. Read from `cache` where the same weights have met the same tokens before."""
    key = hashlib.sha256(repr((prompts, completions)).encode())
    for name, tensor in ref.state_dict().items():
        key.update(name.encode() + tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
    file = cache / f"{key.hexdigest()}.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    longest = max(len(ids) for pair in completions for ids in pair)
    logprobs = torch.zeros(2 * len(prompts), longest)
    for start in tqdm(range(0, len(prompts), 256), desc="reference"):
        chunk = slice(start, start + 256)
        rollout = pair_rollout(prompts[chunk], completions[chunk], ref.device)
        for micro in pair_micro_batches(rollout, max_tokens):
            rows = [2 * start + row for row in micro]
            logprobs[rows, : rollout.mask.shape[1]] = common.completion_logprobs(ref, rollout, micro)[0].cpu()
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(logprobs, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)  # whole or not there, whenever the process is killed
    return logprobs


@torch.no_grad()
def judge_samples(policy, ref, tokenizer, problems, prompts, args: Args) -> tuple[list[float], float]:
    """A completion of each problem, sampled at temperature 1, from the same random numbers each time: the verifier's
    rewards, and with `ref` the KL to it: the mean over completions of sum_t log pi - log pi_ref, unbiased since they
    are the policy's own."""
    rewards, log_ratio = [], 0.0
    for start in range(0, len(prompts), args.minibatch_size):
        chunk = slice(start, start + args.minibatch_size)
        seed = derive_seed(args.seed, "judge", start)
        rollout = common.sample_groups(policy, prompts[chunk], 1, args.max_new_tokens, seed=seed)
        texts = decode(tokenizer, rollout)
        rewards += [accuracy_reward(text, p.answer) for text, p in zip(texts, problems[chunk], strict=True)]
        rows = list(range(len(texts)))
        for micro in common.micro_batches(rollout, rows, args.micro_batch_tokens) if ref is not None else []:
            logprobs, ref_logprobs = (common.completion_logprobs(m, rollout, micro)[0] for m in (policy, ref))
            log_ratio += (logprobs - ref_logprobs).sum().item()
    return rewards, log_ratio / len(prompts)


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------- Setup
    check_flags(args)
    simpo, mean = args.loss == "simpo", args.loss == "simpo" or args.length_normalize
    if simpo and (args.kl_coef > 0 or args.ref_cache):
        fail("--loss simpo has no reference: --kl-coef and --ref-cache don't go with it")
    if args.label_smoothing >= 0.5 or (args.label_smoothing and args.loss == "ipo"):
        fail(f"--label-smoothing {args.label_smoothing}: must be under 0.5, and 0 with --loss ipo")
    beta = args.beta or {"sigmoid": 5.0 if mean else 1.0, "ipo": 0.1, "simpo": 2.0}[args.loss]

    device = common.resolve_device(args.device)
    dtype = common.resolve_dtype(args.dtype, device)
    tokenizer = common.load_tokenizer(args.model)
    eval_problems = load_eval_problems(args.problems, args.eval_data, args.eval_problems)
    eval_prompts = encode_prompts(tokenizer, [p.question for p in eval_problems], args.system_prompt)
    config = common.load_config(args.model)
    check_context(eval_prompts, [p.id for p in eval_problems], config, args.max_new_tokens)

    options = args.seed, args.pair_problems, args.pair_weight, args.min_gap, args.max_pairs_per_prompt
    pairs = load_preference_pairs(args.data, *options, args.balance_topics)
    pairs, prompts, completions = encode_pairs(tokenizer, pairs, args.system_prompt, context_length(config))
    held_out = [i for i, pair in enumerate(pairs) if is_held_out(pair.question)][: args.eval_problems]
    train = [i for i, pair in enumerate(pairs) if not is_held_out(pair.question)]
    if len(train) < args.minibatch_size:
        fail(f"--minibatch-size {args.minibatch_size}: only {len(train)} pairs are left to train on")
    check_memory(args, config, [len(prompts[i]) + sum(map(len, completions[i])) for i in train], device, dtype)

    state = common.load_checkpoint(args.resume)  # {} unless a run is resumed
    run_dir, writer = common.start_run(args, state)
    stop = common.StopSignal()
    health = evaluate.Health(run_dir, tokenizer, args.max_bad_updates)
    policy = common.load_policy(state.get("model", args.model), device, dtype, tokenizer.eos_token_id)
    if args.gradient_checkpointing:
        common.checkpoint_layers(policy)
    optimizer = common.MasterAdamW(policy, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay)

    ref_logprobs = None
    if not simpo:  # before the first update the policy is the reference
        ref = common.load_policy(args.model, device, dtype) if state else policy
        cache = Path(args.ref_cache or run_dir / "ref_logprobs")
        ref_logprobs = reference_logprobs(ref, prompts, completions, args.micro_batch_tokens, cache)
        del ref

    def make_batch(batch: list[int]) -> tuple[common.Rollout, Tensor | None, Tensor]:
        """The pairs as a Rollout, the reference's logprobs of its tokens (2B, T), and the pairs' weights (B,)."""
        rollout = pair_rollout([prompts[i] for i in batch], [completions[i] for i in batch], device)
        row_weights = torch.tensor([pairs[i].weight / len(batch) for i in batch], device=device)
        if simpo:
            return rollout, None, row_weights
        rows = [2 * i + side for i in batch for side in (0, 1)]
        return rollout, ref_logprobs[rows][:, : rollout.mask.shape[1]].to(device), row_weights

    def pair_loss(rollout, micro, ref, row_weights, logprobs) -> tuple[Tensor, dict[str, float]]:
        """dpo_loss of the pairs in `micro`, whose rows are chosen, rejected, chosen, ..."""
        logps = sequence_logps(logprobs, rollout.mask[micro], mean)  # (R,)
        sides = [None, None]
        if ref is not None:
            ref_logps = sequence_logps(ref[micro], rollout.mask[micro], mean)
            sides = [ref_logps[0::2], ref_logps[1::2]]
        weights = row_weights[[row // 2 for row in micro[0::2]]]
        options = beta, args.loss, args.gamma, args.label_smoothing, weights
        return dpo_loss(logps[0::2], logps[1::2], *sides, *options)

    @torch.no_grad()
    def evaluate_all() -> dict[str, float]:
        scores = evaluate_policy(policy, tokenizer, eval_problems, eval_prompts, args, args.minibatch_size)
        ref = None if simpo else common.load_policy(args.model, device, dtype)  # for the KL, and gone again after it
        rewards, kl = judge_samples(policy, ref, tokenizer, eval_problems, eval_prompts, args)
        wins = [(1 + ours - theirs) / 2 for ours, theirs in zip(rewards, start_rewards, strict=True)]  # a tie: 0.5
        scores |= {"eval/win_rate": sum(wins) / len(wins)} | ({} if simpo else {"eval/kl": kl})
        if held_out:
            held, (rollout, ref_held, row_weights) = Metrics(), make_batch(held_out)
            for micro in pair_micro_batches(rollout, args.micro_batch_tokens):
                logprobs, _ = common.completion_logprobs(policy, rollout, micro)
                loss, values = pair_loss(rollout, micro, ref_held, row_weights, logprobs)
                share = row_weights[[row // 2 for row in micro[0::2]]].sum().item()
                held.add({"eval/pair_loss": loss / share}, weight=share)
                values = {f"eval/pair_{name}": values[f"rewards/{name}"] for name in ("accuracy", "margin")}
                held.add(values, weight=len(micro))
            scores |= held.means()
        evaluate.log_scalars(writer, scores, x)
        return scores

    sampler = ProblemSampler(train, seed=args.seed)
    iteration, x = 0, 0  # x: pairs seen so far, the x-axis of every event
    if state:
        common.restore_optimizer(optimizer, state)
        sampler.load_state_dict(state["sampler"])
        iteration, x, before, scores = state["iteration"], state["x"], state["before"], state["scores"]
        start_rewards = state["start_rewards"]
    else:
        start_rewards, _ = judge_samples(policy, None, tokenizer, eval_problems, eval_prompts, args)
        before = scores = evaluate_all()

    bar = tqdm(total=args.iterations, initial=iteration, desc="DPO", unit="it")
    while iteration < args.iterations:
        metrics, clock = Metrics(), Clock(device)
        # ------------------------------------------------------------------------------------------------ 1 sample
        batch = [train[i] for i in sampler.draw(args.minibatch_size)]
        rollout, batch_ref_logprobs, row_weights = make_batch(batch)
        x += len(batch)
        clock.lap("sample")

        # ------------------------------------------------------------------------------------------------ 5 update
        rise = min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        learning_rate = args.learning_rate * rise * (0.55 + 0.45 * math.cos(math.pi * iteration / args.iterations))
        common.set_learning_rate(optimizer, learning_rate)
        kl_weights = common.token_weights(rollout.mask, "token", args.max_new_tokens)
        policy_loss = 0.0
        for micro in pair_micro_batches(rollout, args.micro_batch_tokens):
            logprobs, entropy = common.completion_logprobs(policy, rollout, micro)
            loss, loss_metrics = pair_loss(rollout, micro, batch_ref_logprobs, row_weights, logprobs)
            tokens = rollout.mask[micro].sum().item()
            if not simpo:
                k2 = 0.5 * (logprobs - batch_ref_logprobs[micro]) ** 2  # its gradient pulls log pi to log pi_ref
                metrics.add({"loss/kl": k2.sum().item() / tokens}, weight=tokens)
                loss = loss + args.kl_coef * (kl_weights[micro] * k2).sum()
            loss.backward()
            policy_loss += loss.item()
            metrics.add(loss_metrics, weight=len(micro))
            metrics.add({"loss/entropy": entropy.sum().item() / tokens}, weight=tokens)
        grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.max_grad_norm).item()
        finite = health.is_finite(policy_loss, grad_norm, rollout, range(len(rollout.mask)))
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        metrics.add({"loss/policy": policy_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})
        clock.lap("update")

        # --------------------------------------------------------------------------------------------------- 6 log
        iteration += 1
        metrics.add({"loss/learning_rate": learning_rate})
        logged = evaluate.log_iteration(writer, metrics, clock, x)
        health.watch(logged)
        bar.set_postfix_str(f"loss {logged['loss/policy']:.3f} acc {logged['rewards/accuracy']:.3f}")
        bar.update()

        # ------------------------------------------------------------------------------------- 7 evaluate and save
        last = iteration == args.iterations
        if last or (args.eval_every and iteration % args.eval_every == 0):
            scores = evaluate_all()
        if stop.number or (args.save_every and (last or iteration % args.save_every == 0)):
            state = {"iteration": iteration, "x": x, "before": before, "scores": scores}
            state["sampler"] = sampler.state_dict()
            state["start_rewards"] = start_rewards
            writer.flush()
            target = run_dir / "checkpoints" / f"step_{iteration:06d}"
            common.save_checkpoint(target, policy, tokenizer, optimizer, state, args.keep_checkpoints)
        if stop.number:
            stop.leave(run_dir)

    bar.close()
    writer.close()
    common.save_checkpoint(run_dir / "final", policy, tokenizer)
    stop.restore()
    ranked = pair_table(before, scores, [pairs[i].question for i in held_out])
    print(f"\n{comparison_table(before, scores)}\n\n{ranked}\n\nmodel: {run_dir / 'final'}")
    print(f"curves: tensorboard --logdir {run_dir}")


if __name__ == "__main__":
    main(common.parse_args(Args))
