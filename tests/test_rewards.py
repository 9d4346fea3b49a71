"""The reward functions, and how a batch is scored with them. Docstrings name the mistakes that tests catch."""

import time
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from test_answers import FUZZ, HOSTILE, SIZES, seconds

import common
import rewards
from data import Problem
from plumbing.statistics import count_reflection_words
from rewards import (
    FORMAT_STYLES,
    RewardFlags,
    accuracy_reward,
    format_reward,
    language_reward,
    reward_weights,
    score_completions,
)


def test_accuracy_reward():
    """Catches: a reward that is not 1.0 or 0.0, or that reads the thinking."""
    assert accuracy_reward("<think>17+1</think><answer>18 eggs</answer>", "18") == 1.0
    assert accuracy_reward("<think>18</think><answer>17</answer>", "18") == 0.0
    assert accuracy_reward(r"<think>\boxed{18}", "18") == 0.0
    assert accuracy_reward("18", "18") == 0.0
    assert type(accuracy_reward("18", "18")) is type(format_reward("18")) is float


@pytest.mark.parametrize(
    ("text", "answer_tags", "think"),
    [
        ("<think>a</think><answer>18</answer>", 1, 1),
        ("\n<think>a\nb</think>\n\n<answer>\n18\n</answer>\n", 1, 1),
        ("<think></think><answer>18</answer>", 1, 1),  # empty thinking is allowed
        ("<think>a</think>18", 0, 1),
        ("<think>\n\n</think>\n\n18", 0, 1),
        ("<think>a</think>so <answer>18</answer>", 0, 1),
        ("<think>a</think><answer>18</answer> eggs", 0, 1),
        ("<think>a</think><answer></answer>", 0, 1),
        ("<think>a</think><answer> </answer>", 0, 1),
        ("<think>a</think><answer>18</answer><answer>19</answer>", 0, 1),
        ("<think>a</think><answer><answer>18</answer></answer>", 0, 1),
        ("<think><answer>18</answer></think><answer>18</answer>", 0, 1),
        ("<think>a</think><answer>18", 0, 1),
        ("<think>a</think>", 0, 0),
        ("<think>a</think>  \n", 0, 0),
        ("<think>a", 0, 0),
        ("a</think><answer>18</answer>", 0, 0),
        ("<answer>18</answer>", 0, 0),
        ("<answer>18</answer><think>a</think>", 0, 0),
        ("so <think>a</think><answer>18</answer>", 0, 0),
        ("<think>a</think><think>b</think><answer>18</answer>", 0, 0),
        ("<think><think>a</think></think><answer>18</answer>", 0, 0),
        ("<think>a<think>b</think><answer>18</answer>", 0, 0),
        ("<think>a</think><answer>18<think>b</think></answer>", 0, 0),
        ("<think>a</think><answer>18</think></answer>", 0, 0),
        ("</think>a<think></answer>18<answer>", 0, 0),
        ("<Think>a</Think><Answer>18</Answer>", 0, 0),
        ("18", 0, 0),
        ("", 0, 0),
    ],
)
def test_format_reward(text, answer_tags, think):
    """Catches: a reward for a repeated, nested, reversed or missing tag, text outside the blocks or an empty answer."""
    assert format_reward(text) == format_reward(text, "answer-tags") == answer_tags
    assert format_reward(text, "think") == think


HACKS = [  # attempts at reward hacking, gold answer 18: accuracy, format answer-tags, format think
    ("every guess in one answer", "<think>a</think><answer>16 17 18 19</answer>", 0, 1, 1),
    ("guesses with or", "<think>a</think><answer>17 or 18</answer>", 0, 1, 1),
    ("guesses with commas", "<think>a</think><answer>17, 18</answer>", 0, 1, 1),
    ("an interval", "<think>a</think><answer>[0, 100]</answer>", 0, 1, 1),
    ("many answers, the right one last", "<think>a</think><answer>17</answer><answer>18</answer>", 1, 0, 1),
    ("many answers, the right one first", "<think>a</think><answer>18</answer><answer>17</answer>", 0, 0, 1),
    ("the answer only inside the think block", "<think><answer>18</answer></think>", 0, 0, 0),
    ("in the think block, none after it", "<think><answer>18</answer></think><answer></answer>", 0, 0, 1),
    ("a think block after the answer", "<answer>18</answer><think>a</think>", 1, 0, 0),
    ("empty thinking", "<think></think><answer>18</answer>", 1, 1, 1),
    ("no thinking", "<answer>18</answer>", 1, 0, 0),
    ("tags repeated", "<think>a</think><think>b</think><answer>18</answer>", 1, 0, 0),
    ("tags nested", "<think><think>a</think></think><answer>18</answer>", 1, 0, 0),
    ("right tags, nothing in them", "<think></think><answer></answer>", 0, 0, 1),
    ("the box in a wrong answer", r"<think>a</think><answer>17 \boxed{18}</answer>", 1, 1, 1),  # the box counts
    ("two boxes", r"<think>a</think>\boxed{17} \boxed{18}", 1, 0, 1),  # the last one counts
    ("code that would compute it", "<think>a</think><answer>__import__('os').getpid()</answer>", 0, 1, 1),
    ("the reference itself", "<think>a</think><answer>the answer</answer>", 0, 1, 1),
    ("a name for every number", "<think>a</think><answer>x</answer>", 0, 1, 1),
    ("nan", "<think>a</think><answer>nan</answer>", 0, 1, 1),
]


@pytest.mark.parametrize(("name", "text", "accuracy", "answer_tags", "think"), HACKS, ids=[hack[0] for hack in HACKS])
def test_reward_hacking(name, text, accuracy, answer_tags, think):
    assert accuracy_reward(text, "18") == accuracy
    assert format_reward(text) == answer_tags and format_reward(text, "think") == think


def test_unknown_format_style():
    """Catches: a misspelt style that silently gives no reward."""
    for text in ("", "<think>a</think><answer>18</answer>"):
        with pytest.raises(ValueError, match="answer-tags, think"):
            format_reward(text, "xml")


@pytest.mark.parametrize(
    ("text", "language", "fraction"),
    [
        ("<think>hello world</think>你好", "en", 1),  # only the reasoning counts
        ("<think>hello 世界</think><answer>5</answer>", "en", 1 / 3),
        ("<think>hello 世界</think><answer>5</answer>", "zh", 2 / 3),
        ("<think>世界</think> <think>hello world</think>", "en", 1 / 2),  # a first block can't be hidden by a second
        ("hello 世界</think>no", "en", 1 / 3),  # opened in the prompt
        ("<think>so x = \\frac{a}{b} 所以", "zh", 2 / 3),  # x, a, b and \\frac are mathematics
        ("<think>12 + 7 = 19</think>", "en", 1),
        ("", "en", 1),
        ("今日はいい", "ja", 1),
        ("今日はいい", "zh", 2 / 5),
        ("Привет мир ok", "ru", 2 / 3),
        ("cafe\u0301 naïve", "fr", 1),
        ("xпривет", "ru", 0),  # letters of two scripts in one word
        ("the area is x² and ½ of it, so π", "en", 1),  # numbers and single letters are mathematics
        ("人々は", "ja", 1),
        ("नमस्ते hello", "hi", 1 / 2),  # marks don't split a word
    ],
)
def test_language_reward(text, language, fraction):
    assert language_reward(text, language) == pytest.approx(fraction)


def test_unknown_language():
    with pytest.raises(ValueError, match="unknown language 'xx', choose one of ar, bg"):
        language_reward("hello", "xx")


def test_length_reward_by_hand():
    """Kimi K1.5: 0.5 for the shortest down to -0.5 for the longest; a wrong one never gains; equal lengths give 0."""
    lengths = torch.tensor([[10, 20, 30, 15], [7, 7, 7, 7]])
    correct = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    assert rewards.length_reward(lengths, correct).tolist() == [[0.5, 0.0, -0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_overlong_penalty_by_hand():
    """DAPO, eq. 13: 0 up to the buffer, then linear, -1 at the limit."""
    lengths = torch.tensor([10, 32, 34, 36, 40])
    assert rewards.overlong_penalty(lengths, 40, 8).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]


def test_reflection_words():
    assert count_reflection_words("Wait, let me check. Hmm, actually 3. However... double-check: recheck") == 7
    assert count_reflection_words("the waiter was factually hmless") == 0


# ---- Hostile input


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("unit", HOSTILE)
def test_long_text_takes_linear_time(unit, size):
    """Catches: a regex or scanner that restarts from the beginning at every tag; a megabyte would take hours."""
    text = unit * (size // len(unit))
    for whole in (text, text + "<answer>18</answer>", r"\boxed{18}" + text, "<answer>" + text + "</answer>"):
        assert seconds(accuracy_reward, whole, "18", clock=time.process_time) < 1
        for style in FORMAT_STYLES:
            assert seconds(format_reward, whole, style, clock=time.process_time) < 1
        for language in ("en", "ja"):
            assert seconds(language_reward, whole, language, clock=time.process_time) < 1


def check_fuzz(text, gold):
    assert accuracy_reward(text, gold) in (0.0, 1.0)
    for style in FORMAT_STYLES:
        assert format_reward(text, style) in (0.0, 1.0)
    assert 0 <= language_reward(text, "en") <= 1 and 0 <= language_reward(text, "zh") <= 1


@settings(max_examples=60, deadline=None)
@given(FUZZ, FUZZ)
def test_fuzz(text, gold):
    """Catches: text that makes a reward raise or leave the range 0 to 1."""
    check_fuzz(text, gold)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(FUZZ, FUZZ)
def test_fuzz_long(text, gold):
    check_fuzz(text, gold)


# ---- A batch's scores

PROBLEMS = [Problem("9+9=", "18"), Problem("3+4=", "7")]
TEXTS = [  # two groups of three
    "<think>9</think><answer>18</answer>",
    "<answer>18</answer>",
    "<think>9</think><answer>7</answer>",  # the other problem's answer
    "<think>\u4e09 3</think><answer>7</answer>",
    "<answer>7",
    "\u4e03",
]
LENGTHS, FINISHED = [4, 2, 6, 8, 8, 5], [True, True, True, False, False, True]


def make_batch() -> common.Rollout:
    rollout = common.make_rollout([[5], [6]], [[7] * length for length in LENGTHS], group_size=3)
    return replace(rollout, finished=torch.tensor(FINISHED))


def score(texts=TEXTS, is_right=None, **flags) -> dict[str, list]:
    verify = rewards.Verifier(is_right=is_right)
    scores = score_completions(texts, PROBLEMS, make_batch(), RewardFlags(**flags), 8, verify)
    assert all(isinstance(values, list) and len(values) == 6 for values in scores.values())
    return {name: [values[:3], values[3:]] for name, values in scores.items()}


def test_each_reward_comes_back_apart_and_in_its_row():
    """Catches: rewards mixed into one number; a group scored with another problem's answer; weights applied twice."""
    assert score(accuracy_weight=5.0, format_weight=0.0) == {
        "accuracy": [[1, 1, 0], [1, 0, 0]],
        "format": [[1, 0, 1], [1, 0, 0]],
    }
    every = score(language_weight=0.1, language="zh", overlong_weight=0.1, overlong_buffer=4, length_weight=0.1)
    assert list(every) == ["accuracy", "format", "language", "overlong", "length"]
    assert every["accuracy"] == [[1, 1, 0], [1, 0, 0]]
    assert every["language"] == [[1, 0, 1], [1, 0, 1]]  # without a think block the tags are words
    assert every["overlong"] == [[0, 0, -0.5], [-1, -1, -0.25]]
    assert every["length"] == [[0, 0.5, -0.5], [-0.5, -0.5, 0]]
    assert score(overlong_weight=0.1) == score(overlong_weight=0.1, overlong_buffer=1)  # a fifth of 8 tokens


def test_the_style_and_the_language_are_those_of_the_flags():
    """Catches: a flag that is read but not used."""
    texts = ["<think>9 is nine</think>so \\boxed{18}", *TEXTS[1:]]
    assert score(texts, format_style="think")["format"][0][0] == 1 and score(texts)["format"][0][0] == 0
    assert score(texts, language_weight=1.0)["language"][0][0] == 1
    assert score(texts, language_weight=1.0, language="zh")["language"][0][0] == 0


def test_what_was_cut_is_never_right_with_truncated_wrong():
    """Catches: a cut completion rewarded, be it by the length reward; a score changed by another --truncated."""
    cut = score(truncated="wrong", length_weight=0.1)
    assert cut["accuracy"] == [[1, 1, 0], [0, 0, 0]]
    assert cut["length"] == [[0, 0.5, -0.5], [-0.5, -0.5, 0]]
    assert score(truncated="mask") == score(truncated="score")


def test_someone_else_may_decide_what_is_right():
    """Catches: a function that is not called, or called with another row's text or problem."""
    asked = []

    def is_right(text, problem):
        asked.append((text, problem.answer))
        return len(text) < 10

    assert score(is_right=is_right)["accuracy"] == [[0, 0, 0], [0, 1, 1]]
    assert asked == list(zip(TEXTS, ["18"] * 3 + ["7"] * 3, strict=True))


def test_every_reward_that_can_be_scored_has_a_weight_of_its_flag():
    """Catches: a reward without a weight, which ends a run in its first iteration; another reward's weight used."""
    names = [field.name.removesuffix("_weight") for field in fields(RewardFlags) if field.name.endswith("_weight")]
    values = {f"{name}_weight": 0.5 + i for i, name in enumerate(names)}
    names[names.index("reward_model")] = "model"  # it is logged as reward/model
    assert reward_weights(RewardFlags(**values), 0) == {name: 0.5 + i for i, name in enumerate(names)}
    assert {*score(**values), "model"} == set(names)  # no model is loaded here


def test_the_length_reward_starts_late():
    flags = RewardFlags(length_weight=0.3, length_reward_start=2)
    assert [reward_weights(flags, iteration)["length"] for iteration in (0, 1, 2, 3)] == [0.0, 0.0, 0.3, 0.3]
    assert reward_weights(flags, 0)["accuracy"] == 1.0 and reward_weights(flags, 0)["format"] == 0.2
