"""The design, held by tests: which file may import which, lines, sections that stay parallel. For the documents see
test_docs.py."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

README = Path("README.md").read_text()
SCRIPTS = [Path(name) for name in re.findall(r"^\| \[(train_\w+\.py)\]", README, re.MULTILINE)]  # not forks of them
POLICY_GRADIENT = [Path(f"train_{name}.py") for name in ("grpo", "kimi", "ppo", "pg")]
SUPERVISED = [Path(f"train_{name}.py") for name in ("sft", "dpo", "rm")]


# ---- Which file may import which

MAY_IMPORT = {  # of our own modules; a train script may import any of these, but no command
    "plumbing.flags": "",
    "plumbing.files": "plumbing.flags",
    "plumbing.algebra": "",
    "plumbing.answers": "plumbing.algebra",
    "plumbing.engine": "plumbing.flags",
    "plumbing.statistics": "plumbing.answers",
    "common": "plumbing.engine plumbing.flags",
    "plumbing.rows": "plumbing.answers plumbing.flags",
    "data": "common plumbing.rows plumbing.answers plumbing.flags",  # and tasks, by name
    "rewards": "data common plumbing.answers plumbing.flags",
    "plumbing.runs": "common plumbing.files plumbing.flags plumbing.statistics",
    "plumbing.logs": "plumbing.runs data common plumbing.files plumbing.flags",
    "plumbing.evaluation": "rewards data common plumbing.answers plumbing.statistics",
    "plumbing.pairs": "plumbing.evaluation data common plumbing.rows plumbing.flags plumbing.statistics",
    "evaluate": "plumbing.evaluation rewards data common plumbing.files plumbing.flags plumbing.statistics",
    "compare": "plumbing.files plumbing.flags plumbing.statistics",
    "curate": "plumbing.pairs rewards data plumbing.rows plumbing.answers plumbing.files plumbing.flags",
}
COMMANDS = {"evaluate", "curate", "compare"}
TASKS = {f"tasks.{path.stem}": path for path in Path("tasks").glob("*.py")}
ROOMS = {
    **{path.stem: path for path in Path(".").glob("*.py") if not path.name.startswith("train_")},
    **{f"plumbing.{path.stem}": path for path in Path("plumbing").glob("*.py")},
}
MODULES = ROOMS | TASKS | {path.stem: path for path in SCRIPTS}


def imports(path: Path, tree: ast.AST | None = None) -> set[str]:
    """Full names of the modules, and of what is taken from them; no import may be relative."""
    names = set()
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages(path: Path, tree: ast.AST | None = None) -> set[str]:
    """The packages outside the standard library."""
    return {name.partition(".")[0] for name in imports(path, tree)} - sys.stdlib_module_names


def functions(path: Path) -> list[ast.AST]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def test_a_module_imports_only_what_is_below_it():
    """A shortcut from below to above: the next one closes a circle, and no file can be read by itself any more."""
    assert set(ROOMS) == set(MAY_IMPORT)
    for name, path in ROOMS.items():
        assert imports(path) & set(MODULES) <= set(MAY_IMPORT[name].split()), path
    for path in TASKS.values():
        assert packages(path) <= {"plumbing"} and imports(path) & set(MODULES) <= {"plumbing.answers"}, path
    for path in [*ROOMS.values(), *SCRIPTS]:
        assert not imports(path) & COMMANDS, f"{path} imports a command"
    list(graphlib.TopologicalSorter({name: below.split() for name, below in MAY_IMPORT.items()}).static_order())


@pytest.mark.parametrize("path", [*MODULES.values()], ids=str)
def test_our_modules_are_imported_at_the_top(path):
    """An import in a function hides a circle."""
    for function in functions(path):
        assert imports(path, function) & set(MODULES) == set(), function.lineno


def test_the_lowest_modules_need_nothing_heavy():
    """The import of a torch into the file that only compares answers: seconds for every use of it."""
    assert packages(Path("plumbing/flags.py")) == {"tyro"}
    assert packages(Path("plumbing/answers.py")) == {"plumbing"}
    algebra = Path("plumbing/algebra.py")
    (lazy,) = [function for function in functions(algebra) if getattr(function, "name", "") == "context"]
    assert packages(algebra) == packages(algebra, lazy) == {"mpmath"}  # only for roots, pi and sines


def test_the_conformance_kit_stands_alone():
    """Someone with another trainer copies the folder: only the adapters of our scripts may need this repository, and
    TRL is imported when its adapters run."""
    kit = {path.stem: path for path in Path("conformance").glob("*.py")}
    ours, trl = [kit.pop(name) for name in ("ours", "mutants")], kit["with_trl"]
    assert packages(trl) - {"trl", "datasets"} <= {"torch", "conformance"}
    top = [node for node in ast.parse(trl.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not packages(trl, ast.Module(top, [])) & {"trl", "datasets"}
    for path in {*kit.values()} - {trl}:
        assert packages(path) <= {"torch", "transformers", "tokenizers", "conformance"}, path
    for path in kit.values():
        assert not imports(path) & {"conformance.ours", "conformance.mutants"}, path
    for path in ours:
        assert not imports(path) & COMMANDS, path


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in (".", "plumbing", "tasks", "benchmarks", "claims", "conformance", "tests", "tests/tools")
        for path in Path(folder).glob("*.py")
    ],
    ids=str,
)
def test_a_file_begins_by_saying_what_it_is(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = text.partition("\n\n")[0]
    assert re.match(r"[`\w].{20,}?[.?:](\s|$)", first, re.DOTALL), path


@pytest.mark.parametrize("folder", ["benchmarks", "claims", "conformance", "tests/tools"])
def test_no_command_hides_a_module(folder):
    """`python benchmarks/data.py` finds itself where it imports data."""
    ours = {part for name in MODULES for part in name.split(".")}
    for path in Path(folder).glob("*.py"):
        assert path.stem not in ours | sys.stdlib_module_names, path


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_a_script_imports_modules_not_names(path):
    """Catches: an import block that a reader has to scroll past, and calls that don't say where they live."""
    nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert sum(node.end_lineno - node.lineno + 1 for node in nodes) <= 14
    assert not [node.module for node in nodes if str(getattr(node, "module", "")).startswith("plumbing.")]


# ---- Lines


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
    assert {*POLICY_GRADIENT, *SUPERVISED} == set(SCRIPTS)
    assert all(counted_lines(path) <= 260 for path in SCRIPTS)


SUPERVISED_BANNERS = ["1 sample", "2 update", "3 log", "4 evaluate and save"]
BANNERS = ["1 sample", "2 reward", "3 logprobs", "4 advantages", "5 update", "6 log", "7 evaluate and save"]


def sections(path: Path) -> dict[str, list[str]]:
    """The lines of main by banner."""
    text = path.read_text().splitlines()
    (main,) = (n for n in ast.parse("\n".join(text)).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    parts, banner = {}, None
    for line in text[main.lineno : main.end_lineno]:
        if found := re.search(r"# -{20,} (Setup|\d [a-z ]+)$", line):
            banner = found[1]
            assert banner not in parts, f"{path}: {banner} stands twice"
            parts[banner] = []
        else:
            parts[banner].append(line)
    return parts


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_the_banners_stand_in_order(path):
    """A section without its banner counts as the one before it."""
    numbered = BANNERS if path in POLICY_GRADIENT else SUPERVISED_BANNERS
    assert list(sections(path)) == ["Setup", *numbered]
    assert re.findall(r"^ *# -{4,} *(.*)$", path.read_text(), re.MULTILINE) == ["Setup", *numbered]


@pytest.mark.parametrize("path", POLICY_GRADIENT, ids=str)
def test_the_algorithm_is_most_of_main(path):
    """Plumbing creeps into the scripts: what is not sampling, logprobs, advantages and update is at most 67 lines."""
    around = [part for part in sections(path) if part[0] not in "1345"]
    assert around == ["Setup", "2 reward", "6 log", "7 evaluate and save"]
    assert sum(bool(line.strip()) for part in around for line in sections(path)[part]) <= 67


# ---- What is the same in several scripts


def text_of(path: Path, start: str, end: str) -> str:
    """From the line in which `start` stands first to the first line with `end` at or after it, both whole."""
    lines = path.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if start in line)
    last = next(number for number, line in enumerate(lines[first:], first) if end in line)
    return "\n".join(lines[first : last + 1])


GRPO, KIMI, PPO, _ = POLICY_GRADIENT
SFT, DPO, RM = SUPERVISED
PARALLEL = {  # family, from the line with this to the line with that
    "data": (POLICY_GRADIENT, "    device = ", "policy = common.load_policy("),
    "progress": (POLICY_GRADIENT, "    iteration, global_step = ", "log_scalars("),
    "bar": (POLICY_GRADIENT, "    bar = tqdm(", "health = "),
    "sample and reward": (POLICY_GRADIENT, "--- 1 sample", 'clock.lap("reward")'),
    "learning rate": (POLICY_GRADIENT, "        learning_rate = ", "common.set_learning_rate("),
    "epochs": ([GRPO, KIMI, PPO], "in range(args.update_epochs)", "for minibatch in"),
    "step": ([GRPO, KIMI], "        grad_norm = ", 'clock.lap("update")'),
    "log": (POLICY_GRADIENT, "--- 6 log", "--- 7 evaluate and save"),
    "evaluate and save": (POLICY_GRADIENT, "--- 7 evaluate and save", "run.checkpoint("),
    "end": ([*POLICY_GRADIENT, SFT], "    run.finish(", "flags.start(main, Args)"),
    "data, supervised": ([SFT, DPO], "    device = ", "tokenizer, config = "),
    "pairs": ([DPO, RM], "    if len(train) < ", "sampler = "),
    "first evaluation, supervised": ([SFT, DPO], "        before = scores = ", "log_scalars("),
    "learning rate, supervised": (SUPERVISED, "        rise = ", "common.set_learning_rate("),
    "step, supervised": ([SFT, DPO], "        grad_norm = ", 'clock.lap("update")'),
    "log, supervised": (SUPERVISED, "--- 3 log", "--- 4 evaluate and save"),
    "evaluate, supervised": ([SFT, DPO], "--- 4 evaluate and save", "log_scalars("),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_sections_stay_parallel(name):
    """The scripts repeat each other where the algorithms don't differ; a fix in one must reach all."""
    family, start, end = PARALLEL[name]
    texts = [text_of(path, start, end) for path in family]
    assert texts[0].strip()
    for path, text in zip(family, texts, strict=True):
        assert text == texts[0], path


def flags_of(path: Path, kind: str = r"Args|\w+Flags") -> dict[str, str | None]:
    """Field name -> docstring under it, of the dataclasses of flags in a file."""
    flags = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and re.fullmatch(kind, node.name):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    flags[field.target.id] = after.value.value if documented else None
    return flags


@pytest.mark.parametrize(
    ("family", "differ"),
    [
        (
            POLICY_GRADIENT,
            {"minibatch_size", "loss_norm", "update_epochs", "clip_low", "clip_high", "kl_coef", "baseline"},
        ),
        (SUPERVISED, {"model", "data", "minibatch_size", "learning_rate", "kl_coef"}),
    ],
)
def test_shared_flags_are_explained_in_the_same_words(family, differ):
    flags = [flags_of(path, "Args") for path in family]
    for name in {name for own in flags for name in own} - differ:
        assert len({own[name] for own in flags if name in own}) == 1, name


# ---- Files


@pytest.mark.parametrize("name", ["tiny-arithmetic", "tiny-countdown"])
def test_the_embedded_models_are_small(name):
    assert Path(f"models/{name}/model.safetensors").stat().st_size <= 4_000_000
