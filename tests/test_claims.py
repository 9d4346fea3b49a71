"""claims/claims.py: the rule, and that every claim's commands are commands."""

import importlib
from pathlib import Path

import pytest

from claims import claims
from plumbing.flags import parse_args


@pytest.mark.parametrize(
    "low,high,claimed,verdict",
    [
        (0.01, 0.05, ">", "holds"),
        (-0.05, -0.01, ">", "does not"),
        (-0.02, 0.019, ">", "does not"),  # within 2 points of 0
        (-0.03, 0.05, ">", "not visible"),
        (-0.05, -0.01, "<", "holds"),
        (0.01, 0.05, "<", "does not"),
        (-0.05, 0.03, "<", "not visible"),
        (0.001, 0.01, ">", "holds"),  # small, and sure
        (-0.019, 0.05, ">=", "holds"),
        (-0.015, -0.005, ">=", "holds"),
        (-0.05, -0.03, ">=", "does not"),
        (-0.05, 0.01, ">=", "not visible"),
        (-0.05, -0.03, "!=", "holds"),
        (-0.01, 0.01, "!=", "does not"),
        (-0.01, 0.03, "!=", "not visible"),
    ],
)
def test_the_rule(low, high, claimed, verdict):
    assert claims.judge(low, high, claimed) == verdict


def test_the_interval_is_students():
    """Differences 2, 3, 2, 4, 3: mean 2.8, standard error 0.3742, and 2.776 of it on either side."""
    row = claims.compare("what: a, b", [3, 5, 4, 6, 5], [1, 2, 2, 2, 2], claims.HIGHER)
    assert row.difference == pytest.approx(2.8) and row.verdict == "holds"
    assert row.cells()[0] == "what: a > b"
    assert (row.low, row.high) == (pytest.approx(1.7612, abs=1e-3), pytest.approx(3.8388, abs=1e-3))
    relative = claims.compare("what: a, b", [3, 5, 4, 6, 5], [1, 2, 2, 2, 2], claims.HIGHER, relative=True)
    assert relative.difference == pytest.approx(2.8 / 1.8)


def test_a_run_is_made_once_and_handed_on(monkeypatch):
    """Pins: a model of another seed, a command that is run again, one whose name ignores what it was made from."""
    made = []

    def run_once(command, seed):
        made.append((command, seed))
        return claims.KEPT / f"{command.split()[0]}-{seed}"

    monkeypatch.setattr(claims, "run_once", run_once)
    runs = claims.Runner(seeds=2, jobs=2)
    conditions = {"rl": "a.py", "one_student": "b.py", "both": "c.py {rl} {one_student}"}
    found = runs(**conditions)
    runs(**conditions)
    b = "runs/claims/b.py-1/run/final"
    expected = {
        ("a.py", 1),
        ("a.py", 2),
        ("b.py", 1),
        *((f"c.py runs/claims/a.py-{i}/run/final {b}", i) for i in (1, 2)),
    }
    assert set(made) == expected and len(made) == 5
    assert [folder.name for folder in found["both"]] == ["c.py-1", "c.py-2"]


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_claims_commands_are_commands(name, monkeypatch):
    """All flags exist and are in range, every file is made before it is read, and every row has its figures."""
    commands = []

    class Runs:
        def __call__(self, **conditions):
            known = {}
            for condition, command in conditions.items():
                commands.append(command.format(**known))
                known[condition] = "models/tiny-arithmetic"
            return {condition: [Path("1"), Path("2")] for condition in conditions}

    completion = {"text": "<think>3</think>", "correct": True, "length": 3, "finished": True, "logprob": -1.0}
    completion |= {"format": 1.0, "answer": "3", "reward": 1.0}
    row = {"question": "1+2=", "answer": "3", "completions": [completion] * 51}
    numbers = ("none", "batch mean", "value", "group", "extreme, with std", "extreme, without")
    monkeypatch.setattr(claims, "records", lambda folder: [row | dict.fromkeys(numbers, 1.0)])
    monkeypatch.setattr(claims, "figure", lambda folders, name: [1.0, 2.0])
    monkeypatch.setattr(claims, "scalars", lambda folder: AnyTag())
    rows = claims.CLAIMS[name][1](Runs())
    assert rows and all(row.verdict in ("holds", "does not", "not visible") for row in rows)
    for command in commands:
        script, *flags = command.split()
        if script == "models/make_tiny.py":  # it has no Args
            continue
        if not script.startswith("train_") and script != "claims/process_reward.py":
            flags += ["--output", "file"]
        name = "train_grpo" if script == "claims/process_reward.py" else script.removesuffix(".py")
        parse_args(importlib.import_module(name.replace("/", ".")).Args, flags)


class AnyTag(dict):
    def __missing__(self, tag):
        return [(0, 0.5), (1, 0.6)]


def test_the_command_lists_and_refuses(capsys):
    claims.main(claims.Args())
    listed = capsys.readouterr().out
    assert all(name in listed for name in claims.CLAIMS)
    with pytest.raises(SystemExit):
        claims.main(claims.Args(names=("nonsense",)))
    assert "nonsense: no such claim" in capsys.readouterr().err
