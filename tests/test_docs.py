"""The documents are true to the code: their commands parse, their links lead somewhere, every curve is explained."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tyro
from test_repository import flags_of

from common import make_rollout
from data import Problem
from plumbing.flags import parse_args

DOCS = [
    Path("README.md"),
    Path("benchmarks/RESULTS.md"),
    *Path("docs").glob("*.md"),
    *Path("models").glob("*/README.md"),
]
BY_HAND = [path for folder in ("benchmarks", "claims", "tests/tools") for path in Path(folder).glob("*.py")]
SCRIPTS = [*Path(".").glob("train_*.py"), Path("evaluate.py"), Path("curate.py"), *BY_HAND]
CODE = [path for folder in (".", "plumbing", "tasks") for path in Path(folder).glob("*.py")]


def commands(path: Path) -> list[str]:
    """The commands of a document, or of a module's docstring: indented or fenced lines and `inline code` that run one
    of our Python files."""
    text = path.read_text() if path.suffix == ".md" else ast.get_docstring(ast.parse(path.read_text()), clean=False)
    text = text.replace("\\\n", " ")
    found = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    found += re.findall(r"`([^`\n]+)`", text)
    launch = r"^(?:[A-Z_]+=\S+ )*(?:python|accelerate launch(?: --\w+(?: \d+)?)*) (?=[\w/]+\.py)"
    found = [part.strip() for line in found for part in re.split("&&| > ", line)]
    return [re.sub(launch, "", re.sub(r"[][]", "", line)) for line in found if re.match(launch, line)]


def anchors(path: Path) -> set[str]:
    """The headings' anchors, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=str)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if line := re.fullmatch(r"L(\d+)", anchor):
            assert int(line[1]) <= len(target.read_text().splitlines()), link
        elif anchor:
            assert anchor in anchors(target), link


def test_files_that_are_named_exist():
    for path in DOCS:
        for name in re.findall(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.(?:py|sh))\b", path.read_text()):
            own = (
                name.startswith("ideas/")
                or "NAME" in name
                or name.rpartition("/")[2].startswith("my_")
                or name.endswith("train_mine.py")
            )
            places = (
                Path(name),
                path.parent / name,
                Path("plumbing") / name,
                Path("benchmarks") / name,
                Path("claims") / name,
                Path("conformance") / name,
                Path("tests") / name,
                Path("tests/tools") / name,
                Path("recipes") / name,
            )
            assert own or any(place.exists() for place in places), (path, name)


@pytest.mark.parametrize("path", [*DOCS, *SCRIPTS], ids=str)
def test_commands_parse(path):
    """Every flag of a command exists, and its value is in range. `...` stands for more flags, or for a flag's value."""
    for command in commands(path):
        words = shlex.split(command, comments=True)
        script, *flags = [
            word for word, left in zip(words, ["", *words], strict=False) if word != "..." or "--" in left
        ]
        if script in ("train_mine.py", "ideas/train_mine.py"):
            script = "train_grpo.py"
        if script.startswith("my_"):  # a file that the page shows
            continue
        assert Path(script).exists(), command
        if (
            script.startswith(("models/", "conformance/"))
            or script in ("claims/process_reward.py", "tests/families.py", "tests/pretended_gpu.py")
            or "--help" in flags
        ):  # no Args
            continue
        if script == "benchmarks/memory.py" and flags and flags[0].startswith("train_"):
            script, *flags = flags
        Args = importlib.import_module(script.removesuffix(".py").replace("/", ".")).Args
        if "--resume" in flags:  # needs a run
            continue
        if script == "curate.py" and "--output" not in flags:
            flags += ["--output", "file"]
        try:
            parse_args(Args, flags) if "/" not in script else tyro.cli(Args, args=flags)
        except SystemExit:
            pytest.fail(f"{path}: {command}")


def test_there_are_commands():
    assert sum(len(commands(path)) for path in DOCS) > 40


@pytest.mark.parametrize("path", DOCS, ids=str)
def test_flags_that_are_named_exist(path):
    """Also outside commands, in a sentence."""
    files = [*CODE, *BY_HAND, *Path("recipes").glob("*.py")]
    known = {flag for file in files for flag in flags_of(file)}
    known |= set(flags_of(Path("benchmarks/speed.py"), "Shared|Sampling|Logprobs|Step"))  # its subcommands
    known |= set(re.findall(r"--(\w+)", Path("models/make_tiny.py").read_text()))  # it has no Args
    known |= {"logdir", "help", "multi_gpu", "num_processes", "cpu"}  # of other commands
    written = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", path.read_text()))
    forks = set(re.findall(r"^\+?    (\w+): ", path.read_text(), re.MULTILINE))  # flags that the page adds
    names = {flag: flag.replace("-", "_") for flag in written}
    assert [f for f, name in names.items() if not {name, name.removeprefix("no_")} & (known | forks)] == []


def test_recipes_know_the_variables_that_are_set_for_them():
    """A variable that no recipe reads is ignored without a word."""
    for path in DOCS:
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ *`?((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) +)+)bash (recipes/\w+\.sh)", text, re.MULTILINE):
            recipe = Path(line[1]).read_text()
            for name in re.findall(r"(?:^| )([A-Z_]+)=", line[0]):
                assert f"${{{name}:-" in recipe, (path, line[1], name)


def test_a_reward_of_ones_own_is_three_edits():
    """docs/data.md's blocks, put where the page says."""
    page = Path("docs/data.md").read_text()
    function, field, lines = re.findall(r"```python\n(.*?)```", page.partition("**Your own reward**")[2], re.DOTALL)[:3]
    source = Path("rewards.py").read_text()
    for before, added in (
        ("\n\ndef score_completions(", f"\n\n{function}\n"),
        ("    overlong_weight: ", field),
        ("    if reward_model is not None:\n", lines),
    ):
        assert source.count(before) == 1
        source = source.replace(before, added + before)
    module = types.ModuleType("rewards_with_brevity")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source, "rewards.py", "exec"), module.__dict__)
    flags = module.RewardFlags(brevity_weight=0.5)
    rollout = make_rollout([[1], [2]], [[3], [4], [5], [6]], group_size=2)
    texts = ["", "x" * 50, "x" * 100, "x" * 200]
    components = module.score_completions(texts, [Problem("1+1=", "2"), Problem("1+2=", "3")], rollout, flags, 40)
    assert components["brevity"] == [1.0, 0.5, 0.0, 0.0]
    assert module.reward_weights(flags, 0)["brevity"] == 0.5


def test_every_curve_is_explained():
    """Every tag that the code logs stands in docs/curves.md; one with a number or a component's name by its stem."""
    curves = Path("docs/curves.md").read_text()
    code = "".join(path.read_text() for path in CODE)
    kinds = "reward|rewards|rollout|loss|logps|eval|memory|sampler|verifier|time"
    tags = set(re.findall(rf"\"((?:{kinds})/[a-z_]*[a-z])\"", code))
    tags |= {f"loss/{name}" for name in re.findall(r"\"(clip_low|clip_high|ratio_max|kl|value)\"(?:\]|:)", code)}
    assert len(tags) > 30
    assert [tag for tag in sorted(tags) if f"`{tag}`" not in curves] == []


def test_every_page_is_linked_once():
    readme = Path("README.md").read_text()
    for page in Path("docs").glob("*.md"):
        assert readme.count(f"]({page})") == 1, page


def test_the_readme_takes_five_minutes():
    text = Path("README.md").read_text()
    assert len(text.split()) <= 1500
    assert max(line.count("|") for line in text.splitlines()) <= 7  # six columns


@pytest.mark.slow
def test_one_iteration_is_what_the_code_does():
    """The page's words and line numbers are equal to what its command prints, and its figures but for rounding."""
    printed = subprocess.run(
        [sys.executable, "benchmarks/one_iteration.py"], capture_output=True, text=True, check=True
    )
    page, number = Path("docs/one-iteration.md").read_text(), r"\d+\.\d+"
    assert re.sub(number, "", printed.stdout) == re.sub(number, "", page)
    figures = [[float(figure) for figure in re.findall(number, text)] for text in (printed.stdout, page)]
    assert figures[0] == pytest.approx(figures[1], abs=2e-3)
