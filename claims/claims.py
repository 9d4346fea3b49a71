"""Claims about reinforcement learning of language models, tested one by one on the embedded models.

    python claims/claims.py                          # lists them
    python claims/claims.py format-reward            # runs one and prints its rows
    python claims/claims.py --every                  # all of them, in hours; finished runs are kept in runs/claims

A claim compares two conditions, each run with the same five seeds. The rule was fixed before the first run. The paired
difference, first minus second, has a 95% interval by Student's t. For each comparison, the first of these that is true:

    first > second, <, !=     "holds": the interval excludes 0 in the claimed direction (!=: in either)
                              "does not": it excludes 0 in the other, or lies within 2 points of 0
    first >= second           "holds": the whole interval is above -2 points (first is as good as second)
                              "does not": it lies below 0
    any                       "not visible"

Accuracy is on held-out problems, sampled at temperature 1. A difference with a % sign is relative to the second
condition's mean. Others are 100 times the difference of the two figures: for shares, percentage points.
"""

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.learning import curve, machine, new_figure, read_scalars, save_figure  # noqa: E402
from data import Problem  # noqa: E402
from plumbing.flags import fail  # noqa: E402
from plumbing.runs import git_commit  # noqa: E402
from plumbing.statistics import (  # noqa: E402
    AS_GOOD,
    DIFFERENT,
    HIGHER,
    LOWER,
    diversity,
    format_table,
    judge,
    majority_accuracy,
    paired_difference,
    pass_at_k,
    summarize,
)
from rewards import language_reward  # noqa: E402
from tasks.arithmetic import steps_are_right  # noqa: E402

KEPT = ROOT / "runs" / "claims"


@dataclass
class Args:
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """claims to test; without any, the command lists them"""
    every: bool = False
    """test all claims"""
    seeds: int = 5
    """2 or more; fewer seeds make wider intervals"""
    jobs: int = 2
    """processes at a time, with one thread each"""
    plot: Path | None = None
    """directory for pictures of the claims in PICTURES"""


# ---- Running ---------------------------------------------------------------------------------------------------------


def run_once(command: str, seed: int) -> Path:
    """The folder of this command's run. A run that has finished before is not repeated. The folder has a training
    script's run directory, `run`, or another command's output, `out.jsonl`."""
    script, *flags = command.split()
    folder = KEPT / f"{Path(script).stem}-{hashlib.sha256(f'{command} {seed}'.encode()).hexdigest()[:10]}"
    if (folder / "done.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if script.startswith("models/"):
        flags = [str(folder / "run" / "final"), *flags]
    elif script.startswith("train_") or script == "claims/process_reward.py":
        flags += ["--seed", str(seed), "--run-root", str(folder), "--run-name", "run"]
    else:
        flags += ["--seed", str(seed), "--output", str(folder / "out.jsonl")]
    print(f"seed {seed}: {command}", file=sys.stderr)
    start, environment = time.perf_counter(), os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.run([sys.executable, script, *flags], cwd=ROOT, stdout=log, stderr=log, env=environment)
    if process.returncode:
        fail(f"seed {seed} of `{command}` failed; its output is in {folder / 'log.txt'}")
    seconds = time.perf_counter() - start
    done = {"command": command, "seed": seed, "commit": git_commit(ROOT), "seconds": seconds}
    (folder / "done.json").write_text(json.dumps(done) + "\n")
    return folder


class Runner:
    """Runs commands for every seed, several at a time."""

    def __init__(self, seeds: int, jobs: int):
        self.seeds, self.pool = list(range(1, seeds + 1)), ThreadPoolExecutor(jobs)
        self.futures: dict[tuple, Future] = {}  # by command, inputs, seed
        self.used: set[Path] = set()
        self.conditions: dict[str, list[Path]] = {}  # the latest claim's, for its table and picture

    def __call__(self, **commands: str) -> dict[str, list[Path]]:
        """For each condition, its folder of each seed. {other} in a command is the model or file that condition
        `other` made with the same seed. A condition whose name begins with one_ is run with seed 1 only, for all. A
        condition must stand after those that it needs: they have then begun before it waits for them."""
        found: dict[str, list[Future]] = {}
        for name, command in commands.items():
            needed = {other: found[other] for other in re.findall(r"{(\w+)}", command)}
            found[name] = []
            for i, seed in enumerate(self.seeds):
                seed = 1 if name.startswith("one_") else seed
                made = {other: futures[i] for other, futures in needed.items()}
                key = command, *made.values(), seed
                if key not in self.futures:
                    self.futures[key] = self.pool.submit(self.run, command, made, seed)
                found[name].append(self.futures[key])
        self.conditions = {name: [future.result() for future in futures] for name, futures in found.items()}
        return self.conditions

    def run(self, command: str, made: dict[str, Future], seed: int) -> Path:
        folder = run_once(command.format(**{other: product(future.result()) for other, future in made.items()}), seed)
        self.used.add(folder)
        return folder


def product(folder: Path) -> str:
    """The model or file that a run made. The path is relative to the repository, so that a cached run has the same name
    in every checkout."""
    made = folder / "out.jsonl"
    return str((made if made.exists() else folder / "run" / "final").relative_to(ROOT))


# ---- Figures of a run ------------------------------------------------------------------------------------------------


@cache
def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    return read_scalars(folder / "run")


def last(folders: list[Path], tag: str = "eval/accuracy", over: int = 1) -> list[float]:
    """For each seed, the mean of the tag's last `over` values."""
    return [statistics.mean(value for _, value in scalars(folder)[tag][-over:]) for folder in folders]


def first(folders: list[Path], tag: str = "eval/accuracy") -> list[float]:
    return [scalars(folder)[tag][0][1] for folder in folders]


@cache
def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def figure(folders: list[Path], name: str) -> list[float]:
    """For each seed, a figure of evaluate.py's samples."""
    return [(summarize(records(folder)) | diversity(records(folder)))[name] for folder in folders]


def number(folders: list[Path], name: str) -> list[float]:
    """For each seed, a figure of claims/gradients.py."""
    return [records(folder)[0][name] for folder in folders]


# ---- The rule --------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    what: str  # "figure: first condition, second condition"
    claimed: str  # the first condition's relation to the second
    first: float
    second: float
    difference: float
    low: float
    high: float
    relative: bool
    verdict: str

    def cells(self) -> list:
        points = [f"{100 * value:+.1f}{'%' * self.relative}" for value in (self.difference, self.low, self.high)]
        figure, _, conditions = self.what.rpartition(": ")
        what = f"{figure}: {f' {self.claimed} '.join(conditions.rsplit(', ', 1))}"
        return [what, self.first, self.second, points[0], f"{points[1]} to {points[2]}", self.verdict]


def compare(what: str, a: list[float], b: list[float], claimed: str, relative: bool = False) -> Row:
    """Compares a with b, one value for each seed. claimed: the relation of a to b in the claim."""
    scale = statistics.mean(b) if relative else 1.0
    mean, low, high = (value / scale for value in paired_difference(a, b))
    verdict = judge(low, high, claimed)
    return Row(what, claimed, statistics.mean(a), statistics.mean(b), mean, low, high, relative, verdict)


# ---- The claims ------------------------------------------------------------------------------------------------------

CLAIMS: dict[str, tuple[str, Callable]] = {}
QUICK = "--eval-every 0 --save-every 0"
GRPO = f"train_grpo.py --iterations 60 {QUICK}"  # 15,360 completions
ON_COUNTDOWN = "--problems countdown --max-new-tokens 120"
COUNTDOWN = f"train_grpo.py --iterations 30 {QUICK} --model models/tiny-countdown {ON_COUNTDOWN}"
SAMPLES = "evaluate.py --eval-problems 300 --num-samples 8"
TRIES = "evaluate.py --split train --eval-problems 2000 --num-samples"  # of training problems


def claim(text: str) -> Callable:
    def register(test: Callable) -> Callable:
        CLAIMS[test.__name__.replace("_", "-")] = text, test
        return test

    return register


@claim("A baseline reduces the variance of the policy gradient")
def baseline_variance(runs: Runner) -> list[Row]:
    at = runs(base="claims/gradients.py")["base"]
    at_trained = runs(trained=GRPO, later="claims/gradients.py --model {trained}")["later"]
    return [
        compare(f"variance {when}: {name}, no baseline", number(f, name), number(f, "none"), LOWER, relative=True)
        for when, f in (("at the base", at), ("after GRPO", at_trained))
        for name in ("batch mean", "value", "group")
    ]


@claim("Dividing by the group's standard deviation favours very easy and very hard problems")
def std_and_difficulty(runs: Runner) -> list[Row]:
    f = runs(base="claims/gradients.py")["base"]
    what = "share of the gradient from groups with one right or one wrong: divided, not"
    return [compare(what, number(f, "extreme, with std"), number(f, "extreme, without"), HIGHER)]


@claim("A critic helps over long chains, and suppresses right completions that slipped on the way")
def critic_on_long_chains(runs: Runner) -> list[Row]:
    long, samples = f"--problems arithmetic:5-6 --iterations 30 {QUICK}", f"{SAMPLES} --problems arithmetic:5-6"
    r = runs(
        ppo=f"train_ppo.py --kl-coef 0 {long}",
        grpo=f"train_grpo.py --learning-rate 5e-5 --update-epochs 4 --minibatch-size 64 {long}",
        of_ppo=f"{samples} --model {{ppo}}",
        of_grpo=f"{samples} --model {{grpo}}",
    )

    def slipped(folder: Path) -> float:
        right = [(c["text"], x["question"]) for x in records(folder) for c in x["completions"] if c["correct"]]
        return statistics.mean(not steps_are_right(text, Problem(question, "")) for text, question in right)

    return [
        compare("accuracy: PPO, GRPO with as many updates", last(r["ppo"]), last(r["grpo"]), HIGHER),
        compare(
            "right ones with a wrong step: PPO, GRPO",
            [*map(slipped, r["of_ppo"])],
            [*map(slipped, r["of_grpo"])],
            LOWER,
        ),
    ]


@claim("The mean over each sequence (GRPO) lengthens wrong completions")
def sequence_mean_and_length(runs: Runner) -> list[Row]:
    r = runs(sequence=COUNTDOWN, constant=f"{COUNTDOWN} --loss-norm constant")
    return [
        compare(
            f"{what}: sequence, constant", *(last(r[c], tag, over) for c in ("sequence", "constant")), claimed, relative
        )
        for what, tag, over, claimed, relative in (
            ("length of wrong ones, last 10 iterations", "rollout/length_wrong", 10, HIGHER, True),
            ("accuracy", "eval/accuracy", 1, DIFFERENT, False),
        )
    ]


@claim("PG, PPO, GRPO and Kimi differ at equal samples")
def algorithms(runs: Runner) -> list[Row]:
    budget = f"--iterations 40 {QUICK}"  # 10,240 completions
    r = runs(
        GRPO=f"train_grpo.py --learning-rate 1.5e-4 {budget}",
        PG=f"train_pg.py {budget}",
        PPO=f"train_ppo.py {budget}",
        Kimi=f"train_kimi.py {budget}",
    )
    return [
        compare(f"accuracy: {name}, GRPO", last(r[name]), last(r["GRPO"]), DIFFERENT) for name in ("PG", "PPO", "Kimi")
    ]


@claim("The format reward is critical")
def format_reward(runs: Runner) -> list[Row]:
    r = runs(with_it=GRPO, without=f"{GRPO} --format-weight 0")
    tags = {"accuracy": "eval/accuracy", "right format": "eval/format"}
    return [
        compare(f"{what}: with, without", last(r["with_it"], t), last(r["without"], t), HIGHER)
        for what, t in tags.items()
    ]


@claim("R1-Zero: accuracy, length and reflection rise together, and the reflection was in the base already")
def r1_zero(runs: Runner) -> list[Row]:
    f = runs(zero=COUNTDOWN)["zero"]
    tags = {"accuracy": "accuracy", "length": "length", "reflection words a completion": "reflection_words"}
    rows = [
        compare(f"{what}: after, before", last(f, f"eval/{t}"), first(f, f"eval/{t}"), HIGHER, relative=t != "accuracy")
        for what, t in tags.items()
    ]
    words = first(f, "eval/reflection_words")
    return [*rows, compare("reflection words a completion: before, none at all", words, [0.0] * len(words), HIGHER)]


@claim("A small cold start suffices")
def small_cold_start(runs: Runner) -> list[Row]:
    sizes, conditions = (20, 200, 1900), {"zero": GRPO, "samples": f"{TRIES} 4 --model {{zero}}"}
    sft = "train_sft.py --keep longest --iterations 50 --warmup-iterations 5 --eval-every 0 --save-every 0"
    for n in sizes:
        conditions[f"sft_{n}"] = f"{sft} --data {{samples}}:{n} --minibatch-size 16"
        conditions[f"rl_{n}"] = f"{GRPO} --model {{sft_{n}}}"
    r = runs(**conditions)
    rows = [
        compare(f"accuracy after {what}: {n} demonstrations, 1,900", last(r[f"{s}_{n}"]), last(r[f"{s}_1900"]), AS_GOOD)
        for s, what in (("sft", "SFT"), ("rl", "SFT and RL"))
        for n in sizes[:2]
    ]
    return [
        *rows,
        compare("accuracy after RL: 20 demonstrations before it, none", last(r["rl_20"]), last(r["zero"]), HIGHER),
    ]


@claim("The language reward stops the mixing of languages, and costs accuracy")
def language_reward_and_mixing(runs: Runner) -> list[Row]:
    samples = f"{SAMPLES} {ON_COUNTDOWN}"
    r = runs(
        plain=COUNTDOWN,
        english=f"{COUNTDOWN} --language-weight 0.2",
        of_plain=f"{samples} --model {{plain}}",
        of_english=f"{samples} --model {{english}}",
    )

    def mixed(folder: Path) -> float:
        return statistics.mean(language_reward(c["text"], "en") < 1 for x in records(folder) for c in x["completions"])

    return [
        compare(
            "completions with Chinese: with, without",
            [*map(mixed, r["of_english"])],
            [*map(mixed, r["of_plain"])],
            LOWER,
        ),
        compare("accuracy: with, without", *(figure(r[c], "accuracy") for c in ("of_english", "of_plain")), LOWER),
    ]


@claim("Rewards for the process are not better than rewards for the outcome (a miniature of R1's PRM)")
def process_or_outcome(runs: Runner) -> list[Row]:
    r = runs(outcome=GRPO, process=f"claims/process_reward.py {GRPO.partition(' ')[2]}")
    return [compare("accuracy: outcome, process", last(r["outcome"]), last(r["process"]), AS_GOOD)]


@claim("RL beats search at equal completions (a miniature of R1's search)")
def rl_or_search(runs: Runner) -> list[Row]:
    r = runs(rl=GRPO, search="evaluate.py --eval-problems 300 --num-samples 51")  # 15,300 completions, as many as RL's

    def likeliest(folder: Path) -> float:
        return statistics.mean(max(x["completions"], key=lambda c: c["logprob"])["correct"] for x in records(folder))

    def any_right(folder: Path) -> float:
        return statistics.mean(pass_at_k(51, sum(c["correct"] for c in x["completions"]), 51) for x in records(folder))

    ways = {
        "majority of 51": lambda folder: majority_accuracy(records(folder)),
        "likeliest of 51": likeliest,
        "any of 51 (a perfect judge)": any_right,
    }
    tags = {"RL, one sample": "eval/accuracy", "RL, greedy": "eval/accuracy_greedy"}
    return [
        compare(f"accuracy: {one}, {other}", last(r["rl"], tag), [*map(way, r["search"])], HIGHER)
        for one, tag in tags.items()
        for other, way in ways.items()
    ]


@claim("A small model learns more from a larger one's samples than from RL")
def distillation_or_rl(runs: Runner) -> list[Row]:
    taught = (
        "--data arithmetic-demonstrations --demonstrations 100000 --iterations 1500 --learning-rate 2e-3 --from-scratch"
    )
    r = runs(
        one_tiny="models/make_tiny.py --hidden 64 --layers 2",
        one_student=f"train_sft.py --model {{one_tiny}} {taught} {QUICK}",
        teacher=GRPO,
        samples=f"{TRIES} 4 --model {{teacher}}",
        distilled=f"train_sft.py --model {{one_student}} --data {{samples}} --keep correct --iterations 200 {QUICK}",
        rl=f"{GRPO} --model {{one_student}}",
    )
    return [compare("accuracy: distilled, by RL", last(r["distilled"]), last(r["rl"]), HIGHER)]


@claim("A difficulty filter, a curriculum and prioritized sampling beat problems drawn uniformly")
def which_problems(runs: Runner) -> list[Row]:
    grpo = f"{GRPO} --eval-data arithmetic"
    r = runs(
        one_tries=f"{TRIES} 8",
        one_all="curate.py --samples {one_tries} --min-pass-rate 0 --max-pass-rate 1",
        one_band="curate.py --samples {one_tries}",
        one_failed="curate.py --samples {one_tries} --min-pass-rate 0 --max-pass-rate 0",
        uniform=f"{grpo} --problems {{one_all}}",
        filtered=f"{grpo} --problems {{one_band}}",
        failed=f"{grpo} --problems {{one_failed}}",
        curriculum=f"{grpo} --problems {{one_all}} --problem-sampling curriculum",
        prioritized=f"{grpo} --problems {{one_all}} --problem-sampling prioritized",
    )
    names = {
        "filtered": "neither always nor never solved",
        "failed": "failed 8 of 8",
        "curriculum": "curriculum",
        "prioritized": "prioritized",
    }
    return [
        compare(f"accuracy: {text}, uniform", last(r[name]), last(r["uniform"]), HIGHER) for name, text in names.items()
    ]


@claim("A length reward from the start degenerates; switched on late it shortens at equal accuracy")
def length_reward(runs: Runner) -> list[Row]:
    r = runs(
        never=COUNTDOWN,
        early=f"{COUNTDOWN} --length-weight 0.5",
        late=f"{COUNTDOWN} --length-weight 0.5 --length-reward-start 20",
    )
    never, early, late = r["never"], r["early"], r["late"]
    return [
        compare("accuracy: early, never", last(early), last(never), LOWER),
        compare("accuracy: late, never", last(late), last(never), AS_GOOD),
        compare("length: late, never", last(late, "eval/length"), last(never, "eval/length"), LOWER, relative=True),
    ]


@claim("Few problems suffice for RL")
def few_problems(runs: Runner) -> list[Row]:
    r = runs(
        one_32="curate.py --problems arithmetic --limit 32",
        one_128="curate.py --problems arithmetic --limit 128",
        few_32=f"{GRPO} --problems {{one_32}} --eval-data arithmetic",
        few_128=f"{GRPO} --problems {{one_128}} --eval-data arithmetic",
        many=GRPO,
    )
    return [compare(f"accuracy: {n} problems, 6,000", last(r[f"few_{n}"]), last(r["many"]), AS_GOOD) for n in (32, 128)]


@claim("Accuracy degrades gracefully with the thinking budget, before and after RL")
def thinking_budget(runs: Runner) -> list[Row]:
    samples, budgets = "evaluate.py --eval-problems 300 --num-samples 4 --problems arithmetic:4", (1, 5, 9, 13)
    stages = {"base": "", "rl": " --model {rl}"}
    conditions = {
        f"{stage}_{b}": f"{samples}{model} --think-budget {b}" for stage, model in stages.items() for b in budgets
    }
    r = runs(rl=GRPO, **conditions)
    steps = list(zip(budgets[1:], budgets, strict=False))
    return [
        compare(
            f"accuracy, {stage}: at most {more} tokens, {less}",
            *(figure(r[f"{stage}_{b}"], "accuracy") for b in (more, less)),
            HIGHER,
        )
        for stage in stages
        for more, less in steps
    ]


@claim("A preference stage after RL costs some accuracy")
def preference_stage(runs: Runner) -> list[Row]:
    r = runs(
        rl=COUNTDOWN,
        samples=f"{TRIES} 4 --model {{rl}} {ON_COUNTDOWN}",
        pairs="curate.py --samples {samples} --make shorter",
        dpo=f"train_dpo.py --model {{rl}} --data {{pairs}} {ON_COUNTDOWN} --iterations 60 {QUICK}",
    )
    return [
        compare("accuracy: after DPO, before it", last(r["dpo"]), first(r["dpo"]), LOWER),
        compare(
            "length: after, before", last(r["dpo"], "eval/length"), first(r["dpo"], "eval/length"), LOWER, relative=True
        ),
    ]


PAIRS = {"samples": f"{TRIES} 8"}  # of the base; right and wrong completions of a problem are its pairs
DPO = f"train_dpo.py --data {{samples}} --iterations 100 {QUICK}"


@claim("DPO: a larger beta stays closer to the reference; means, SimPO and IPO against sums")
def dpo_variants(runs: Runner) -> list[Row]:
    flags = {
        "beta 1": "--beta 1",
        "beta 0.1": "--beta 0.1",
        "beta 10": "--beta 10",
        "means": "--length-normalize",
        "SimPO": "--loss simpo",
        "IPO": "--loss ipo",
    }
    keys = {name: re.sub(r"\W", "_", name) for name in flags}
    r = runs(**PAIRS, **{keys[name]: f"{DPO} {more}" for name, more in flags.items()})
    r = {name: r[key] for name, key in keys.items()}
    sums, rows = r["beta 1"], []
    for name in ("beta 0.1", "beta 10"):
        kl = last(r[name], "eval/kl"), last(sums, "eval/kl")
        rows.append(
            compare(f"KL to the reference: {name}, 1", *kl, HIGHER if name == "beta 0.1" else LOWER, relative=True)
        )
    for name in list(flags)[1:]:
        rows.append(compare(f"accuracy: {name}, beta 1 on sums", last(r[name]), last(sums), DIFFERENT))
        lengths = last(r[name], "eval/length"), last(sums, "eval/length")
        rows.append(compare(f"length: {name}, beta 1 on sums", *lengths, DIFFERENT, relative=True))
    return rows


RM = {**PAIRS, "rm": f"train_rm.py --data {{samples}} {QUICK}"}
PPO = f"train_ppo.py --reward-model {{rm}} --accuracy-weight 0 --format-weight 0 --iterations 30 {QUICK}"


@claim("DPO does as well as PPO on a reward model of the same pairs")
def dpo_or_ppo(runs: Runner) -> list[Row]:
    r = runs(**RM, dpo=DPO, ppo=f"{PPO} --kl-coef 0.05")
    return [compare("accuracy: DPO, PPO", last(r["dpo"]), last(r["ppo"]), AS_GOOD)]


@claim("Optimizing a learned reward without a KL overoptimizes it: the score rises, the accuracy does not")
def overoptimization(runs: Runner) -> list[Row]:
    r = runs(**RM, without_KL=f"{PPO} --kl-coef 0", with_KL=f"{PPO} --kl-coef 0.05")
    score, free = "reward/model", r["without_KL"]
    return [
        compare("score without a KL: last 5 iterations, first", last(free, score, 5), first(free, score), HIGHER),
        compare("accuracy without a KL: after, before", last(free), first(free), LOWER),
        compare("accuracy: with a KL, without", last(r["with_KL"]), last(free), HIGHER),
    ]


@claim("RL makes the policy less diverse than SFT did")
def collapse(runs: Runner) -> list[Row]:
    r = runs(rl=GRPO, of_base=SAMPLES, of_rl=f"{SAMPLES} --model {{rl}}")
    base, rl = r["of_base"], r["of_rl"]
    return [
        compare(
            "entropy a token: after RL, after SFT", figure(rl, "entropy"), figure(base, "entropy"), LOWER, relative=True
        ),
        compare(
            "distinct of 8: after RL, after SFT", figure(rl, "distinct"), figure(base, "distinct"), LOWER, relative=True
        ),
        compare("pass@8: after RL, after SFT", figure(rl, "pass_at_8"), figure(base, "pass_at_8"), LOWER),
    ]


TABLES = {  # claim: the tags to print for each of its conditions, last values, means over the seeds
    "dpo-variants": ("eval/accuracy", "eval/length", "eval/kl", "logps/chosen", "logps/rejected"),
}
PICTURES = {  # claim: the tags to draw, a panel each
    "algorithms": ("reward/accuracy",),
    "overoptimization": ("reward/model", "reward/accuracy"),
}


def with_tag(conditions: dict[str, list[Path]], tag: str) -> dict[str, list[Path]]:
    """The conditions whose runs logged the tag."""
    trained = {name: folders for name, folders in conditions.items() if (folders[0] / "run").exists()}
    return {name: folders for name, folders in trained.items() if tag in scalars(folders[0])}


def means(conditions: dict[str, list[Path]], tags: tuple[str, ...]) -> list[list]:
    """A row for each condition that logged the first tag; nan for a tag that it did not log."""
    return [
        [name, *(statistics.mean(last(f, tag)) if tag in scalars(f[0]) else float("nan") for tag in tags)]
        for name, f in with_tag(conditions, tags[0]).items()
    ]


def draw(conditions: dict[str, list[Path]], tags: tuple[str, ...], path: Path, width: int = 5) -> None:
    """Mean over the seeds of each condition that logs the tag, each value the mean over `width` iterations; the range
    of the seeds is shaded."""
    figure, plots = new_figure([f"{tag}, training batches" for tag in tags])
    for axes, tag in zip(plots, tags, strict=True):
        for name, folders in with_tag(conditions, tag).items():
            curves = [curve(scalars(folder), tag) for folder in folders]
            n = min(len(values) for _, values in curves)
            smooth = [[statistics.mean(v[max(0, i - width + 1) : i + 1]) for i in range(n)] for _, v in curves]
            seeds = list(zip(*smooth, strict=True))
            (line,) = axes.plot(curves[0][0][:n], [*map(statistics.mean, seeds)], label=name.replace("_", " "))
            axes.fill_between(
                curves[0][0][:n], [*map(min, seeds)], [*map(max, seeds)], color=line.get_color(), alpha=0.15
            )
        if "accuracy" not in tag:
            axes.autoscale(axis="y")
    save_figure(figure, path)


def main(args: Args) -> None:
    names = list(CLAIMS) if args.every else list(args.names)
    if unknown := [name for name in names if name not in CLAIMS]:
        fail(f"{unknown[0]}: no such claim; `python claims/claims.py` lists them")
    if args.seeds < 2:
        fail(f"--seeds {args.seeds}: must be 2 or more")
    if not names:
        width = max(map(len, CLAIMS))
        print("\n".join(f"{name.ljust(width)}  {text}" for name, (text, _) in CLAIMS.items()))
        return
    print(machine(), end="\n\n")
    runs, failed = Runner(args.seeds, args.jobs), []
    try:
        for name in names:
            start = time.perf_counter()
            try:
                rows = CLAIMS[name][1](runs)
            except SystemExit:  # a run failed, which has been printed; the other claims go on
                failed.append(name)
                continue
            header = [name, "first", "second", "difference", "95% interval", "verdict"]
            print(f"{CLAIMS[name][0]}\n{format_table(header, [row.cells() for row in rows])}")
            print(f"{(time.perf_counter() - start) / 60:.1f} minutes\n", flush=True)
            if tags := TABLES.get(name):
                print(format_table(["", *tags], means(runs.conditions, tags)), end="\n\n")
            if args.plot and name in PICTURES:
                draw(runs.conditions, PICTURES[name], args.plot / f"claim-{name}.png")
    finally:
        runs.pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the runs that have not begun never begin
    done = [json.loads((folder / "done.json").read_text()) for folder in runs.used]
    hours, commits = sum(run["seconds"] for run in done) / 3600, sorted({run["commit"][:10] for run in done})
    print(f"{len(done)} runs, {hours:.1f} hours of one thread, at {', '.join(commits)}")
    if failed:
        fail(f"not tested, because a run failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
