"""The command line: ranges, groups, --resume, --help; and every script with every kind of bad value."""

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import typing
from dataclasses import dataclass, field
from types import UnionType

import pytest
from conftest import EMBEDDED

import common
import curate
import evaluate
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_rm
import train_sft
from plumbing.flags import (
    AtLeast0,
    AtLeast1,
    Group,
    NonNegative,
    Positive,
    Share,
    as_flag,
    from_flat,
    parse_args,
    ranges,
    to_flat,
)

RL = [train_pg, train_ppo, train_grpo, train_kimi]
TRAIN = [*RL, train_dpo, train_rm, train_sft]
SCRIPTS = [*TRAIN, evaluate, curate]


def name_of(script) -> str:
    return script.__name__


# ---- Ranges: a flag of every kind


@dataclass
class Inner:
    """A box."""

    inside: Share = 0.5
    """a flag of a group"""
    amounts: tuple[NonNegative, ...] = (1.0,)
    """a list in a group"""


@dataclass
class Args:
    positive: Positive = 1.0
    non_negative: NonNegative = 1.0
    share: Share = 1.0
    at_least_0: AtLeast0 = 1
    at_least_1: AtLeast1 = 1
    maybe: AtLeast1 | None = None
    several: tuple[Positive, ...] = ()
    number: float = 0.0
    whole: int = 0
    names: tuple[str, ...] = ()
    inner: Group[Inner] = field(default_factory=Inner)


@dataclass
class RunArgs(Args):
    """With the flags that a resumed run needs, as in the train scripts."""

    iterations: AtLeast1 = 5
    resume: str | None = None


REFUSED = [
    ("--positive", "0", "0.0: must be more than 0"),
    ("--positive", "-0.1", "-0.1: must be more than 0"),
    ("--non-negative", "-0.1", "-0.1: must be 0 or more"),
    ("--share", "-0.1", "-0.1: must be 0 or more and at most 1"),
    ("--share", "1.01", "1.01: must be 0 or more and at most 1"),
    ("--at-least-0", "-1", "-1: must be 0 or more"),
    ("--at-least-1", "0", "0: must be 1 or more"),
    ("--maybe", "0", "0: must be 1 or more"),
    ("--several", "1 0 2", "0.0: must be more than 0"),
    ("--several", "1 nan", "nan: must be finite"),
    ("--inside", "2", "2.0: must be 0 or more and at most 1"),
    ("--amounts", "0 -1", "-1.0: must be 0 or more"),
]
REFUSED += [
    (flag, value, f"{value}: must be finite")
    for flag in ("--positive", "--non-negative", "--share", "--number", "--inside", "--amounts")
    for value in ("nan", "inf", "-inf")
]


def refused(Args, argv: list[str], capsys) -> str:
    """Stderr of arguments that must end the program with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        parse_args(Args, argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    return error


@pytest.mark.parametrize(("flag", "value", "said"), REFUSED, ids=[" ".join(case[:2]) for case in REFUSED])
def test_a_number_out_of_its_range_is_refused(flag, value, said, capsys):
    """Catches: a bad number that is accepted, also among a list's later numbers and in a group's flags."""
    assert refused(Args, [flag, *value.split()], capsys) == f"error: {flag} {said}\n"


TAKEN = [
    ("--positive", "1e-30", 1e-30),
    ("--non-negative", "0", 0.0),
    ("--share", "0", 0.0),
    ("--share", "1", 1.0),
    ("--at-least-0", "0", 0),
    ("--at-least-1", "1", 1),
    ("--maybe", "1", 1),
    ("--maybe", "None", None),
    ("--several", "1 0.5", (1.0, 0.5)),
    ("--several", "", ()),
    ("--number", "-1.5", -1.5),
    ("--whole", "-3", -3),
    ("--names", "a b", ("a", "b")),
    ("--inside", "0", 0.0),
    ("--amounts", "0 1e9", (0.0, 1e9)),
]


@pytest.mark.parametrize(("flag", "value", "taken"), TAKEN, ids=[" ".join(case[:2]) for case in TAKEN])
def test_a_number_at_the_edge_of_its_range_is_taken(flag, value, taken):
    """Catches: a range that refuses its own end, or a negative number where any is allowed."""
    args = parse_args(Args, [flag, *value.split()])
    assert to_flat(args) == to_flat(Args()) | {flag.removeprefix("--").replace("-", "_"): taken}


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--at-least-1", "1.5"), ("--whole", "nan"), ("--maybe", "many"), ("--several", "1 hot"), ("--inside", "")],
)
def test_no_number_is_refused(flag, value, capsys):
    assert flag in refused(Args, [flag, *(value.split() or [""])], capsys)


def test_the_group_is_not_in_the_flags_name(capsys):
    assert parse_args(Args, ["--inside", "0.25"]).inner.inside == 0.25
    refused(Args, ["--inner.inside", "0.25"], capsys)


def test_ranges_are_found_in_every_type():
    hints = typing.get_type_hints(Args, include_extras=True)
    found = {name: [str(limit) for limit in ranges(hint)] for name, hint in hints.items()}
    assert found["positive"] == found["several"] == ["more than 0"]
    assert found["at_least_1"] == found["maybe"] == ["1 or more"]
    assert found["share"] == ["0 or more and at most 1"]
    assert found["number"] == found["whole"] == found["names"] == []


# ---- Flat arguments, and --resume


def test_arguments_come_back_from_json():
    """Catches: a list flag that comes back as a list, unequal to the tuple that it was; a group's flag lost."""
    args = Args(several=(1.0, 2.0), maybe=3, names=("a", "b"), inner=Inner(0.25, (0.0, 5.0)))
    flat = to_flat(args)
    assert flat["inside"] == 0.25 and flat["amounts"] == (0.0, 5.0) and "inner" not in flat
    assert from_flat(Args(), json.loads(json.dumps(flat))) == args
    assert from_flat(Args(), {"inside": 0.75, "several": [1.0]}) == Args(several=(1.0,), inner=Inner(0.75))
    assert from_flat(Args(), {}) == Args()


def test_an_unknown_name_is_no_argument():
    """Catches: a misspelt flag, or a group's name with a flat value, silently ignored."""
    for values in ({"insid": 1.0}, {"inner": 1.0}, {"positive": 1.0, "other": 2}):
        with pytest.raises(ValueError, match="unknown: " + list(values)[-1]):
            from_flat(Args(), values)


@pytest.fixture
def saved_run(tmp_path):
    args = RunArgs(several=(0.5, 1.0), names=("a", "b"), inner=Inner(0.25, (0.0, 5.0)))
    (tmp_path / "args.json").write_text(json.dumps(to_flat(args)))
    return str(tmp_path)


def test_resume_takes_the_saved_arguments(saved_run):
    args = parse_args(RunArgs, ["--resume", saved_run])
    assert args == RunArgs(several=(0.5, 1.0), names=("a", "b"), inner=Inner(0.25, (0.0, 5.0)), resume=saved_run)
    assert parse_args(RunArgs, [f"--resume={saved_run}", "--iterations", "9"]).iterations == 9


def test_resume_accepts_unchanged_flags(saved_run):
    """Catches: a list flag given again that is refused because it is compared with a JSON list."""
    same = ["--several", "0.5", "1", "--names", "a", "b", "--amounts", "0", "5", "--inside", "0.25"]
    assert parse_args(RunArgs, ["--resume", saved_run, *same]) == parse_args(RunArgs, ["--resume", saved_run])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--several 0.5", "--several [0.5]: the run was started with [0.5, 1.0]; on --resume only --iterations, "),
        ("--names a", "--names ['a']: the run was started with ['a', 'b']; on --resume only "),
        ("--amounts 0", "--amounts [0.0]: the run was started with [0.0, 5.0]; on --resume only "),
        ("--inside 0.5", "--inside 0.5: the run was started with 0.25; on --resume only "),
        ("--maybe 2", "--maybe 2: the run was started with None; on --resume only "),
        ("--iterations 0", "--iterations 0: must be 1 or more"),
    ],
)
def test_resume_names_a_changed_flag(saved_run, flags, said, capsys):
    """Catches: a changed flag that begins a different run in the same directory."""
    error = refused(RunArgs, ["--resume", saved_run, *flags.split()], capsys)
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', '{"no_flag": 1}'])
def test_resume_needs_this_scripts_arguments(tmp_path, text, capsys):
    missing = refused(RunArgs, ["--resume", str(tmp_path / "none")], capsys)
    assert missing.startswith(f"error: --resume {tmp_path}/none: no run directory") and missing.count("\n") == 1
    (tmp_path / "args.json").write_text(text)
    error = refused(RunArgs, ["--resume", str(tmp_path)], capsys)
    assert "does not hold this script's arguments" in error and error.count("\n") == 1


# ---- The scripts' flags


def all_fields(Args) -> dict[str, tuple[type, object]]:
    """(class, type with its ranges) of each flag by name, including flags in groups."""
    found = {}
    for name, hint in typing.get_type_hints(Args, include_extras=True).items():
        inside = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        found |= all_fields(inside) if dataclasses.is_dataclass(inside) else {name: (Args, hint)}
    return found


def plain_types(hint) -> set:
    """The plain types in a type: {int} for `AtLeast1 | None` and for `tuple[AtLeast1, ...]`."""
    parts = [part for part in typing.get_args(hint) if isinstance(part, type) or typing.get_args(part)]
    if typing.get_origin(hint) is typing.Annotated:
        parts = [hint.__origin__]
    inner = {kind for part in parts for kind in plain_types(part)} if typing.get_origin(hint) else {hint}
    return inner - {type(None)}


def is_number(hint) -> bool:
    return typing.get_origin(hint) is not typing.Literal and bool(plain_types(hint) & {int, float})


MOST_FLAGS = {"grpo": 54, "ppo": 54, "pg": 50, "kimi": 48, "dpo": 40, "rm": 30, "sft": 31}


@pytest.mark.parametrize("script", TRAIN, ids=name_of)
def test_flags_do_not_multiply(script):
    assert len(to_flat(script.Args())) <= MOST_FLAGS[script.__name__.removeprefix("train_")]
    assert len(dataclasses.fields(script.Args)) <= 28


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_help_shows_every_flag_in_its_box(script, capsys):
    """Catches: a group's flags shown among the script's own, spelled with the group's name, or not shown."""
    with pytest.raises(SystemExit) as stopped:
        parse_args(script.Args, ["--help"])
    assert stopped.value.code == 0
    _, first, *boxes = re.split(r"^\W*(?:(\w+) )?options\W*$", capsys.readouterr().out, flags=re.MULTILINE)
    texts = {first or "": boxes[0]} | dict(zip(boxes[1::2], boxes[2::2], strict=True))
    hints = typing.get_type_hints(script.Args)
    groups = {name: all_fields(hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    own = {name: hint for name, hint in hints.items() if name not in groups}
    assert texts.keys() == {"", *groups}
    for box, flags in {"": own, **groups}.items():
        for name in flags:
            assert re.search(rf"^[^\w-]{{0,3}}{as_flag(name)}(?![\w-])", texts[box], re.MULTILINE), (box, name)
    assert (
        set(groups)
        == {
            **dict.fromkeys(RL, {"setup", "sampling", "rewards", "optimization", "run"}),
            **dict.fromkeys([evaluate, curate], set()),
            train_dpo: {"setup", "selection", "optimization", "run"},
            train_rm: {"selection", "optimization", "run"},
            train_sft: {"setup", "optimization", "run"},
        }[script]
    )


@functools.cache
def documented(Args) -> set[str]:
    """The fields of a dataclass that a docstring follows."""
    (node,) = ast.parse(inspect.getsource(Args)).body
    return {
        flag.target.id
        for flag, after in itertools.pairwise(node.body)
        if isinstance(flag, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if after.value.value.strip()
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_every_flag_has_help(script):
    """Catches: a flag that --help shows without an explanation."""
    without = {name for name, (Args, _) in all_fields(script.Args).items() if name not in documented(Args)}
    assert without == set()


WITHOUT_RANGE = {"seed", "missing_eos_score"}
AT_LEAST_1 = (
    "prompts_per_step group_size max_new_tokens update_epochs minibatch_size micro_batch_tokens eval_problems "
    "max_sampling_rounds demonstrations num_samples batch_size value_epochs value_minibatch_size pair_problems "
    "max_pairs_per_prompt max_bad_updates ngram limit overlong_buffer think_budget"
).split()
POSITIVE = (
    "temperature temperatures learning_rate value_learning_rate max_grad_norm clip_low clip_high value_clip beta "
    "near_duplicate"
).split()
AT_MOST_1 = "priority_floor gae_lambda min_pass_rate max_pass_rate near_duplicate".split()


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_every_number_has_its_range(script):
    """Catches: a new flag without a range; an old one that lost it, so that a learning rate of 0 trains nothing."""
    numbers = {name: hint for name, (_, hint) in all_fields(script.Args).items() if is_number(hint)}
    assert len(numbers) >= 6
    for name, hint in numbers.items():
        limits = ranges(hint)
        assert len(limits) == (name not in WITHOUT_RANGE), name
        for limit in limits:
            assert limit.low >= (name in AT_LEAST_1) and limit.open == (name in POSITIVE), name
            at_most_1 = name in AT_MOST_1 or (name == "gamma" and script is not train_dpo)  # SimPO's is a margin
            assert limit.high == 1 if at_most_1 else limit.high > 1, name


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_the_defaults_are_in_their_ranges(script):
    required = ["--output", "there.jsonl"] if script is curate else []
    args = parse_args(script.Args, required)
    assert from_flat(args, json.loads(json.dumps(to_flat(args)))) == args


# ---- Every script with every kind of bad value, on the first flag of the kind

PATHS = {  # flags whose value is a path or a name: bad values, and what the error must say
    "model": [("no/such-model", "neither a local directory nor a hub name"), ("tests", "no config.json")],
    "judge_model": [
        ("no/such-model", "neither a local directory nor a hub name"),
        (EMBEDDED, "no single tokens for yes"),
    ],
    "verifier_model": [("no/such-model", "neither a local directory nor a hub name"), (EMBEDDED, "has 2 labels")],
    "modes": [("thinking", "is none of think, no_think"), ("think,", "is none of")],
    "stages": [("base", "NAME=DIRECTORY is expected"), ("a=no/such-model", "neither a local directory nor")],
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
    "run_name": [("there", "exists; --resume it, or take another name")],
}
ANY_TEXT = {"system_prompt", "stop_sentence"}
FILES = ("--problems", "--eval-data", "--data", "--samples", "--guesses", "--decontaminate")  # errors name file, line


def bad_values(script) -> list[tuple[str, str, str]]:
    """(flag, value, text of the error): every path; for three commands one number of each range, a choice, a switch."""
    cases, tried = [], set()
    for name, (_, hint) in all_fields(script.Args).items():
        flag, kind = as_flag(name), "path"
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (UnionType, typing.Union) else [hint]
        if typing.get_origin(kinds[0]) is typing.Literal:
            kind, bad = "choice", [("nonsense", "nonsense"), ("", "")]
        elif bool in kinds:
            kind, bad = "switch", [("maybe", "Unrecognized options: maybe")]  # it takes no value
        elif is_number(hint):
            whole, kind = int in plain_types(hint), str(hint)
            bad = [(value, "") for value in ("many", "", "1,5", *(["1.5"] if whole else []))]
            bad += [(value, "" if whole else "must be finite") for value in ("nan", "inf", "-inf")]
            for limit in ranges(hint):
                outside = {limit.low - 1, limit.high + 1, limit.low if limit.open else limit.low - 1}
                said = f"must be {limit}"
                bad += [(f"{value:g}", said) for value in sorted(outside) if abs(value) != float("inf")]
        elif name in ANY_TEXT:
            continue
        else:
            assert name in PATHS, f"{name}: a new kind of flag needs its bad values here"
            bad = PATHS[name]
        if kind == "path" or (kind not in tried and script in (train_grpo, evaluate, curate)):  # all share a parser
            cases += [(flag, value, said) for value, said in bad]
        tried |= {kind} - {"path"}
    return cases


CASES = [(script, *case) for script in SCRIPTS for case in bad_values(script)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flag", "value", "said"), CASES, ids=[f"{s.__name__} {flag} {value}" for s, flag, value, _ in CASES]
)
def test_a_bad_value(script, flag, value, said, tmp_path, capsys, monkeypatch):
    """Catches: anything but exit code 2 with the flag and what it allows, such as a traceback or a run that begins."""

    def load_weights(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(common, "load_weights", load_weights)
    root, there = tmp_path / "runs", []
    if flag == "--run-name":
        (root / value).mkdir(parents=True)
        there = [root, root / value]
    argv = ["--run-root", str(root)] if script in TRAIN and flag != "--run-root" else []
    argv += ["--model", EMBEDDED] if flag != "--model" and script is not curate else []
    if script is curate:
        argv = ["--output", str(tmp_path / "out.jsonl"), "--problems", "arithmetic", "--limit", "9"]
        if flag == "--guesses":
            argv = argv[:4]
    with pytest.raises(SystemExit) as stopped:
        script.main(parse_args(script.Args, [*argv, flag, value]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    if flag not in FILES and value != "maybe":
        assert flag in error
    assert said in error
    assert sorted(tmp_path.rglob("*")) == there
