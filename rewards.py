"""Rewards of completions: reward functions, their flags and weights, and the verifier that judges answers.

To add a reward: write its function here, a field `<name>_weight` in RewardFlags, and a line in `score_completions`. All
four RL scripts then have it, and it is logged as `reward/<name>`. A reward that can't be known, because a judge failed
to answer, is None: its completion is then left out of baselines, statistics and losses (`scored` is False). A reward
that does not apply to a prompt, such as accuracy to one without an answer, is ABSENT: it adds nothing to the sum.
"""

import functools
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common
from common import Rollout
from data import Problem, encode_completions, encode_prompts, is_judged, one_by_one, thinking_heads, verifier_of
from plumbing.answers import MAX_ANSWER_CHARS, answers_match, extract_answer, matched_by
from plumbing.flags import AtLeast0, AtLeast1, NonNegative, as_flag, fail

ABSENT = "absent"
FORMAT_STYLES = ("answer-tags", "think")
# Each language's scripts: the first words in the Unicode names of its letters.
LANGUAGES = {
    **dict.fromkeys(("de", "en", "es", "fr", "it", "nl", "pl", "pt", "tr", "vi"), ("LATIN",)),
    **dict.fromkeys(("bg", "ru", "uk"), ("CYRILLIC",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("ARABIC",)),
    **dict.fromkeys(("hi", "mr", "ne"), ("DEVANAGARI",)),
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "ko": ("HANGUL",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "th": ("THAI",),
    "bn": ("BENGALI",),
    "ta": ("TAMIL",),
}


@dataclass
class RewardFlags:
    """The rewards, their weights, and how answers are judged."""

    accuracy_weight: NonNegative = 1.0
    """weight of the accuracy reward: 1 for a right answer, else 0"""
    format_weight: NonNegative = 0.2
    """weight of the format reward: 1 for the right format, else 0"""
    format_style: Literal["answer-tags", "think"] = "answer-tags"
    """<think>..</think><answer>..</answer> | <think>..</think>, then text with \\boxed{} or ####; --system-prompt must
    ask for the same format"""
    length_weight: NonNegative = 0.0
    """weight of the length reward (Kimi K1.5): 0.5 for a group's shortest completion down to -0.5 for its longest, at
    most 0 for wrong ones. From the start it makes a policy drop its think tags: set --length-reward-start"""
    length_reward_start: AtLeast0 = 0
    """iteration at which the length reward starts: after accuracy has risen, for example half of --iterations"""
    language_weight: NonNegative = 0.0
    """weight of the language reward (DeepSeek-R1): the share of the reasoning's words in --language's script"""
    language: Literal[*sorted(LANGUAGES)] = "en"
    """code of the language in which the model should reason"""
    overlong_weight: NonNegative = 0.0
    """weight of the soft overlong penalty (DAPO), which falls to -1 at --max-new-tokens"""
    overlong_buffer: AtLeast1 | None = None
    """the overlong penalty starts this many tokens before --max-new-tokens; None: a fifth of them (DAPO)"""
    reward_model: str | None = None
    """directory of a reward model (train_rm.py), whose score is added to the rewards above. With it, problems may lack
    an answer: they get no accuracy reward"""
    reward_model_prompts: Literal["all", "unanswered"] = "all"
    """problems whose completions get the reward model's score: all | those without an answer"""
    reward_model_weight: NonNegative = 1.0
    """weight of the reward model's score, which has mean 0 over its training pairs"""
    truncated: Literal["score", "wrong", "mask"] = "score"
    """completions cut by the length limit: scored like others | never right | advantage 0 (a KL in the loss stays, and
    PPO's critic learns from them)"""
    judge_model: str | None = None
    """causal LM that is asked, if the rules find no match, whether the answer equals the reference answer"""
    verifier_model: str | None = None
    """reward model (train_rm.py) that scores unmatched answers, instead of --judge-model: above 0 is right"""


def check_rewards(flags: RewardFlags, max_new_tokens: int, tokenizer, problems: list[Problem]) -> None:
    """Fails if no reward has a weight, or none that problems without an answer can get, if --overlong-buffer is longer
    than a completion, or if the reward model can't read the policy's ids."""
    weights = [name for name in vars(flags) if name.endswith("_weight")]
    if not flags.reward_model:
        weights.remove("reward_model_weight")
    if not any(getattr(flags, name) for name in weights):
        names = ", ".join(map(as_flag, weights))
        fail(f"{names} are all 0: there is nothing to learn from")
    if flags.overlong_weight and (flags.overlong_buffer or 0) > max_new_tokens:
        fail(f"--overlong-buffer {flags.overlong_buffer}: must be at most --max-new-tokens {max_new_tokens}")
    unanswered = [problem for problem in problems if not is_judged(problem)]
    if unanswered and not flags.reward_model_weight:
        fail(f"--reward-model-weight 0: problem {unanswered[0].id!r} has no answer, so nothing else judges it")
    if len(unanswered) == len(problems) and flags.accuracy_weight:
        fail("--accuracy-weight: none of the problems has an answer; if that is meant: --accuracy-weight 0")
    if flags.reward_model:
        common.check_reward_model(flags.reward_model, tokenizer)
        if flags.accuracy_weight and flags.reward_model_prompts == "all":
            print(
                "note: the model's score adds to the rules' rewards; --accuracy-weight 0 --format-weight 0 drops them"
            )


def score_completions(
    texts: list[str],
    problems: list[Problem],
    rollout: Rollout,
    flags: RewardFlags,
    max_new_tokens: int,
    verify: "Verifier | None" = None,
    reward_model=None,
    max_tokens: int = 8192,
) -> dict[str, list]:
    """The unweighted rewards by name: lists of B values, a float or None each. texts: (B,); problems: (P,).

    verify: None: the rules of plumbing/answers.py. reward_model: its score is called "model"; it reads at most
    max_tokens at once.
    """
    G, lengths = rollout.group_size, rollout.lengths.cpu()
    judged = [is_judged(problem) for problem in problems for _ in range(G)]
    components = {
        "accuracy": (verify or Verifier())(texts, [problem for problem in problems for _ in range(G)]),
        "format": [format_reward(text, flags.format_style) for text in texts],
    }
    if flags.truncated == "wrong":
        ended = zip(components["accuracy"], rollout.finished.tolist(), strict=True)
        components["accuracy"] = [right if finished or right == ABSENT else 0.0 for right, finished in ended]
    if flags.language_weight:
        components["language"] = [language_reward(text, flags.language) for text in texts]
    if flags.overlong_weight:
        buffer = flags.overlong_buffer or max(1, max_new_tokens // 5)
        components["overlong"] = overlong_penalty(lengths, max_new_tokens, buffer).tolist()
    if reward_model is not None:
        scores = zip(common.rollout_scores(reward_model, rollout, max_tokens).tolist(), judged, strict=True)
        by_rule = flags.reward_model_prompts == "unanswered"  # alone, where there is an answer
        components["model"] = [ABSENT if by_rule and has_answer else score for score, has_answer in scores]
    if flags.length_weight:
        known = torch.tensor([right is not None for right in components["accuracy"]]).view(-1, G)
        right = torch.tensor([0.0 if right in (None, ABSENT) else right for right in components["accuracy"]])
        bonuses = length_reward(lengths.view(-1, G), right.view(-1, G), known).flatten().tolist()
        components["length"] = [b if has_answer else ABSENT for b, has_answer in zip(bonuses, judged, strict=True)]
    return components


def sum_rewards(
    components: dict[str, list | Tensor], weights: dict[str, float], texts: list[str], problems: list[Problem]
) -> tuple[Tensor, Tensor]:
    """rewards and scored, both (P, G): the weighted sum of the components, and whether it is known (bool). A component
    holds B floats, None or ABSENT, as a list or a tensor; here each becomes a tensor (P, G).

    One None takes the whole completion out: its reward, and the component that is None, become NaN, so that a mean or
    a baseline which forgets `scored` can't pass for a number. A component that is ABSENT becomes NaN, too, and adds
    nothing to the sum. NaN and infinite values that come in are errors.
    """
    P, G = len(problems), len(texts) // len(problems)
    of_texts = [problem for problem in problems for _ in range(G)]
    scored, rewards = torch.ones(P, G, dtype=torch.bool), torch.zeros(P, G)
    for name, values in components.items():
        if name not in weights:
            raise ValueError(f"reward {name!r} has no weight")
        values = values.flatten().tolist() if isinstance(values, Tensor) else values
        check_finite(name, values, texts, of_texts)
        scored &= torch.tensor([value is not None for value in values]).view(P, G)
        values = [math.nan if value in (None, ABSENT) else float(value) for value in values]
        components[name] = torch.tensor(values).view(P, G)
        rewards += (weights[name] * components[name]).nan_to_num(0.0)
    return rewards.masked_fill(~scored, torch.nan), scored


def check_finite(name: str, values: list, texts: list[str], problems: list[Problem]) -> None:
    """Fails if a reward is NaN or infinite, and names it, the problem and the completion. All of length B."""
    for value, text, problem in zip(values, texts, problems, strict=True):
        if value not in (None, ABSENT) and not math.isfinite(value):
            where = f"problem {problem.id or problem.question[:200]!r}, completion {text[:200]!r}"
            fail(f"reward {name!r} is {value}: {where}. If a reward can't be known, return None")


def success_rates(accuracy: Tensor, scored: Tensor) -> list[float | None]:
    """(P,) mean accuracy of each group's scored completions; None where there is none, or no answer. Both (P, G)."""
    known = scored & ~accuracy.isnan()
    return [group[which].mean().item() if which.any() else None for group, which in zip(accuracy, known, strict=True)]


def reward_weights(flags: RewardFlags, iteration: int) -> dict[str, float]:
    """Each component's weight in this iteration, by name."""
    weights = {name.removesuffix("_weight"): value for name, value in vars(flags).items() if name.endswith("_weight")}
    weights["model"] = weights.pop("reward_model")
    if iteration < flags.length_reward_start:
        weights["length"] = 0.0
    return weights


# ---- Reward functions: of a completion's text, 1.0 or 0.0, unless they say otherwise --------------------------------


def accuracy_reward(text: str, gold: str) -> float:
    """1.0 if the text's final answer is the gold answer, else 0.0."""
    return 1.0 if answers_match(extract_answer(text), gold) else 0.0


def format_reward(text: str, style: str = "answer-tags") -> float:
    """1.0 if the text keeps to the format, one of FORMAT_STYLES, else 0.0.

    "answer-tags" (DeepSeek-R1-Zero): <think>...</think> <answer>...</answer>, each once, and nothing else.
    "think" (Qwen3): <think>...</think> at the start, once, then the answer as free text.
    The answer must not be empty. The thinking may be empty, as in Qwen3's non-thinking mode. The opening tag must be in
    the text: if the chat template puts it into the prompt, put it back in front (data.decode does).
    """
    if style == "answer-tags":
        pieces = re.split(r"(</?(?:think|answer)>)", text)  # text, tag, text, tag, ..., text
        if pieces[1::2] != ["<think>", "</think>", "<answer>", "</answer>"]:
            return 0.0
        before, _, between, answer, after = pieces[0::2]
        outside = before + between + after
    elif style == "think":
        pieces = re.split(r"(</?think>)", text)
        if pieces[1::2] != ["<think>", "</think>"]:
            return 0.0
        outside, _, answer = pieces[0::2]
    else:
        raise ValueError(f"unknown format style {style!r}, choose one of {', '.join(FORMAT_STYLES)}")
    return 1.0 if answer.strip() and not outside.strip() else 0.0


@functools.lru_cache(maxsize=65_536)
def script_of(character: str) -> str:
    """A letter's script (LATIN, CJK, ...), MARK for characters that go with any script, "" for others and math."""
    if unicodedata.category(character).startswith("M"):
        return "MARK"
    script = unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else ""
    return {"IDEOGRAPHIC": "CJK", "MATHEMATICAL": "", "DOUBLE-STRUCK": "", "MODIFIER": "MARK"}.get(script, script)


def language_reward(text: str, language: str) -> float:
    """The fraction of the reasoning's words that are written in the script of `language`, one of LANGUAGES' codes; 1.0
    if there are no words (DeepSeek-R1, arXiv:2501.12948v1, section 2.3.2).

    The reasoning is the text from the first <think> (or the start) to the last </think> (or the end). A word is one
    Chinese or Japanese character, or a run of letters of another script. Single Latin or Greek letters and LaTeX
    commands are mathematics, not words. The reward can't tell languages with the same script apart (English, French).
    """
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}, choose one of {', '.join(sorted(LANGUAGES))}")
    end = text.rfind("</think>") if "</think>" in text else len(text)
    text = text[max(text.find("<think>", 0, end), 0) : end].removeprefix("<think>")
    text, words, inside = re.sub(r"\\[A-Za-z]+|</?think>", " ", text), 0, 0
    if text.isascii():
        return float("LATIN" in LANGUAGES[language] or not re.search("[A-Za-z]{2}", text))
    for is_word, run in itertools.groupby(map(script_of, text), key=bool):
        scripts = [script for script in run if script != "MARK"] if is_word else []
        spaceless = [script for script in scripts if script in LANGUAGES["ja"]]
        words += len(spaceless)
        inside += sum(script in LANGUAGES[language] for script in spaceless)
        if len(scripts) > len(spaceless) and scripts not in (["LATIN"], ["GREEK"]):
            words += 1
            inside += all(script in LANGUAGES[language] for script in scripts if script not in LANGUAGES["ja"])
    return inside / words if words else 1.0


def overlong_penalty(lengths, max_new_tokens: int, buffer: int):
    """The penalty of each length (B,): 0 up to max_new_tokens - buffer, then falling linearly to -1 at max_new_tokens
    (DAPO, arXiv:2503.14476, eq. 13)."""
    return -((lengths - (max_new_tokens - buffer)) / buffer).clamp(0, 1)


def length_reward(lengths, correct, scored=None):
    """From 0.5 for a group's shortest completion down to -0.5 for its longest, but never above 0 for a wrong one (Kimi
    K1.5, arXiv:2501.12599, section 2.3.3). If all lengths of a group are equal, its rewards are 0. lengths, correct (0
    or 1), scored (bool, whose lengths count; None: all) and the rewards: (P, G)."""
    scored = lengths > -1 if scored is None else scored
    longest = lengths.masked_fill(~scored, 0).amax(1, keepdim=True)
    shortest = lengths.where(scored, longest).amin(1, keepdim=True)
    bonus = (0.5 - (lengths - shortest) / (longest - shortest).clamp(min=1)) * (longest > shortest)
    return bonus.where(correct > 0, bonus.clamp(max=0.0))


# ---- Is the answer right? ------------------------------------------------------------------------------------------


def verifier_prompt(problem: Problem) -> str:
    """The question to a judge or verifier model; the given answer follows it."""
    return f"Question: {problem.question}\nReference answer: {problem.answer}"


class Verifier:
    """Decides whether completions are right. If the problem's task has a verifier of its own, that decides. Otherwise
    an answer is right if a rule (numbers and strings), algebra (symbolic) or, if one is given, a model finds it
    right: `--judge-model`, a causal LM, by saying yes; `--verifier-model`, a reward model (train_rm.py), by a score
    above 0. `counts`: completions found right by each stage, and wrong ones.

    flags: may name these models, which read at most max_tokens at once. A verifier of one's own decides instead of all
    of them: is_right(text, problem), or are_right(texts, problems) for a whole batch, which suits a slow judge. Its
    verdict is true, false, a number (a partly right answer), or None if it is unknown.
    """

    def __init__(
        self,
        flags=None,
        device="cpu",
        dtype=torch.float32,
        max_tokens: int = 8192,
        is_right: Callable | None = None,
        are_right: Callable | None = None,
    ):
        self.counts: Counter = Counter()
        self.are_right, self.max_tokens = are_right or (is_right and one_by_one(is_right)), max_tokens
        judge, verifier = getattr(flags, "judge_model", None), getattr(flags, "verifier_model", None)
        if judge and verifier:
            fail("--judge-model and --verifier-model: only one of them can be given")
        self.model = None
        if path := judge or verifier:
            flag = "--judge-model" if judge else "--verifier-model"
            self.tokenizer = common.load_tokenizer(path, flag)
            self.yes, self.no = self.replies(path) if judge else ([], [])
            if judge and thinking_heads(self.tokenizer, encode_prompts(self.tokenizer, ["?"]))[0] == "<think>":
                fail(f"{flag} {path}: its chat template opens a think block, so its reply can't begin with yes or no")
            self.context = common.context_length(common.load_config(path, flag))
            if judge:
                self.model = common.load_policy(path, None, device, dtype)
            else:
                self.model = common.load_reward_model(path, None, device, dtype, flag=flag)

    def replies(self, path: str) -> tuple[list[int], list[int]]:
        """Ids of the single tokens that mean yes, and of those that mean no."""
        tokens = []
        for word in ("yes", "no"):
            spellings = (word, word.capitalize(), " " + word, " " + word.capitalize())
            ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in spellings]
            tokens.append([i[0] for i in ids if len(i) == 1 and i[0] != self.tokenizer.unk_token_id])
        if not all(tokens):
            fail(f"--judge-model {path}: its tokenizer has no single tokens for yes and no, so it can't be asked")
        return tuple(sorted(set(ids)) for ids in tokens)

    def __call__(self, texts: list[str], problems: list[Problem]) -> list[float | None]:
        """(B,) 1.0 if the text's answer is right, 0.0 if it is wrong, ABSENT if there is no right one; from a verifier
        of one's own also None."""
        verdicts: list[float | str | None] = [ABSENT] * len(texts)
        by_task: dict[str, list[int]] = {}
        for row, problem in enumerate(problems):
            if self.are_right or is_judged(problem):
                by_task.setdefault(problem.task, []).append(row)
        for task, rows in by_task.items():
            given = [texts[row] for row in rows], [problems[row] for row in rows]
            judge = self.are_right or verifier_of(task)
            found = self.by_answer(*given) if judge is None else self.checked(judge(*given), *given)
            for row, verdict in zip(rows, found, strict=True):
                verdicts[row] = verdict
        return verdicts

    def by_answer(self, texts: list[str], problems: list[Problem]) -> list[float]:
        """Verdicts by the rules, algebra and the model."""
        answers = [extract_answer(text) for text in texts]
        stages = [matched_by(answer, problem.answer) for answer, problem in zip(answers, problems, strict=True)]
        if self.model is not None:
            pairs = list(zip(problems, answers, strict=True))
            unmatched = {pair: None for pair, stage in zip(pairs, stages, strict=True) if not stage}  # each once
            asked = [(p, a) for p, a in unmatched if p.answer and a and len(a) <= MAX_ANSWER_CHARS]
            right = dict(zip(asked, self.ask(asked), strict=True))
            stages = [
                stage or ("model" if right.get(pair) else None) for pair, stage in zip(pairs, stages, strict=True)
            ]
        self.counts.update(stage or "wrong" for stage in stages)
        return [float(stage is not None) for stage in stages]

    def checked(self, verdicts: list, texts: list[str], problems: list[Problem]) -> list[float | None]:
        """The verdicts of a verifier of one's own as numbers; an error unless there is one for each text."""
        verdicts = [None if verdict is None else float(verdict) for verdict in verdicts]
        if len(verdicts) != len(texts):
            fail(f"the verifier gave {len(verdicts)} verdicts for {len(texts)} completions")
        check_finite("accuracy", verdicts, texts, problems)
        self.counts.update("wrong" if not verdict else "task" for verdict in verdicts)
        return verdicts

    @torch.no_grad()
    def ask(self, pairs: list[tuple[Problem, str]]) -> list[bool]:
        if not pairs:
            return []
        for token in self.tokenizer.all_special_tokens:  # or an answer could end its turn and begin another
            pairs = [(problem, answer.replace(token, " ")) for problem, answer in pairs]
        texts = [verifier_prompt(problem) for problem, _ in pairs]
        if self.yes:
            ask = "Is the given answer the same as the reference answer? Reply with yes or no."
            texts = [f"{text}\nGiven answer: {answer}\n{ask}" for text, (_, answer) in zip(texts, pairs, strict=True)]
        prompts = encode_prompts(self.tokenizer, texts)
        if self.yes:
            completions = [[[token] for token in self.yes + self.no]] * len(pairs)
        else:
            completions = [[ids] for ids in encode_completions(self.tokenizer, [a for _, a in pairs], prompts)]
        right = [False] * len(pairs)  # answers that don't fit the context stay wrong
        fits = [i for i in range(len(pairs)) if len(prompts[i]) + len(completions[i][-1]) <= self.context]
        if fits:
            replies = [ids for i in fits for ids in completions[i]]
            values = self.values([prompts[i] for i in fits], replies, len(completions[0])).view(len(fits), -1)
            if self.yes:
                yes, no = values.exp().split([len(self.yes), len(self.no)], 1)
                values = yes.sum(1) - no.sum(1)
            for i, value in zip(fits, values.flatten().tolist(), strict=True):
                right[i] = value > 0
        return right

    def values(self, prompts: list[list[int]], replies: list[list[int]], group_size: int) -> Tensor:
        """(B,) logprobs of the judge's replies, or the verifier's scores of the answers."""
        rollout = common.make_rollout(prompts, replies, group_size, self.model.device)
        if self.yes:
            return common.rollout_logprobs(self.model, rollout, self.max_tokens)[0][:, 0].cpu()
        return common.rollout_scores(self.model, rollout, self.max_tokens).cpu()

    def summary(self) -> dict[str, float]:
        """The share of completions since the last call that each stage found right; {} without a model."""
        counts, self.counts = self.counts, Counter()
        if self.model is None or not counts:
            return {}
        return {f"verifier/{name}": counts[name] / counts.total() for name in ("rule", "symbolic", "model")}
