"""What the README and the design promise about the files themselves."""

import ast
import re
from pathlib import Path

import pytest

README = Path("README.md").read_text()
SCRIPTS = [Path(name) for name in re.findall(r"^\| \[(train_\w+\.py)\]", README, re.MULTILINE)]  # not forks of them


def counted_lines(path: Path) -> int:
    """Non-blank lines outside the module docstring and the Args dataclass."""
    text = path.read_text()
    tree = ast.parse(text)
    skipped = set(range(1, tree.body[0].end_lineno + 1))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            skipped |= set(range(node.lineno - 1, node.end_lineno + 1))
    return sum(bool(line.strip()) for number, line in enumerate(text.splitlines(), 1) if number not in skipped)


@pytest.mark.parametrize("path", [*SCRIPTS, Path("evaluate.py")], ids=str)
def test_the_readme_counts_the_lines(path):
    (stated,) = re.findall(rf"\[{path.name}\].*\| (\d+) \|", README)
    assert int(stated) == counted_lines(path)


def test_scripts_stay_small():
    assert all(counted_lines(path) <= 260 for path in SCRIPTS)
    assert counted_lines(Path("common.py")) <= 450 and counted_lines(Path("sampling.py")) <= 450


POLICY_GRADIENT = [Path(f"train_{name}.py") for name in ("grpo", "kimi", "ppo", "pg")]
SUPERVISED = [Path(f"train_{name}.py") for name in ("sft", "dpo", "rm")]
OWN = re.compile(  # lines that are an algorithm's own in sections that are otherwise the same
    r"kept = |critic|baseline == .value|value_model|value_optimizer|add_logprob_gap|reward_model|scores\[|"
    r"scores = torch|scores\.view|torch\.no_grad|for micro in|dict\.fromkeys|"
    r"set_postfix_str|start_rewards|score_mean|for i in train\]|in some\]|some = random|_table\(before|"
    r"rollout = |row_weights = |rollout, batch_ref"
)
SHARED = {
    "data": (POLICY_GRADIENT, "    device = common.resolve_device", "    state = common.load_checkpoint"),
    "sample and reward": (POLICY_GRADIENT, " 1 sample\n", "        samples = rollout"),
    "log, evaluate, save": (POLICY_GRADIENT, " 6 log\n", "    bar.close()"),
    "end": (POLICY_GRADIENT, "    bar.close()", "if __name__"),
    "sample, supervised": (SUPERVISED, " 1 sample\n", " 5 update\n"),
    "log, evaluate, save, supervised": (SUPERVISED, " 6 log\n", "    bar.close()"),
    "end, supervised": (SUPERVISED, "    bar.close()", "if __name__"),
}


def section(path: Path, start: str, end: str) -> list[str]:
    text = path.read_text().replace("target, rm, tokenizer", "target, policy, tokenizer")  # train_rm.py's model
    text = text.replace('"final", rm, tokenizer', '"final", policy, tokenizer')
    begin = text.index(start)
    return [line for line in text[begin : text.index(end, begin)].splitlines() if not OWN.search(line)]


@pytest.mark.parametrize("name", SHARED)
def test_parallel_sections_stay_parallel(name):
    """The scripts repeat each other where the algorithms don't differ; a fix in one must reach all."""
    family, start, end = SHARED[name]
    sections = [section(path, start, end) for path in family]
    assert len(sections[0]) >= 4
    for path, lines in zip(family, sections, strict=True):
        assert lines == sections[0], path


def test_shared_flags_are_explained_in_the_same_words():
    differ = {"learning_rate", "minibatch_size", "loss_norm", "update_epochs", "clip_low", "clip_high", "kl_coef"}
    flags = {path: flags_of(path) for path in POLICY_GRADIENT}
    for name, text in flags[POLICY_GRADIENT[0]].items():
        for path in POLICY_GRADIENT[1:]:
            assert flags[path].get(name, text) == text or name in differ, (path, name)


def flags_of(path: Path) -> dict[str, str | None]:
    """Field name -> docstring under it, of the Args dataclass."""
    (args,) = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    flags = {}
    for node, after in zip(args.body, [*args.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            flags[node.target.id] = after.value.value if documented else None
    return flags


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_every_flag_is_documented(path):
    assert [name for name, text in flags_of(path).items() if not text and name != "seed"] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_the_banners_stand_in_order(path):
    banners = re.findall(r"# -{20,} (Setup|\d [a-z ]+)", path.read_text())
    assert banners[0] == "Setup" and banners[1:] == sorted(banners[1:])
    names = ["1 sample", "2 reward", "3 logprobs", "4 advantages", "5 update", "6 log", "7 evaluate and save"]
    assert set(banners[1:]) <= set(names)


def test_the_readme_names_real_flags_and_files():
    benchmarks = sorted(Path("benchmarks").glob("*.py"))
    known = {f for path in [*SCRIPTS, Path("evaluate.py"), Path("data.py"), *benchmarks] for f in flags_of(path)}
    for flag in set(re.findall(r"--([a-z][a-z-]+)", README)) - {"logdir", "help"}:
        assert flag.replace("-", "_").removeprefix("no_") in known, flag
    for name in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert Path(name).exists(), name


def test_the_glossary_explains_every_tag():
    """Of the tags that the scripts name; those with a number or a component's name in them by their stem."""
    code = "".join(path.read_text() for path in [*SCRIPTS, Path("evaluate.py"), Path("common.py")])
    tags = set(re.findall(r"\"((?:reward|rollout|loss|eval|memory)/[a-z_]*[a-z])\"", code))
    tags |= {
        f"loss/{name}" for name in re.findall(r"metrics\[?\"?.*\"(clip_low|clip_high|ratio_max|kl|entropy)\"", code)
    }
    assert len(tags) > 15
    missing = [tag for tag in sorted(tags) if tag not in README and tag.split("/")[1] not in README]
    assert missing == []


def test_the_embedded_model_is_small():
    assert Path("models/tiny-arithmetic/model.safetensors").stat().st_size <= 4_000_000
