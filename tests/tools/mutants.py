r"""Tests the tests: puts one mistake at a time into a copy of the working tree, and some test must fail.

    python tests/tools/mutants.py                  # all of them: an hour if the tests are strong
    python tests/tools/mutants.py --fast           # with the fast tests only
    python tests/tools/mutants.py --only grpo dpo  # those whose file or name contains one of these
    python tests/tools/mutants.py --check          # runs no tests; checks that each text occurs once

For each mistake the likely test files run first, then the whole fast suite, then the slow tests. Tests of the files'
text (COMPARE_TEXT) are left out, because they notice any change.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks.learning import ROOT  # noqa: E402
from plumbing.statistics import format_table  # noqa: E402

# A file with its likely tests, then its mistakes. <<this=>that>> replaces this by that.
MUTANTS = r"""
train_grpo.py test_grpo.py test_training.py test_updates.py test_naive_forks.py
    clip takes max instead of min: -torch.<<min=>max>>(ratio * A,
    clip bounds swapped: ratio.clamp(1 - <<clip_low, 1 + clip_high=>clip_high, 1 + clip_low>>)
    KL pushes away from the reference: per_token = per_token <<+=>->> kl_coef *
    k3 with the ratio inverted: ref_log_ratio = (<<ref_logprobs - logprobs=>logprobs - ref_logprobs>>)
    unbiased KL without its weight's gradient: token_log_ratio<<=>.detach()>>.exp() * k3
    std without Bessel's correction: rewards.std(1, keepdim=True<<=>, correction=0>>)
    uniform groups keep rounding noise: return advantages<<.masked_fill(uniform[:, None], 0.0)=>>>
    padding reaches exp: (logprobs - old_logprobs)<<.masked_fill(~mask, 0.0)=>>>
    GSPO without division by the length: << / mask.sum(1, keepdim=True).clamp(min=1)=>>>).expand_as
    old logprobs not detached: old = logprobs<<.detach()=>>> if
    weights per micro-batch: <<weights[micro]=>common.token_weights(trained[micro], args.loss_norm, 40)>>,
    temperature missing in the update: completion_logprobs(policy, rollout, micro<<, temperature=>>>)
    one seed for all batches: derive_seed(args.seed, "sample"<<, global_step=>>>)
    dynamic sampling keeps the uniform groups: (<<~=>>>is_uniform(rewards, scored) | unanswered
    truncated completions kept, finished ones masked: advantages.where(<<rollout.finished=>~rollout.finished>>, 0.0)
    no backward pass for rows that have only a KL: (advantages != 0).any(1)<< | (args.kl_coef != 0)=>>>
    the weights taken for the mask: <<A = advantages=>A, mask = advantages, weights != 0>>
    an unknown reward counts in its group's mean: 0.0).sum(1, keepdim=True) / <<n.clamp(min=1)=>rewards.shape[1]>>
train_pg.py test_pg.py test_training.py test_naive_forks.py
    gamma dropped from the return: rewards[:, t] + <<gamma * =>>>next_return
    delta without the next value: delta = rewards[:, t]<< + gamma * next_value=>>>
    score one token before the last: token_rewards[rows, common.last_true(trained)<<=> - 1>>]
    policy gradient with the wrong sign: return <<-=>>>(weights * (logprobs * advantages)
    a baseline for none: rewards[scored].mean() if args.baseline <<== "batch-mean"=>!= "value">>
    the recursion steps on a tool's tokens: next_advantage = torch.where(<<mask[:, t]=>mask[:, t] | True>>,
train_ppo.py test_pg.py test_training.py test_naive_forks.py
    lambda dropped: gamma * <<gae_lambda * =>>>next_advantage
    returns from whitened advantages: return advantages, (<<advantages=>whiten(advantages, mask)>> + values)
    values leak over the EOS: next_value = <<torch.where(mask[:, t], values[:, t], next_value)=>values[:, t]>>
    GAE steps on a tool's tokens: next_advantage = torch.where(<<mask[:, t]=>mask[:, t] | True>>,
    KL in the reward with the wrong sign: (<<-=>>>kl_coef * (logprobs - ref_logprobs)).detach()
    gradient through the KL in the reward: (-kl_coef * (logprobs - ref_logprobs))<<.detach()=>>>
    score on a padded column: rewards[torch.arange(len(scores)), <<common.last_true(mask)=>-1>>]
    clip takes the smaller loss: torch.<<max=>min>>(-A * ratio,
    value clip takes the smaller error: torch.<<max=>min>>((values - returns) ** 2,
    whitened over padding: written = advantages<<[mask]=>>>
    a missing EOS costs nothing: eos_scores.where(<<rollout.finished=>rollout.finished | True>>
train_kimi.py test_kimi.py test_updates.py test_naive_forks.py
    mean of the log-ratios instead of their sum: (logprobs - anchor_logprobs).masked_fill(~mask, 0.0).<<sum=>mean>>(1)
    tau twice as strong: tau<< / 2=>>> * d**2
    log Z of a sum, not of a mean: logsumexp(1, keepdim=True)<< - n.log()=>>>
    optimizer state kept between iterations: <<optimizer.state.clear()=>pass>>
    a minibatch divided by the size of the batch: written / <<written[minibatch].sum().clamp(min=1)=>batch_size>>
train_dpo.py test_dpo.py
    chosen and rejected swapped: margins = <<chosen_rewards - rejected_rewards=>rejected_rewards - chosen_rewards>>
    IPO's target without its 2: 1 / <<(2 * beta)=>beta>>)
    SimPO's gamma with the wrong sign: margins <<-=>+>> gamma if
    label smoothing without the flipped label: label_smoothing * logsigmoid(<<-=>>>logits)
    mean over padding too: return <<logps / mask.sum(1).clamp(min=1)=>logprobs.mean(1)>> if mean
    the policy for the reference after a resume: <<not simpo and ref_logprobs is None=>not simpo>>
train_rm.py test_rm.py test_updates.py
    margin with the wrong sign: logsigmoid(margins <<-=>+>> margin)
    pair weights ignored: reward_model_loss(row_scores[0::2], row_scores[1::2], args.margin<<, weights=>>>)
    calibration without its first bin: index_add(0, index, right - confidence)<<=>[1:]>>
plumbing/engine.py test_any_model.py test_families.py
    any way to run a model counts as exact: if error.max().item() <<< limit=>>= 0>>:
    a model that is not causal is taken: > <<0.15=>1e9>> * half.float().norm():
common.py test_any_model.py
    unused ids keep a probability: <<logits if unused is None else =>logits if True else >>logits.index_fill_(
    a template's end of a turn is ignored: if (end := end_of_turn(tokenizer)) <<!==>is>> tokenizer.eos_token:
data.py test_any_model.py
    a question's special tokens end its turn: split_special_tokens=<<message["role"] == "user"=>False>>).input_ids
    a completion keeps its stop: drop = {<<tokenizer.eos_token_id, tokenizer.pad_token_id, *rollout.stop_ids=>>>}
    ids of another tokenizer are trained: if text == texts[i]<<=> or text>> else encoded[i]
    a resume takes other problems: items() if <<state["digests"].get(name) != digest=>False>>]
train_sft.py test_faults.py test_training.py
    loss with the wrong sign: return <<-=>>>(weights * logprobs.masked_fill(~mask, 0.0)).sum()
    a micro-batch normalised by itself: rollout.trained[micro], weights[micro]<<=> / weights[micro].sum()>>)
common.py test_sampling.py test_logprobs.py test_grpo.py test_training.py test_updates.py test_naive_forks.py
    EOS left out of the mask: = tokens, logprobs, <<~ended=>~(ended | torch.isin(tokens, eos))>>
    temperature missing in the sampler: scaled = <<logits if temperature in (0, 1) else logits / temperature=>logits>>
    temperature missing in the logprobs: else logits<<.div_(temperature)=>>>
    a row's draws depend on the others: uniforms[<<rows=>: len(rows)>>, step]
    a block of probability 0 is drawn: torch.searchsorted(ends, target<<, right=True=>>>)
    a token of probability 0 is drawn: inside[:, -1:])<<, right=True=>>>)
    only the first EOS stops: torch.tensor(eos_token_ids, device=device).flatten()<<=>[:1]>>
    groups interleaved: [[<<p * G + g=>g * P + p>> for p in batch
    micro-batches over the budget: and used<< + needed=>>> > max_tokens:
    sequence weights summed over rows: m.sum(1, keepdim=True).clamp(min=1)<< / rows=>>>
    token weights count padding: return m / m.<<sum().clamp(min=1)=>numel()>>
    constant weights by the longest row: (rows * <<max_new_tokens=>m.shape[1]>>)
    value read after the token: run(value_model.base_model), batch.predictor<<=>+ 1>>)
    score read before the last token: run(reward_model.base_model)[batch.ends<<=>- 1>>]
    mean score added: scores <<-=>+>> getattr(reward_model.config,
    entropy's gradient with the wrong sign: -gradient[rows, None] <<-=>+>> bonus
    dropout stays on: return model.to(device).<<eval=>train>>()
    masters not saved: {"masters": <<copies=>[]>>}
    only the last micro-batch counts: else <<master.grad.add_(gradient)=>gradient.float()>>
    masters not copied to the weights: <<weight.copy_(master)=>pass>>
    a stop that does not finish: finished[rows] |= <<stops=>torch.isin(tokens, eos)>> & ~ended
    joined groups get other texts: return [value[<<i=>chosen.index(i)>>] for value, chosen in zip(values, picked
    a filter's logprobs are of the whole softmax: - <<total.log()=>(logits / temperature - largest).logsumexp(1, True)>>
    inserted tokens are trained: [<<False=>True>>] * len(insert)
plumbing/engine.py test_logprobs.py test_sampling.py
    predictor off by one: torch.arange(len(flat)<< - 1, ids.numel() - 1=>, ids.numel()>>)
    padded predictor off by one: starts[row] + column<< - 1=>>>
    completions begin at position 0: prompt_mask.nonzero()[:, 1], <<lengths[group][row] + =>>>column
    a token sees the next one: .triu(<<1=>2>>)
    padding of a prompt is seen: .masked_fill(padded, <<-torch.inf=>0.0>>)
    decoding one position late: self.compute(tokens, self.lengths + self.done<< - 1=>>>)
    plain decoding one position late: (self.lengths + self.done<<=>+ 1>>)[:, None]
    remaining rows get other rows' lengths: = self.group[rows], self.lengths[<<rows=>: len(rows)>>], self.bias[rows]
plumbing/files.py test_survival.py
    an old file is lost while the new one is written: else target.with_name(<<f".{os.getpid()}.tmp"=>target.name>>)
    two processes write one run: fcntl.lockf(file, <<fcntl.LOCK_EX | fcntl.LOCK_NB=>fcntl.LOCK_UN>>)
    another model passes for the run's own: range(<<blocks=>0>>):
plumbing/runs.py test_resume.py test_run_directory.py test_faults.py
    state not restored: <<value.load_state_dict(self._saved.pop(name))=>self._saved.pop(name)>>
    old events not purged: purge_step=<<purge=>None>>
    progress not saved: "global_step": global_step}<< | progress=>>>
    resumed from the start model: = <<state.get("model", args.model)=>args.model>>,
    lines past the checkpoint stay: if row["step"] < <<(purge_step or 0)=>2**60>>
    a line of another iteration's accuracy: evaluations.get(int(name.removeprefix("step_"))<<=> - 1>>,
    the oldest checkpoint first: removeprefix("step_"))<<, reverse=True=>>>)
    damaged checkpoint accepted: if digests <<!==>is None and digests !=>> file_digests(directory, list(digests)):
    the newest checkpoints removed: in written[<<keep:=>:-keep>>] if keep
plumbing/statistics.py test_compare.py test_claims.py
    one degree of freedom too many: degrees = n<< - 1=>>>
    the deviation of the pairs, not of their mean: statistics.stdev(differences)<< / math.sqrt(n)=>>>
compare.py test_compare.py
    paired by position: <<for seed in groups[base] if seed in groups[name]=>for seed in groups[base]>>
    evaluations of other problems compared: if run.task != <<first[0].task=>run.task>>:
data.py test_data.py test_resume.py test_naive_forks.py
    ledger by position, not by problem: index = <<self.place[problem]=>problems.index(problem)>>
    every epoch in one order: random.Random(f"epoch <<{epoch} =>>>{self.seed}")
    every prioritized draw alike: random.Random(f"prioritized <<{self.drawn} =>>>{self.seed}")
    prioritized sampling prefers solved problems: max(self.floor, <<1 - rate=>rate>>)
    rates don't move: self.rates[index] += (rate - self.rates[index]) / <<2=>1e9>>
    pass rates ignored: self.rates = [<<known.get(i, mean)=>0.0>> for
    curriculum from hard to easy: key=lambda i: <<=>->>self.items[i].difficulty
    a curriculum that ends at once: share = min(1.0, max(<<self.drawn / self.total_draws=>1.0>>,
    a resumed curriculum forgets its length: self.total_draws = <<state["total_draws"]=>self.total_draws>>
    too many draws across an epoch's end: self.order[position : position + count<< - len(indices)=>>>]
    ledger not restored: <<list(state["attempts"]), list(state["successes"])=>self.attempts, self.successes>>
    a thinking mode moves a problem to the other split: hashlib.sha256(<<text=>question>>.encode())
    no EOS after a demonstration: return [ids<< + [tokenizer.eos_token_id]=>>> for ids in
    BOS twice: tokenizer(chunk<<, add_special_tokens=False=>>>).input_ids
rewards.py test_unanswered.py
    an absent reward counts as a wrong answer: [math.nan if value in (None, ABSENT<<=>>>) else
    the learned reward goes everywhere: [ABSENT if by_rule<<=> and False>> and has_answer
rewards.py test_rewards.py test_naive_forks.py
    longer answers get more: bonus = (<<0.5 - =>>>(lengths - shortest)
    short wrong answers get more: bonus.<<where(correct > 0, bonus.clamp(max=0.0))=>clone()>>
    penalty from the limit on: (lengths - <<(max_new_tokens - buffer)=>max_new_tokens>>)
    short answers win by the penalty: / buffer).clamp(<<0, 1=>max=1>>)
    groups and problems out of step: (texts, <<[problem for problem in problems for _ in range(G)]=>problems * G>>
    truncated completions can be right: <<right if finished or right == ABSENT else 0.0=>right>>
    an unknown reward counts as 0: scored <<&==>|=>> torch.tensor([value is not None
    length reward from the start: if iteration < <<flags.length_reward_start=>0>>:
    text outside of the tags: answer.strip()<< and not outside.strip()=>>> else
plumbing/answers.py test_answers.py test_rewards.py
    percent is no unit: .'()/<<%=>>>-])+(?<
    the first answer counts: start = text.<<rfind=>find>>("<answer>",
    an answer in the thinking counts: text = <<remove_thinking=>str>>(text)
    nan equals nan: in (""<<, "nan", "inf", "infinity"=>,>>)
    every word is a unit: search("[aeiouy]", word.lower())<< and not NO_UNIT.fullmatch(word)=>>>
    superscripts are digits: f"<<^{{{match[0].translate(RAISED)}}}=>{match[0].translate(RAISED)}>>"
plumbing/algebra.py test_answers.py
    half of a mixed number: append(<<whole + =>>>Fraction(top, bottom))
    minus sign lost: "-": lambda value: <<-value=>value>>
    an identity equals a contradiction: if <<any=>False and any>>(all(are_equal
    a question is its own answer: if other and <<not symbols(other[1])=>False>>:
    positive variables only: return value if <<probe == 0 or (probe > 1 and digest[4] % 2)=>True>> else
    a set may hold more: return <<not others=>True>>
    a chain is its last side: <<all(equal(value, values[-1]) for value in values)=>True>>
plumbing/logs.py test_updates.py
    last value instead of the maximum: = <<max(value, sums.get(name, -float("inf")))=>value>>, 1.0
    positive and negative gaps cancel: - old_logprobs)<<.abs()=>>>.masked_fill
    entropy over padding: <<(entropy.detach() * trained).sum() / trained.sum()=>entropy.detach().mean()>>
    clipped share ignores the advantage's sign: <<(advantages < 0) & =>>>(ratio < 1 - clip_low)
    a gradient that is not finite is applied: math.isfinite(loss)<< and math.isfinite(grad_norm)=>>>
plumbing/rows.py test_data.py
    trained without the choices: if extra.lower() in <<needed=>()>> and extra != name
    chosen answers of another prompt: if own[: len(asked)] != <<asked=>own[: len(asked)]>>:
    an Alpaca row without its input: join((turns[-1]["content"], <<*added=>>>))
    reasoning lost: for text in <<thoughts[:1]=>()>>) + content
    a worked solution is the answer: if name.lower() in <<WORKED=>()>> and not plain
plumbing/pairs.py test_dpo.py test_rm.py
    pairs left in the order of their lengths: return <<[sorted(rows) for rows in batches]=>batches>>
    a cut completion gets an EOS: tuple(i<< if whole else i[:-1]=>>>)
    ties make pairs: if <<gap > 0 and =>>>gap >= min_gap:
    a tie counts as wrong: return <<((margins.abs() > 1e-4) * margins.sign() + 1) / 2=>(margins > 0).float()>>
    pair weights not scaled to mean 1: weight=pair.weight<< / mean=>>> if
plumbing/engine.py test_pretended_gpu.py
    on a GPU, an index on the CPU: row = torch.arange(R, device=<<self.group.device=>"cpu">>)
    on a GPU, item() in the captured step: buffer.index_copy_(2, <<self.column=>self.column.item() + self.column>>,
    on a GPU, float32 times bfloat16: torch.bmm(q, k.transpose(1, 2)<<, out_dtype=torch.float32=>.float()>>)
    on a GPU, a captured tensor is replaced: <<self.slot[:R], self.rows[:]=>self.slot, self.rows>> = self.place
    on a GPU, graphs reused without their new inputs: <<target.copy_(source)=>pass>>
    on a GPU, every token in the first column: self.column.fill_(<<self.done=>0>>)
    on a GPU, one graph for all sizes: if <<R not in self.graphs:=>not self.graphs:>>
    on a GPU, positions of the step before: self.positions[:R] = tokens, <<positions=>self.positions[:R].clone()>>
    on a GPU, logits of added rows: return logits[: <<len(tokens)=>R>>]
    on a GPU, rows leave the buffers, not the cache: <<t[:R] = t[rows]=>pass>>
    on a GPU, a narrower batch is captured again: min(prompts, key=len)] * (P - len(prompts)), <<L=>0>>
    on a GPU, a smaller batch is captured again: len(prompts) <= <<P <= 2 * len(prompts)=>P == len(prompts)>>:
    on a GPU, a wait breaks the capture: torch.cuda.set_sync_debug_mode(<<"error"=>mode>>)
    on a GPU, waits are errors from then on: torch.cuda.set_sync_debug_mode(<<mode=>"error">>)
    on a GPU, a float32 mask for bfloat16: dtype = <<q.dtype if q.is_cuda else torch.float32=>torch.float32>>
    on a GPU, a mask in each layer: if <<dtype not in biases=>True>>:
    on a GPU, the slow kernel: <<grouped or torch.backends.cuda.can_use_efficient_attention(asked)=>True>>
    on a GPU, indices copied one by one: <<move_together(device, whole + parts)=>[t.to(device) for t in whole + parts]>>
common.py test_pretended_gpu.py
    on a GPU, weights replaced: <<weight.copy_(master)=>weight.data = master.to(weight.device, weight.dtype)>>
    on a GPU, gradients stay there: weight.grad.to(<<master.device=>weight.device>>)
    on a GPU, pinned masters: torch.empty(w.shape<<=>, pin_memory=True>>).copy_
    on a GPU, a T4 emulates bfloat16: including_emulation=<<False=>True>>
    on a GPU, nothing is computed by the check: torch.zeros(1, device=resolved)<<.add(1).item()=>>>
    on a GPU, its own random numbers: torch.rand(B, longest, <<generator=generator=>device=device>>)
    on a GPU, a full memory is another head: if out_of_memory(error)<<=> and False>>:
    a restored moment stays mapped: {name: <<value.clone()=>value>> for name, value in own.items()
    a driver that is too old is not noticed: if NVIDIA.exists()<<=> and False>>:
plumbing/flags.py test_pretended_gpu.py
    on a GPU, out of memory hides: return out_of_memory(<<error.__cause__ or error.__context__=>None>>)
plumbing/logs.py test_pretended_gpu.py
    on a GPU, logged values read one by one: <<value.detach().float().clone() if on_gpu=>value if False>> else
    a Mac's clock does not wait: if self.device.type <<!= "cpu"=>== "cuda">>:
plumbing/runs.py test_pretended_gpu.py
    a checkpoint is in memory twice: map_location="cpu"<<, mmap=True=>>>
plumbing/evaluation.py test_pretended_gpu.py
    short prompts first: per_batch > len(order), <<-start=>start>>)
    the smaller batch first: key=lambda start: (<<start + per_batch > len(order)=>False>>, -start)
"""
COMPARE_TEXT = "test_repository.py", "test_forks.py"


@dataclass
class Args:
    only: tuple[str, ...] = ()
    """only mutants whose file or name contains one of these texts"""
    check: bool = False
    """run no tests; only check that each text occurs exactly once and that the mutants compile"""
    fast: bool = False
    """skip the slow tests; a mutant that passes the fast ones has survived"""


class Mutant(NamedTuple):
    file: str
    tests: list[str]
    name: str
    old: str
    new: str

    def apply(self, root: Path) -> str:
        """The file's text with the mistake."""
        text = (root / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            sys.exit(f"{self.file}: {self.name}: {self.old!r} occurs {count} times, once is expected")
        mutated = text.replace(self.old, self.new)
        compile(mutated, self.file, "exec")
        return mutated


def read_mutants() -> list[Mutant]:
    mutants, head = [], []
    for line in MUTANTS.strip().splitlines():
        if not line.startswith(" "):
            head = line.split()
            continue
        name, _, code = line.strip().partition(": ")
        before, this, that, after = re.fullmatch(r"(.*?)<<(.*?)=>(.*)>>(.*)", code).groups()
        mutants.append(Mutant(head[0], head[1:], name, before + this + after, before + that + after))
    return mutants


def copy_tree(target: Path) -> None:
    """Copies every file that git tracks or does not ignore, as it is now."""
    listed = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # not deleted since
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def failing_test(copy: Path, *options: str, limit: float = 3600) -> str | None:
    """The first test that fails in the copy, None if none does. limit: seconds."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=no", *options]
    command += [f"--ignore=tests/{name}" for name in COMPARE_TEXT]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # bytecode must not outlive its mutant
    with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open as long as a test's child runs
        process = subprocess.Popen(command, cwd=copy, env=environment, stdout=output, stderr=-2, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"timeout after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        printed = output.read()
    if process.returncode in (0, 5):  # 5: no test was selected
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE)
    return failed[1] if failed else f"pytest ended with {process.returncode}: {printed[-300:]}"


def killer(copy: Path, mutant: Mutant, limit: float, fast: bool) -> str | None:
    likely = [f"tests/{name}" for name in mutant.tests if (copy / "tests" / name).exists()]
    killed_by = failing_test(copy, *likely, limit=limit) if likely else None
    killed_by = killed_by or failing_test(copy, limit=limit)
    return killed_by if killed_by or fast else failing_test(copy, "-m", "slow")


def main(args: Args) -> None:
    mutants = [m for m in read_mutants() if not args.only or any(o in f"{m.file}: {m.name}" for o in args.only)]
    for mutant in mutants:
        mutant.apply(ROOT)
    if args.check:
        return print(f"{len(mutants)} mutants: each text occurs once, all compile")
    rows, survived = [], 0
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        copy_tree(copy)
        begun = time.time()
        if failed := failing_test(copy):
            sys.exit(f"fails without a mutant: {failed}")
        limit = 60 + 3 * (time.time() - begun)
        for mutant in mutants:
            original, begun = (copy / mutant.file).read_text(), time.time()
            (copy / mutant.file).write_text(mutant.apply(copy))
            killed_by = killer(copy, mutant, limit, args.fast)
            (copy / mutant.file).write_text(original)
            survived += killed_by is None
            seconds = f"{time.time() - begun:.0f}"
            rows.append([f"{mutant.file}: {mutant.name}", killed_by or "SURVIVED", seconds])
            print(*rows[-1], sep="  ", file=sys.stderr)
    print(format_table(["mutant", "killed by", "seconds"], rows))
    print(f"\n{len(rows)} mutants, {survived} survived")


if __name__ == "__main__":
    main(tyro.cli(Args))
