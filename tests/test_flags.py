"""Every flag of every script with every kind of bad value: exit code 2, the flag and what it allows named, no
traceback, no model loaded, nothing created on disk."""

import dataclasses
import typing
from types import UnionType

import pytest
from conftest import EMBEDDED

import common
import data
import evaluate
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_rm
import train_sft

SCRIPTS = [train_pg, train_ppo, train_grpo, train_kimi, train_dpo, train_rm, train_sft, evaluate, data]
PATHS = {  # flags whose value is a path or a name: bad ones, and what is said
    "model": [("no/such-model", "neither a local directory nor a hub name"), ("tests", "no config.json")],
    "judge_model": [
        ("no/such-model", "neither a local directory nor a hub name"),
        (EMBEDDED, "no single tokens for yes"),
    ],
    "verifier_model": [("no/such-model", "neither a local directory nor a hub name"), (EMBEDDED, "has 2 labels")],
    "language": [("xx", "must be one of ar, bg"), ("", "must be one of")],
    "modes": [("thinking", "is none of think, no_think"), ("think,", "is none of")],
    "stages": [("base", "NAME=DIRECTORY is expected"), ("a=no/such-model", "neither a local directory nor")],
    "temperatures": [("0", "must be more than 0"), ("hot", ""), ("nan", "must be more than 0")],
    "samples": [("no-such.jsonl", "can't be read"), ("README.md", "README.md:1: ")],
    "guesses": [("no-such.jsonl", "can't be read"), ("README.md", "README.md:1: ")],
    "decontaminate": [("no-such.jsonl", "can't be read"), ("README.md", "README.md:1: ")],
    "reward_model": [("no/such-model", "neither a local directory nor a hub name")],
    "problems": [("no-such.jsonl", "can't be read"), ("README.md", "README.md:1: ")],
    "eval_data": [("no-such.jsonl", "can't be read"), ("README.md", "README.md:1: ")],
    "data": [("no-such.jsonl", "can't be read"), ("README.md", "README.md:1: ")],
    "device": [("abacus", "not usable on this machine"), ("cuda:99", "not usable on this machine")],
    "resume": [("no-such-run", "no run directory")],
    "output": [("no-such-folder/samples.jsonl", "not there or not writable"), ("tests", "is a directory")],
    "run_root": [("README.md/runs", "can't be written")],
    "ref_cache": [("README.md/cache", "can't be written")],
}
ANY_TEXT = {"system_prompt", "stop_sentence"}


def bad_values(script) -> list[tuple[str, str, str]]:
    """(flag, value, what must be said)"""
    cases = []
    hints = typing.get_type_hints(script.Args)
    for field in dataclasses.fields(script.Args):
        name, flag = field.name, "--" + field.name.replace("_", "-")
        kinds = set(typing.get_args(hints[name])) if isinstance(hints[name], UnionType) else {hints[name]}
        kinds -= {type(None)}
        if typing.get_origin(next(iter(kinds))) is typing.Literal:
            cases += [(flag, "nonsense", "nonsense"), (flag, "", "")]
        elif bool in kinds:
            cases.append((flag, "maybe", "Unrecognized options: maybe"))  # a switch takes no value
        elif kinds & {int, float}:
            cases += [
                (flag, value, "") for value in ("many", "", "1,5", *(["1.5"] if int in kinds else ["nan", "inf"]))
            ]
            if name not in data.ANY_SIGN:
                cases.append((flag, "-1", "must be"))
            if name in data.AT_LEAST_1:
                cases.append((flag, "0", "must be 1 or more"))
            if name in data.POSITIVE:
                cases.append((flag, "0", "must be more than 0"))
        elif name not in ANY_TEXT:
            assert name in PATHS, f"{name}: a new kind of flag needs its bad values here"
            cases += [(flag, value, said) for value, said in PATHS[name]]
    return cases


CASES = [(script, *case) for script in SCRIPTS for case in bad_values(script)]


@pytest.mark.parametrize(
    ("script", "flag", "value", "said"), CASES, ids=[f"{s.__name__} {flag} {value}" for s, flag, value, _ in CASES]
)
def test_a_bad_value(script, flag, value, said, tmp_path, capsys, monkeypatch):
    def load_weights(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(common, "load_weights", load_weights)
    root = ["--run-root", str(tmp_path / "runs")] if hasattr(script.Args, "run_root") and flag != "--run-root" else []
    model = ["--model", EMBEDDED] if flag != "--model" and script is not data else []
    if script is data:
        model = ["--output", str(tmp_path / "out.jsonl"), "--problems", "arithmetic", "--limit", "9"]
        if flag == "--guesses":
            model = model[:4]
    with pytest.raises(SystemExit) as stopped:
        script.main(common.parse_args(script.Args, [*model, *root, flag, value]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    files = ("--problems", "--eval-data", "--data", "--samples", "--guesses", "--decontaminate")
    if flag not in files and value != "maybe":  # there file and line are named
        assert flag in error
    assert said in error
    assert not list(tmp_path.iterdir())
