r"""Direct Preference Optimization (DPO), Rafailov et al. 2023, arXiv:2305.18290: trains a policy on preference
pairs, without a reward model and without sampling. Each pair has a chosen completion y+ and a rejected one y-:

    L = - mean of log sigmoid(beta * Delta)                                                                      (eq. 7)
    Delta = (log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-)),  log pi(y) summed over y's tokens, EOS too

The gradient raises log pi(y+) and lowers log pi(y-), weighted by beta * sigmoid(-beta Delta): most where the implicit
reward beta * log(pi / pi_ref) ranks the pair wrongly. A larger beta keeps the policy closer to the reference, which is
the starting model; the default, 1, is for the embedded model (paper: 0.1). Only the difference is trained:
logps/chosen may fall too if logps/rejected falls faster, and then completions that are in no pair gain probability.
That is the method, not a bug; eval/* shows whether it hurts. eval/pair_*, eval/calibration, eval/kl and eval/win_rate
are of --data's held-out pairs and of samples of their prompts; the others, such as eval/accuracy, of --problems.

    --length-normalize   log pi(y) is the mean over y's tokens, not the sum
    --loss ipo           (Delta - 1/(2 beta))^2: stops at a finite margin; beta is the paper's tau (arXiv:2310.12036)
    --loss simpo         -log sigmoid(beta (mean log pi(y+) - mean log pi(y-)) - gamma), no reference (arXiv:2405.14734)
    --label-smoothing e  assumes that a pair's label is wrong with probability e

Departures from the paper:
1. Any two samples of a prompt whose scores differ by --min-gap or more make a pair; a prompt keeps at most
   --max-pairs-per-prompt of them, drawn at random.
2. Pairs count the same unless --pair-weight gap or a field `weight` says otherwise.
3. --kl-coef adds a penalty of (log pi - log pi_ref)^2 / 2 per token. It does not estimate the KL, as the policy did not
   sample the pairs; eval/kl does, on samples of the policy.
4. The reference is not kept in memory. Its logprobs of the pairs are computed once, before the first update, and saved
   in each checkpoint, from which a resumed run takes them. Only evaluations load it, for eval/kl.
5. The optimizer is AdamW (paper: RMSprop), its learning rate decays as a cosine to a tenth, and gradients are clipped.

    python train_dpo.py                                   # pairs of the embedded model's own samples
    python evaluate.py --split all --num-samples 8 --output samples.jsonl && python train_dpo.py --data samples.jsonl
    python train_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --problems openai/gsm8k:main \
        --learning-rate 1e-6 --minibatch-size 32 --beta 0.1 --max-new-tokens 512  # needs a GPU; untested

What you should see from the first command, in 47 s on 2 cores (AMD EPYC): the share of held-out pairs ranked right
rises from 0.50 to 0.93, accuracy from 0.37 to 0.71 (sampled at temperature 1) and from 0.68 to 0.98 (greedy).
logps/rejected falls by nats, logps/chosen moves little. With --iterations 300 --pair-problems 3000 sampled accuracy
levels off at 0.79: the pairs are the starting model's and no longer show the mistakes that the policy still makes. With
a beta of 0.3 or less training goes too far here: the pairs are ranked even better, but accuracy falls below the start.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

import common
from data import Problem, ProblemSampler, decode, encode_problems, is_held_out, load_eval_problems
from plumbing import evaluation, flags, logs, pairs, runs
from rewards import ABSENT, Verifier


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """the policy to start from, and the reference: local model directory or hub name"""
    data: str = "arithmetic-pairs"
    """pairs: "arithmetic-pairs", a file (docs/data.md), or a samples file; a tenth is held out"""
    problems: str = "arithmetic"
    """problems whose held-out part is evaluated: "arithmetic", "countdown", a file (docs/data.md), or a hub dataset"""
    seed: int = 1
    """random seed"""
    iterations: flags.AtLeast0 = 200
    """optimizer steps; also the length of the learning rate's cosine: changing it on --resume changes the schedule"""
    minibatch_size: flags.AtLeast1 = 64
    """pairs per optimizer step"""
    max_new_tokens: flags.AtLeast1 = 40
    """maximum length of a completion in evaluations, in tokens; use e.g. 512 for real models"""
    format_style: Literal["answer-tags", "think"] = "answer-tags"
    """<think>..</think><answer>..</answer> | <think>..</think>, then \\boxed{} or ####; set --system-prompt to match"""
    learning_rate: flags.Positive = 1e-4
    """AdamW's peak learning rate; the default is for the embedded model, use 5e-7 to 5e-6 for real models"""
    weight_decay: flags.NonNegative = 0.0
    """AdamW's weight decay, on all weights"""
    setup: flags.Group[flags.SetupFlags] = field(default_factory=flags.SetupFlags)
    selection: flags.Group[pairs.PairFlags] = field(default_factory=pairs.PairFlags)
    optimization: flags.Group[flags.OptimizationFlags] = field(
        default_factory=lambda: flags.OptimizationFlags(warmup_iterations=20, micro_batch_tokens=4096)
    )
    run: flags.Group[flags.RunFlags] = field(default_factory=lambda: flags.RunFlags(eval_every=0, save_every=0))

    loss: Literal["sigmoid", "ipo", "simpo"] = "sigmoid"
    """DPO's log-sigmoid | IPO's squared error | SimPO's log-sigmoid, without a reference"""
    beta: flags.Positive | None = None
    """beta; None: DPO 1 (use 0.1 for real models) or 5 with --length-normalize, IPO 0.1, SimPO 2"""
    gamma: flags.NonNegative = 1.0
    """gamma, SimPO's target margin; the other losses ignore it"""
    length_normalize: bool = False
    """average a completion's logprobs over its tokens instead of summing them; SimPO always does"""
    label_smoothing: flags.NonNegative = 0.0
    """assumed probability, below 0.5, that a pair's label is wrong (sigmoid and simpo)"""
    kl_coef: flags.NonNegative = 0.0
    """weight of the penalty (log pi - log pi_ref)^2 / 2, averaged over the pairs' tokens"""


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logps are of whole completions, sums or means over tokens, all (B,). None for the reference's: they count as 0.
    row_weights (B,): the loss is the sum of the pairs' losses with these weights; None: the mean. Returns the loss and
    metrics, which are means over pairs."""
    if loss == "simpo" and ref_chosen_logps is not None:
        raise ValueError("loss='simpo' has no reference: ref_chosen_logps must be None")
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
        "rewards/chosen": chosen_rewards.mean().detach(),
        "rewards/rejected": rejected_rewards.mean().detach(),
        "rewards/margin": margins.mean().detach(),
        "rewards/accuracy": pairs.ranked_right(margins).mean().detach(),
        "logps/chosen": chosen_logps.mean().detach(),
        "logps/rejected": rejected_logps.mean().detach(),
    }
    return (row_weights * per_row).sum(), metrics


def sequence_logps(logprobs: Tensor, mask: Tensor, mean: bool) -> Tensor:
    """(R, T) logprobs -> (R,) logps of whole completions: the sum over the mask's tokens, or the mean."""
    logps = logprobs.masked_fill(~mask, 0.0).sum(1)
    return logps / mask.sum(1).clamp(min=1) if mean else logps


@torch.no_grad()
def reference_logprobs(ref, dataset: list[pairs.Pair], max_tokens: int) -> Tensor:
    """(2N, T) logprobs of N pairs' tokens under the reference, 0 on padding; row 2i is pair i's chosen completion, row
    2i + 1 its rejected one."""
    longest = max(len(ids) for pair in dataset for ids in (pair.chosen_ids, pair.rejected_ids))
    logprobs = torch.zeros(2 * len(dataset), longest)
    for start in tqdm(range(0, len(dataset), 256), desc="reference"):
        rollout = pairs.pair_rollout(dataset[start : start + 256], ref.device)
        for micro in pairs.pair_micro_batches(rollout, max_tokens):
            rows = [2 * start + row for row in micro]
            logprobs[rows, : rollout.mask.shape[1]] = common.completion_logprobs(ref, rollout, micro)[0].cpu()
    return logprobs


def judge_samples(policy, ref, tokenizer, prompts: list[pairs.Pair], args: Args) -> tuple[list, float, float]:
    """Samples a few completions of each pair's prompt at temperature 1, with the same random numbers in each call.
    Returns their verdicts (rewards.ABSENT where the pair names no problem), the KL to `ref` (0 without one), and their
    mean length in tokens. KL: the mean over completions of sum_t log pi - log pi_ref, an unbiased estimate because the
    policy sampled them."""
    verdicts, log_ratio, tokens, verify = [], 0.0, 0, Verifier()
    context, G = common.context_length(policy.config), evaluation.SAMPLES
    per_batch = max(1, args.minibatch_size // G)
    for start in range(0, len(prompts), per_batch):
        chunk, seed = prompts[start : start + per_batch], common.derive_seed(args.seed, "judge", start)
        limits = [min(args.max_new_tokens, context - len(pair.prompt_ids)) for pair in chunk for _ in range(G)]
        rollout = common.sample_groups(policy, [pair.prompt_ids for pair in chunk], G, limits, seed=seed)
        problems = [pair.problem or Problem(pair.question, "") for pair in chunk for _ in range(G)]
        verdicts += verify(decode(tokenizer, rollout), problems)
        tokens += int(rollout.lengths.sum())
        if ref is not None:
            budget = args.optimization.micro_batch_tokens
            logprobs, ref_logprobs = (common.rollout_logprobs(model, rollout, budget)[0] for model in (policy, ref))
            log_ratio += (logprobs - ref_logprobs)[rollout.trained].sum().item()
    return verdicts, log_ratio / len(verdicts), tokens / len(verdicts)


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------------ Setup
    simpo, mean = args.loss == "simpo", args.loss == "simpo" or args.length_normalize
    if simpo and args.kl_coef > 0:
        flags.fail("--loss simpo has no reference: --kl-coef doesn't go with it")
    if args.label_smoothing >= 0.5 or (args.label_smoothing and args.loss == "ipo"):
        flags.fail(f"--label-smoothing {args.label_smoothing}: must be under 0.5, and 0 with --loss ipo")
    beta = args.beta or {"sigmoid": 5.0 if mean else 1.0, "ipo": 0.1, "simpo": 2.0}[args.loss]

    device = common.resolve_device(args.setup.device)
    dtype = common.resolve_dtype(args.setup.dtype, device)
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    eval_problems = load_eval_problems(args.problems, args.setup.eval_data, args.run.eval_problems)
    eval_problems = encode_problems(tokenizer, eval_problems, args.setup.system_prompt, config, args.max_new_tokens)
    limits = args.max_new_tokens, args.format_style, args.minibatch_size, args.seed
    held_out = evaluation.HeldOut(tokenizer, eval_problems, *limits)
    if args.data == "arithmetic-pairs" and not args.problems.startswith("arithmetic"):
        flags.fail(
            f"--data arithmetic-pairs: its pairs are no training data for --problems {args.problems}; set --data"
        )
    selection, context = (args.seed, args.selection), common.context_length(config)
    dataset = pairs.load_preference_pairs(args.data, *selection)
    dataset = pairs.encode_pairs(tokenizer, dataset, args.setup.system_prompt, context, *selection)
    held_out_pairs = [i for i, pair in enumerate(dataset) if is_held_out(pair.question)][: args.run.eval_problems]
    prompts = list({dataset[i].prompt_ids: dataset[i] for i in held_out_pairs}.values())  # each once
    train = [i for i, pair in enumerate(dataset) if not is_held_out(pair.question)]
    if len(train) < args.minibatch_size:
        flags.fail(f"--minibatch-size {args.minibatch_size}: only {len(train)} pairs are left to train on; lower it")
    sampler = ProblemSampler(train, seed=args.seed, contents=dataset)

    run = runs.Run(args, tokenizer)
    policy = common.load_policy(run.start_from, tokenizer, device, dtype)
    if args.optimization.gradient_checkpointing:
        common.checkpoint_layers(policy)
    options = {"offload": args.optimization.offload_optimizer, "weight_decay": args.weight_decay}
    optimizer = common.MasterAdamW(policy, args.learning_rate, betas=(0.9, 0.95), **options)
    run.restore(optimizer=optimizer, sampler=sampler)  # checkpointed together with the policy
    budget, ref_logprobs = args.optimization.micro_batch_tokens, run.progress.get("ref_logprobs")
    if not simpo and ref_logprobs is None:  # a new run: the policy is still the reference
        ref_logprobs = reference_logprobs(policy, dataset, budget)

    def make_batch(indices: list[int]) -> tuple[common.Rollout, Tensor | None, Tensor]:
        """The pairs as a Rollout, the reference's logprobs of its tokens (2B, T), and the pairs' weights (B,)."""
        rollout = pairs.pair_rollout([dataset[i] for i in indices], device)  # rows chosen, rejected, chosen, ...
        row_weights = torch.tensor([dataset[i].weight / len(indices) for i in indices], device=device)
        if simpo:
            return rollout, None, row_weights
        rows = [2 * i + side for i in indices for side in (0, 1)]
        return rollout, ref_logprobs[rows][:, : rollout.mask.shape[1]].to(device), row_weights

    def pair_loss(rollout, micro, ref, row_weights, logprobs) -> tuple[Tensor, dict[str, Tensor]]:
        """dpo_loss of the pairs in `micro`, whose rows are chosen, rejected, chosen, ..."""
        logps = sequence_logps(logprobs, rollout.trained[micro], mean)  # (R,)
        ref_logps = None if ref is None else sequence_logps(ref[micro], rollout.trained[micro], mean)
        sides = (None, None) if ref is None else (ref_logps[0::2], ref_logps[1::2])
        weights = row_weights[[row // 2 for row in micro[0::2]]]
        options = beta, args.loss, args.gamma, args.label_smoothing, weights
        return dpo_loss(logps[0::2], logps[1::2], *sides, *options)

    @torch.no_grad()
    def evaluate_now() -> dict[str, float]:
        scores = held_out.evaluate(policy)
        if held_out_pairs:
            rollout, ref_held, row_weights = make_batch(held_out_pairs)
            logprobs, _ = common.rollout_logprobs(policy, rollout, budget)
            rows = list(range(len(logprobs)))
            loss, _ = pair_loss(rollout, rows, ref_held, row_weights / row_weights.sum(), logprobs)
            log_ratio = logprobs if simpo else logprobs - ref_held
            rewards = beta * sequence_logps(log_ratio, rollout.trained, mean)
            scores |= pairs.held_out_scores(rewards[0::2] - rewards[1::2], loss)
            if args.loss == "ipo":  # its margin is no log-odds, of which a sigmoid makes a probability
                del scores["eval/calibration"]
            # the reference, for eval/kl; its memory is freed on return
            ref = None if simpo else common.load_policy(args.model, tokenizer, device, dtype)
            verdicts, kl, length = judge_samples(policy, ref, tokenizer, prompts, args)
            scores |= {"eval/pair_length": length} | ({} if simpo else {"eval/kl": kl})
            start_verdicts[:] = start_verdicts or verdicts  # a new run's first evaluation is that of the start model
            judged = [pair for pair in zip(verdicts, start_verdicts, strict=True) if not {None, ABSENT} & {*pair}]
            if judged:
                scores["eval/win_rate"] = sum((1 + ours - theirs) / 2 for ours, theirs in judged) / len(judged)
        return scores

    iteration, global_step = run.progress["iteration"], run.progress["global_step"]  # global_step: pairs seen
    before, scores = run.progress.get("before"), run.progress.get("scores")
    start_verdicts = run.progress.get("start_verdicts", [])
    if before is None:  # a new run
        before = scores = evaluate_now()
        logs.log_scalars(run.writer, scores, global_step, held_out.samples)

    bar = tqdm(total=args.iterations, initial=iteration, desc="DPO", unit="it")
    health = logs.Health(run.dir, tokenizer, args.optimization.max_bad_updates, dtype)
    health.watch(before)
    while iteration < args.iterations:
        metrics, clock = logs.Metrics(), logs.Clock(device)
        # ----------------------------------------------------------------------------------------------------- 1 sample
        rollout, batch_ref_logprobs, row_weights = make_batch(sampler.draw(args.minibatch_size))
        metrics.add(pairs.length_metrics(rollout))
        global_step += args.minibatch_size
        clock.lap("sample")

        # ----------------------------------------------------------------------------------------------------- 2 update
        rise = min(1.0, (iteration + 1) / max(1, args.optimization.warmup_iterations))
        learning_rate = args.learning_rate * rise * (0.55 + 0.45 * math.cos(math.pi * iteration / args.iterations))
        common.set_learning_rate(optimizer, learning_rate)
        kl_weights = common.token_weights(rollout.trained, "token", args.max_new_tokens)
        policy_loss = 0.0
        for micro in pairs.pair_micro_batches(rollout, budget):  # statistics over rows belong above here
            logprobs, entropy = common.completion_logprobs(policy, rollout, micro)  # (R, T)
            loss, loss_metrics = pair_loss(rollout, micro, batch_ref_logprobs, row_weights, logprobs)
            trained = rollout.trained[micro]
            tokens = trained.sum()
            if not simpo:
                log_ratio = (logprobs - batch_ref_logprobs[micro]).masked_fill(~trained, 0.0)
                k2 = 0.5 * log_ratio**2  # its gradient pulls log pi to log pi_ref
                metrics.add({"loss/pair_kl": k2.detach().sum() / len(micro)}, weight=len(micro))
                loss = loss + args.kl_coef * (kl_weights[micro] * k2).sum()
            loss.backward()
            policy_loss += loss.detach()
            metrics.add(loss_metrics, weight=len(micro))
            metrics.add(logs.token_metrics(rollout, micro, entropy), weight=tokens)
        grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.optimization.max_grad_norm).item()
        finite = health.allows_step(policy_loss, grad_norm, rollout, range(len(rollout.mask)))
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        metrics.add({"loss/policy": policy_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})
        clock.lap("update")

        # -------------------------------------------------------------------------------------------------------- 3 log
        iteration += 1
        metrics.add({"loss/learning_rate": learning_rate})
        health.watch(logs.log_iteration(run.writer, metrics, clock, global_step, bar))

        # ------------------------------------------------------------------------------------------ 4 evaluate and save
        if iteration == args.iterations or (args.run.eval_every and iteration % args.run.eval_every == 0):
            scores = evaluate_now()
            health.watch(scores)
            logs.log_scalars(run.writer, scores, global_step, held_out.samples)
        progress = {"before": before, "scores": scores, "start_verdicts": start_verdicts, "ref_logprobs": ref_logprobs}
        run.checkpoint(policy, iteration, global_step, **progress)

    ranked = pairs.pair_table(before, scores, [dataset[i].question for i in held_out_pairs])
    run.finish(policy, f"{evaluation.comparison_table(before, scores)}\n\n{ranked}")


if __name__ == "__main__":
    flags.start(main, Args)
