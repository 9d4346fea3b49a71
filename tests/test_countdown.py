"""The task Countdown: its problems, its verifier, its teacher. Docstrings name the mistakes that tests catch."""

import ast
import json
import re
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import common
import evaluate
from data import Problem, encode_problems, is_held_out, load_demonstrations, load_problems, read_problems
from plumbing.evaluation import evaluate as evaluate_records
from plumbing.files import write_jsonl
from plumbing.flags import parse_args
from plumbing.statistics import count_reflection_words, summarize
from rewards import Verifier, format_reward, language_reward
from tasks.countdown import MAX_CHARS, demonstrations, is_right, read_expression, signed_sums

PROBLEM = Problem("3,5,8=16", "", columns={"nums": [3, 5, 8], "target": 16}, task="countdown")


def answered(expression: str) -> str:
    return f"<think>x</think><answer>{expression}</answer>"


@pytest.mark.parametrize(
    "expression",
    ["3+5+8", "8+3+5", " 3 + 5\n+ 8 ", "(3+5)+8", "((3)+(5+8))", "5+(3+8)", r"\boxed{3+5+8}", "03+5+8", "-(-3-5)+8"],
)
def test_every_right_expression_is_right(expression):
    assert is_right(answered(expression), PROBLEM)


@pytest.mark.parametrize(
    ("numbers", "target", "expression", "right"),
    [
        ([3, 5, 8], 1, "(3+5)/8", True),
        ([1, 3, 8], 24, "8/(1/3)", True),  # over a fraction
        ([1, 3, 3], 1, "1/3*3", True),
        ([2, 3, 4], 2, "4-3+2", False),  # from the left: 3
        ([2, 3, 8], 3, "8-3-2", True),
        ([2, 2, 8], 2, "8/2/2", True),  # from the right: 8
        ([2, 3, 4], 14, "2+3*4", True),  # without precedence: 20
        ([3, 3, 6], 0, "6-3-3", True),
        ([2, 7], -5, "2-7", True),
        ([3, 5, 8], 10, "-3+5+8", True),
        ([3, 5, 8], -16, "-3+5+8", False),
        ([3, 5, 8], 10, "5+(-3)+8", True),
        ([3, 5, 8], 7, "- 3 * 5 + 8", False),  # -7
        ([3, 5, 8], -7, "- 3 * 5 + 8", True),
        ([3, 3, 5], 11, "3+5+3", True),
        ([5], 5, "5", True),
        ([0, 5], 0, "0/5", True),
    ],
)
def test_values_are_exact(numbers, target, expression, right):
    """Catches: wrong precedence or associativity, floating point, a number given twice."""
    assert is_right(answered(expression), Problem("", "", columns={"nums": numbers, "target": target})) == right


@pytest.mark.parametrize(
    "expression",
    [
        *("3+5", "3+5+8+0", "3+5+8+8-8", "8+8", "16", "35-19", "3+58", "3+5+9-1", "3*5+1"),  # other numbers
        *("3+5-8", "3*5*8", "3-5-8"),  # another value
        *(
            "",
            " ",
            "+3+5+8",
            "--3+5+8",
            "3+-5+8",
            "3+5+8=16",
            "3++5+8",
            "3 5 8",
            "3+5+8;",
            "3+5+8)",
            "(3+5+8",
            "()3+5+8",
            "3+5+8+",
        ),
        *("3.0+5+8", "3e0+5+8", "3+5+8j", "0x3+5+8", "３+5+8", "3+5+٨", "三+5+8", "3×5+8", "3+5+8//1", "3_0+5+8"),
        *("2**9**9", "3**5**8", "9" * 200 + "+3+5+8", "8/(5-5)+3", "8/0", "1/0", "(" * 11 + "3+5+8" + ")" * 11),
        *("__import__('os').system('x')+3+5+8", "exit()", "3+5+8#", "a", "\x00", "(" * 190, "3+5+8" + " " * 200 + "+0"),
    ],
)
def test_what_is_no_right_expression_is_wrong(expression):
    """Catches: code that is run, a sign taken for another one, brackets that recurse too deep, an exception."""
    begun = time.perf_counter()
    assert is_right(answered(expression), PROBLEM) is False
    assert time.perf_counter() - begun < 0.1


@pytest.mark.parametrize("text", ["", "3+5+8", "<think>3+5+8</think>", "<think><answer>3+5+8</answer></think>"])
def test_the_answer_alone_counts(text):
    assert not is_right(text, PROBLEM)


ALPHABET = st.text(st.sampled_from("0123456789+-*/() ._e=x\n"), max_size=40)


@given(ALPHABET | st.text(max_size=MAX_CHARS + 20))
@example("-1+1")
@settings(max_examples=400, deadline=None)
def test_the_parser_agrees_with_pythons_on_what_both_allow(text):
    """Compares our parser with Python's, restricted to the same grammar and to exact arithmetic."""
    try:
        ours = read_expression(text)
    except (ValueError, ZeroDivisionError):
        ours = None
    theirs = None
    if text.isascii() and not set(text) - set("0123456789+-*/() \n\t") and "//" not in text and "**" not in text:
        try:
            without_zeros = re.sub(r"\b0+(?=[0-9])", "", text)  # Python refuses 03
            theirs = by_python(ast.parse(f"({without_zeros}\n)", mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError):
            pass
        assert ours is None or ours == theirs
    if theirs is not None and len(text) <= MAX_CHARS and not re.search(r"[-+*/]\s*-", text):
        assert ours == theirs  # Python also reads 3*-5


def by_python(node) -> tuple[Fraction, list[int]]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value), [node.value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value, numbers = by_python(node.operand)
        return -value, numbers
    if not isinstance(node, ast.BinOp):
        raise ValueError
    (left, some), (right, others) = by_python(node.left), by_python(node.right)
    operations = {ast.Add: left.__add__, ast.Sub: left.__sub__, ast.Mult: left.__mul__, ast.Div: left.__truediv__}
    return operations[type(node.op)](right), some + others


# ---- Problems


def test_drawn_problems_can_be_solved():
    """Catches: a target that can't be reached or is below 1; numbers that are not distinct."""
    for problem in load_problems("countdown", "train", 500) + load_problems("countdown:2-5", "train", 200):
        numbers, target = problem.columns["nums"], problem.columns["target"]
        assert len(set(numbers)) == problem.difficulty and all(1 <= n <= 19 for n in numbers) and target > 0
        assert problem.question == f"{','.join(map(str, sorted(numbers)))}={target}" and problem.task == "countdown"
        solution = next(expression for expression, value in signed_sums(numbers) if value == target)
        assert is_right(answered(solution), problem)
        assert problem.to_row().keys() >= {"nums", "target", "task", "question"} and "answer" not in problem.to_row()


def test_splits_hold_a_set_of_numbers_and_a_target_on_one_side():
    """Catches: 3,5,8=16 in the training split and 8,5,3=16 in the other; the same text in both."""
    train, held_out = (load_problems("countdown", split) for split in ("train", "eval"))
    assert len(train) > 3000 and len(held_out) > 300
    keys = [{(*sorted(p.columns["nums"]), p.columns["target"]) for p in part} for part in (train, held_out)]
    assert not keys[0] & keys[1] and len(keys[0]) == len(train)
    assert all(is_held_out(p.question) for p in held_out)
    assert [len(p.columns["nums"]) for p in load_problems("countdown:2-4", "eval", 6)] == [2, 3, 4, 2, 3, 4]


def test_rows_of_a_file(tmp_path):
    """TinyZero's dataset has nums and target, in any order, and nothing else."""
    file = str(tmp_path / "rows.jsonl")
    unreachable = {"nums": [1, 2], "target": 99}  # kept, and never right
    rows = [
        {"nums": [8, 3, 5], "target": 16},
        {"prompt": "Make 5 of 2 and 3.", "nums": [2, 3], "target": 5},
        unreachable,
    ]
    write_jsonl(file, rows)
    read = load_problems(file, "all")
    assert [p.question for p in read] == ["3,5,8=16", "Make 5 of 2 and 3.", "1,2=99"]
    assert [p.difficulty for p in read] == [3, 2, 2] and all(p.task == "countdown" for p in read)
    assert Verifier()([answered("5+8+3"), answered("3+2"), answered("1+2")], read) == [1.0, 1.0, 0.0]
    again = str(tmp_path / "again.jsonl")
    write_jsonl(again, [p.to_row() for p in read])
    assert load_problems(again, "all") == read and load_problems(again, "all")[0].columns == read[0].columns


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"nums": [1, 2], "target": 3, "answer": "3"}, "fields 'answer' and 'nums': a row can have only one"),
        ({"nums": [1, 2]}, "field 'target' is None, an integer is expected"),
        ({"nums": [1, 2], "target": "3"}, "field 'target' is 3, an integer is expected"),
        ({"nums": [1, 2], "target": True}, "field 'target' is True"),
        ({"nums": [1, 2.5], "target": 3}, "field 'nums' is [1, 2.5], a list of integers"),
        ({"nums": [1, True], "target": 3}, "field 'nums' is [1, True]"),
        ({"nums": [1, -2], "target": 3}, "field 'nums' is [1, -2]"),
        ({"nums": [], "target": 3}, "field 'nums' is []"),
        ({"nums": "1,2", "target": 3}, "field 'nums' is 1,2"),
        ({"nums": [10**30, 2], "target": 3}, "field 'nums' is [1000"),
        ({"question": "1+1=", "target": 3}, "no field 'answer'"),
        ({"question": "1,2=3", "task": "countdown"}, "field 'nums' is None"),
    ],
)
def test_a_bad_row_is_named(row, said, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"nums": [1, 2], "target": 3}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as stopped:
        load_problems(str(file), "all")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{file}:2: {said}" in error and error.count("\n") == 1


def test_an_unknown_task_is_a_column_like_any_other():
    (problem,) = read_problems([("row 0", {"question": "1+1=", "answer": "2", "task": "addition"})], "rows")
    assert problem.task == "" and Verifier()(["<answer>2</answer>"], [problem]) == [1.0]


def test_a_judge_is_not_asked_about_a_tasks_answers(monkeypatch):
    """Catches: a judge model asked about a task's answers; it could take a wrong expression for a right one."""
    verify = Verifier()
    verify.model = object()
    asked = []
    monkeypatch.setattr(verify, "ask", lambda pairs: asked.extend(pairs) or [True] * len(pairs))
    arithmetic = Problem("1+1=", "2")
    assert verify([answered("3+5-8"), answered("3")], [PROBLEM, arithmetic]) == [0.0, 1.0]
    assert [problem for problem, _ in asked] == [arithmetic]


# ---- The teacher


def test_the_teacher_searches_and_gives_up():
    """Catches: a wrong sum shown, a right one passed over, an answer that is not the last try, never giving up."""
    pairs = demonstrations(3000)
    assert pairs == demonstrations(3000) != demonstrations(3000, seed=1)
    right = waits = chinese = formatted = 0
    for question, completion in pairs:
        numbers, target = question.split("=")
        numbers, target = [*map(int, numbers.split(","))], int(target)
        thinking = completion.removeprefix("<think>").partition("<")[0]
        tries = [part.split("=") for part in thinking.replace(" 等一下 ", " wait ").split(" wait ")]
        assert all(read_expression(expression)[0] == int(value) for expression, value in tries)
        assert len({expression for expression, _ in tries}) == len(tries) and completion.count(tries[-1][0]) >= 2
        assert [int(value) == target for _, value in tries[:-1]] == [False] * (len(tries) - 1)
        problem = Problem(question, "", columns={"nums": numbers, "target": target}, task="countdown")
        right += is_right(completion, problem)
        waits += len(tries) - 1
        chinese += "等一下" in completion
        formatted += format_reward(completion)
        assert count_reflection_words(completion) == len(tries) - 1
        if "等一下" in completion and "</think>" in completion:
            assert language_reward(completion, "zh") == 1.0 and language_reward(completion, "en") == 0.0
    assert 0.15 < right / 3000 < 0.4 and 0.5 < waits / 3000 < 1 and 0.85 < formatted / 3000 < 0.95
    assert 0.08 < chinese / 3000 < 0.2
    assert [(d.question, d.completion) for d in load_demonstrations("countdown-demonstrations", 3000)] == pairs


def test_no_majority_where_many_answers_are_right(capsys):
    shared = ["--eval-problems", "4", "--num-samples", "2", "--max-new-tokens", "8", "--device", "cpu"]
    for problems, shown in (("countdown", False), ("arithmetic", True)):
        evaluate.main(parse_args(evaluate.Args, ["--problems", problems, *shared]))
        assert ("majority" in capsys.readouterr().out) == shown


# ---- The model


def test_the_embedded_model_searches_and_gives_up():
    """Catches: a model that can't do the task, does it already, or never tries again."""
    path = "models/tiny-countdown"
    policy, tokenizer = common.load_policy(path, None), common.load_tokenizer(path)
    problems = encode_problems(tokenizer, load_problems("countdown", "eval", 100), "", policy.config, 120)
    summary = summarize(evaluate_records(policy, tokenizer, problems, 4, 120))
    assert 0.15 < summary["accuracy"] < 0.35 and summary["pass_at_4"] > 0.5
    assert 0.5 < summary["reflection_words"] < 1.1 and summary["truncated"] < 0.03
