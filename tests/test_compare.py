"""compare.py and the statistics of paired differences: what it computes, and what it refuses."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refusal, rl_args, run, short_args

import compare
import train_grpo
import train_rm
from plumbing.flags import parse_args
from plumbing.statistics import paired_difference, paired_problems, pairs_for_half, students_t

SCRIPT = "print('an algorithm')\n"


def write_run(root: Path, name: str, seed: int, values, script: str = SCRIPT, held_out: str = "a1", **flags) -> Path:
    """A finished run of one iteration per value after the first, with 10 samples and 2 seconds each."""
    path = root / f"{name}__s{seed}"
    (path / "final").mkdir(parents=True)
    known = {"seed": seed, "iterations": len(values) - 1, "learning_rate": 1e-4, "model": "tiny", "loss_norm": "token"}
    (path / "args.json").write_text(json.dumps(known | flags))
    (path / "train.py").write_text(script)
    rows = []
    for i, value in enumerate(values):
        row = {"iteration": i, "step": 10 * i}
        if i:
            rows.append(row | {"reward/total": 0.5, "time/sample": 1.5, "time/update": 0.5, "memory/peak_gb": 1.0})
        rows.append(row | {"eval/accuracy": value, "eval/problems": 300.0})
    write_rows(path, rows)
    (path / "samples.jsonl").write_text(json.dumps({"iteration": 0, "step": 0, "held_out": held_out}) + "\n")
    return path


def rows_of(path: Path) -> list[dict]:
    return [*map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]


def write_rows(path: Path, rows: list[dict]) -> None:
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def args(root: Path, *more: str) -> compare.Args:
    return parse_args(compare.Args, ["--runs", f"a={root}/a__*", f"b={root}/b__*", *more])


def two_groups(root: Path, seeds=(1, 2, 3), **flags) -> None:
    for seed in seeds:
        write_run(root, "a", seed, [0.1, 0.2 + 0.01 * seed, 0.4])
        write_run(root, "b", seed, [0.1, 0.4 + 0.01 * seed, 0.5 + 0.01 * seed], **flags)


def printed(root: Path, capsys, *more: str) -> str:
    compare.main(args(root, *more))
    return capsys.readouterr().out


# ---- What it computes


def test_the_quantile_is_students():
    """Catches: a normal quantile, or n for n - 1 degrees of freedom. Values of any table of Student's t."""
    table = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365, 11: 2.228, 31: 2.042, 121: 1.980}
    for n, quantile in table.items():
        assert students_t(n) == pytest.approx(quantile, abs=5e-4)


def test_half_the_interval_takes_so_many_pairs():
    """Catches: four times as many, which forgets that Student's t falls, too."""
    assert [pairs_for_half(n) for n in (2, 3, 5)] == [1, 2, 8]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_without_a_difference_one_interval_in_twenty_excludes_0(seeds):
    """Catches: an interval too narrow or too wide. 1,000 comparisons of runs that differ by seed and by 1,200 sampled
    completions each, but not by group."""
    source, excluded = random.Random(seeds), 0
    for _ in range(1000):
        groups = [[], []]
        for _ in range(seeds):
            shared = source.gauss(0.6, 0.03)  # the seed's own level, which pairing removes
            for group in groups:
                rate = shared + source.gauss(0, 0.03)
                group.append(sum(source.random() < rate for _ in range(1200)) / 1200)
        _, low, high = paired_difference(*groups)
        excluded += low > 0 or high < 0
    assert 30 <= excluded <= 70


def test_the_table_is_right(tmp_path, capsys):
    """By hand. Differences at the end .11, .12, .13: mean .12, half 4.303 * .01 / sqrt 3 = .025. Means over 20 samples:
    a (.1/2 + .2 + .01 s + .4/2) / 2 = .225 + .005 s, b (.1/2 + .4 + .01 s + (.5 + .01 s)/2) / 2."""
    two_groups(tmp_path, learning_rate=3e-4)
    text = printed(tmp_path, capsys)
    lines = {line.split("  ")[0]: line.split()[-7:] for line in text.splitlines()}
    assert re.search(r"after 20 samples +0.400 +0.520 +\+0.120 +\+0.095 to \+0.145 +they differ", text)
    assert re.search(r"after 4 seconds +0.400 +0.520 ", text)
    assert re.search(r"mean over all samples +0.235 +0.365 +\+0.130 ", text), lines
    assert "about 2 more seeds" in text and "what differs: --learning-rate 0.0001 | 0.0003\n" in text


def test_at_equal_samples_and_seconds(tmp_path, capsys):
    """Catches: a faster group compared at its own end. b takes 4 times as long, so a's 4 seconds are 1/4 of b's."""
    two_groups(tmp_path)
    for path in tmp_path.glob("b__*"):
        write_rows(path, [row | ({"time/update": 6.5} if "time/update" in row else {}) for row in rows_of(path)])
    text = printed(tmp_path, capsys)
    assert re.search(r"after 4 seconds +0.400 +0.260 ", text)  # halfway from .1 to .4 + .02
    text = printed(tmp_path, capsys, "--samples", "15")
    assert re.search(r"after 15 samples +0.310 +0.470 ", text)


def test_pairs_are_by_seed(tmp_path, capsys):
    """Catches: pairing by position. Seeds 2 and 3 are in both groups; 1 and 4 are named and left out."""
    for seed in (1, 2, 3):
        write_run(tmp_path, "a", seed, [0.1, 0.2, 0.1 * seed])
    for seed in (4, 3, 2):
        write_run(tmp_path, "b", seed, [0.1, 0.2, 0.1 * seed + 0.05], script=SCRIPT + "# changed\nprint(2)\n")
    text = printed(tmp_path, capsys)
    assert re.search(r"after 20 samples .* \+0.050 +\+0.050 to \+0.050 +they differ", text)
    assert "seeds in both: 2, 3\nseeds in one group only, left out: 1, 4\n" in text
    assert "what differs: train.py | train.py" in text


def test_no_difference_and_nothing_visible(tmp_path, capsys):
    """The other two verdicts; a metric that is no share is compared in percent."""
    for seed, shift in ((1, 0.001), (2, 0.0), (3, -0.001)):
        write_run(tmp_path, "a", seed, [0.1, 0.2, 0.4])
        write_run(tmp_path, "b", seed, [0.1, 0.2 + 100 * shift, 0.4 + shift])
    text = printed(tmp_path, capsys)
    assert re.search("after 20 samples .* no difference", text) and re.search("mean over .* not visible", text)
    for path in tmp_path.iterdir():
        write_rows(path, [row | {"eval/accuracy": 100 * row.get("eval/accuracy", 0.5)} for row in rows_of(path)][::1])
    for path in tmp_path.iterdir():
        rows = [row for row in rows_of(path) if "eval/problems" in row or "memory/peak_gb" in row]
        write_rows(path, [{k: v for k, v in r.items() if k != "eval/accuracy" or "eval/problems" in r} for r in rows])
    assert re.search(r"after 20 samples .* -?\+?0.0% +-0.6% to \+0.6% +no difference", printed(tmp_path, capsys))


def test_evaluations_of_one_problem_are_paired():
    """Catches: --stages that compares two models as if they had answered other problems. The second list lacks one."""
    right, wrong = {"correct": True}, {"correct": False}
    first = [{"question": q, "answer": "1", "completions": [right if q in "01" else wrong, wrong]} for q in "0123"]
    second = [{"question": q, "answer": "1", "completions": [wrong if q == "3" else right]} for q in "321"]
    assert paired_problems(first, second) == ([0.5, 0.0, 0.0], [1.0, 1.0, 0.0])


def test_real_runs_are_compared(tmp_path, capsys):
    """Catches: a run directory that compare.py can't read, of an RL script and of the reward model."""
    for root, rate in (("a", 1e-4), ("b", 1e-3)):
        run(train_grpo.main, rl_args(train_grpo, tmp_path / root, eval_every=1, learning_rate=rate))
        run(train_rm.main, short_args(train_rm, tmp_path / f"{root}-rm", learning_rate=rate))
    capsys.readouterr()
    compare.main(compare.Args((f"a={tmp_path}/a/*", f"b={tmp_path}/b/*")))
    text = capsys.readouterr().out
    assert "after 32 samples" in text and "what differs: --learning-rate 0.0001 | 0.001\n" in text
    compare.main(compare.Args((f"a={tmp_path}/a-rm/*", f"b={tmp_path}/b-rm/*"), tag="eval/pair_accuracy"))
    text = capsys.readouterr().out
    assert "fewer than three evaluations: no figure at equal seconds" in text and "after 16 samples" in text


# ---- What it draws


@pytest.mark.parametrize("suffix, begin", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_figure_is_drawn(suffix, begin, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    two_groups(tmp_path)
    file = tmp_path / "out" / f"mine.{suffix}"
    file.parent.mkdir()
    assert f"wrote {file}" in printed(tmp_path, capsys, "--plot", str(file))
    assert file.read_bytes().startswith(begin) and [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_figure_without_matplotlib_is_refused_first(tmp_path, capsys, monkeypatch):
    """Before the runs are read, and by name."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refusal(compare.main, compare.Args(("a=x", "b=y"), plot="mine.png"), capsys)
    assert "--plot: needs matplotlib: pip install matplotlib" in said
    assert "--plot mine.txt: must end in .png" in refusal(compare.main, compare.Args(plot="mine.txt"), capsys)


# ---- What it refuses


def damage(change):
    """A change of the file metrics.jsonl of run b__s2."""

    def apply(root: Path) -> None:
        path = root / "b__s2" / "metrics.jsonl"
        path.write_text(change(path.read_text()))

    return apply


def without_evaluations(root: Path) -> None:
    for path in root.iterdir():
        write_rows(path, [row for row in rows_of(path) if "memory/peak_gb" in row])


REFUSED = {
    "no evaluations": (without_evaluations, "--tag eval/accuracy: .*a__s1 has no such metric .it has no evaluation"),
    "unfinished": (lambda root: (root / "b__s2/final").rmdir(), "b__s2: has not finished .2 of 2 iterations.; go on"),
    "cut": (damage(lambda text: text[: len(text) // 2]), "b__s2: has not finished .1 of 2"),
    "a line lost": (damage(lambda text: "".join(text.splitlines(True)[2:])), "line 1 is damaged .iteration 0 is exp"),
    "a line twice": (damage(lambda text: text + text.splitlines(True)[-2]), "line 6 is damaged .iteration 3 is exp"),
    "no JSON": (
        damage(lambda text: text.replace('"step"', "step")),
        "line 1 is damaged .no JSON object",
    ),
    "no step": (damage(lambda text: text.replace('"step"', '"s"')), "line 1 is damaged"),
    "not finite": (damage(lambda text: text.replace('"eval/accuracy": 0.1', '"eval/accuracy": null')), "is not finite"),
    "no flags": (lambda root: (root / "b__s2/args.json").write_text("{"), "args.json: is damaged"),
    "no run": (lambda root: (root / "b__x").mkdir(), "b__x: no run directory .it has no args.json.; narrow"),
    "no Python": (lambda root: (root / "b__s2/train.py").write_text("def"), "train.py: is damaged"),
    "no match": (lambda root: [shutil.rmtree(path) for path in root.glob("b__*")], "--runs b=.*: no run matches"),
    "seed twice": (lambda root: write_run(root, "b__2", 2, [0, 0.5, 1]), "two runs have the seed 2: .*b__2__s2"),
    "other problems": (
        lambda root: [shutil.copy(root / "other__s1/samples.jsonl", path) for path in root.glob("b__*")],
        "b__s1: was not evaluated on the problems of .*a__s1",
    ),
    "other budgets": (
        lambda root: [shutil.rmtree(root / "b__s2"), write_run(root, "b", 2, [0, 0.1, 0.2, 0.3], iterations=2)],
        "other budgets; --samples 20 compares after as many",
    ),
    "a mixed group": (
        lambda root: [shutil.rmtree(root / "b__s2"), write_run(root, "b", 2, [0, 0.1, 0.2], loss_norm="constant")],
        "b: its runs differ in --loss-norm .token in .*b__s1, constant in .*b__s2",
    ),
    "another script": (
        lambda root: (root / "b__s2/train.py").write_text(SCRIPT + "x = 1\n"),
        "b: its runs are of different scripts .*narrow the pattern",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_compared_is_refused(name, tmp_path, capsys):
    """Catches: a figure made of runs that are damaged, unfinished, of other tasks, budgets, flags or versions."""
    two_groups(tmp_path)
    write_run(tmp_path, "other", 1, [0.1, 0.2, 0.3], held_out="b2")
    change, said = REFUSED[name]
    change(tmp_path)
    assert re.search(said, refusal(compare.main, args(tmp_path), capsys))


@pytest.mark.parametrize(
    "runs, said",
    [
        ((), "two groups or more are expected"),
        (("a={}/a__*",), "two groups or more are expected"),
        (("a={}/a__*", "{}/b__*"), "NAME='PATTERN' is expected"),
        (("a={}/a__*", "a={}/b__*"), "another group has the name a"),
        (("a={}/a__*", "b={}/*"), "is in a, too"),
        (("a={}/a__s1", "b={}/b__s2"), "a and b: no seed has a run in both"),
    ],
)
def test_groups_are_named_and_apart(runs, said, tmp_path, capsys):
    two_groups(tmp_path)
    assert said in refusal(compare.main, compare.Args(tuple(text.format(tmp_path) for text in runs)), capsys)
    assert "--samples 99" in refusal(compare.main, args(tmp_path, "--samples", "99"), capsys)


def test_one_seed_has_no_interval(tmp_path, capsys):
    """Said, not computed: a spread of one value is none."""
    two_groups(tmp_path, seeds=(1,))
    text = printed(tmp_path, capsys)
    assert re.search(r"after 20 samples .*none: one seed +not visible", text) and "run more seeds" in text


def test_paths_of_an_earlier_stage_and_comments_may_differ(tmp_path, capsys):
    """A pipeline has a start model for each seed; a comment changes no algorithm."""
    for seed in (1, 2):
        write_run(tmp_path, "a", seed, [0.1, 0.2, 0.3], model=f"runs/sft-{seed}/final")
        write_run(tmp_path, "b", seed, [0.1, 0.2, 0.4 + seed / 50], script=SCRIPT + "# a remark\n" * seed, model="x/y")
    assert "seeds in both: 1, 2" in printed(tmp_path, capsys)


def test_the_command_is_one():
    """Catches: an error that ends in a traceback when it runs as a process."""
    command = [sys.executable, "compare.py", "--runs", "a=none/*", "b=none/*"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr == "error: --runs a=none/*: no run matches\n"
