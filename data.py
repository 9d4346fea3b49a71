"""Problems, samples and demonstrations: where they come from, their chat prompts as token ids, and the order in which
they are drawn."""

import functools
import hashlib
import importlib
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from jinja2 import TemplateError

from common import Rollout, Tokenizer, context_length, special_tokens
from plumbing.answers import plain_unicode
from plumbing.flags import fail, reason
from plumbing.rows import (
    EMPTY,
    NEEDED,
    UNKEPT,
    answer_field,
    as_number,
    as_prompt,
    as_share,
    as_text,
    can_match,
    check_text,
    continued,
    fail_on,
    file_rows,
    find,
    hub_rows,
    is_file,
    is_undivided,
    optional_field,
    placed_rows,
    prompt_turns,
    required,
)

MODES = "think", "no_think"


@dataclass(frozen=True)
class Problem:
    question: str  # plain text; the key for splits, pass rates and pairs
    answer: str  # "" if the task's verifier decides, or if there is no right answer (see is_judged)
    id: str = ""
    topic: str = ""
    difficulty: float | None = None
    pass_rate: float | None = None  # share of a model's samples that were right
    messages: tuple | None = None  # the prompt's turns ((role, content), ...); None for a single user turn
    task: str = ""  # name of its file in tasks/, if any; the file's is_right or are_right, if any, judges completions
    columns: dict = field(default_factory=dict, compare=False)  # the other columns of its row
    prompt_ids: tuple = field(default=(), compare=False, repr=False)  # see encode_problems

    def to_row(self) -> dict:
        """The problem as a row for a .jsonl file, without prompt_ids."""
        row = {"question": prompt_value(self.question, self.messages)}
        row |= {"answer": self.answer} if self.answer else {}
        row |= {"id": self.id, "topic": self.topic, "difficulty": self.difficulty}
        row |= {"task": self.task} if self.task else {}
        row = {name: value for name, value in row.items() if value or name not in self.columns}  # see optional_field
        return self.columns | row | ({} if self.pass_rate is None else {"pass_rate": self.pass_rate})


def is_held_out(question: str) -> bool:
    """True for one question in ten, by a hash of its text alone, without system turn and thinking mode. So no seed,
    order or file can put the same problem into both the train and the eval split."""
    text = plain_unicode(re.sub(f" /(?:{'|'.join(MODES)})$", "", question))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


# ---- Where problems come from --------------------------------------------------------------------------------------


def load_problems(
    source: str, split: str, limit: int | None = None, seed: int = 0, unanswered: bool = False
) -> list[Problem]:
    """Problems of one split of one source: "train", "eval" or "all". "all" is every problem except a hub dataset's test
    or validation split, because "all" is used to generate training data.

    source: a task, such as "arithmetic" ("arithmetic:7-8" for other difficulties), the path of a file, or a hub dataset
    (`name`, `name:config`, `name:config:split`). A file, a named split, and a hub dataset without a test or validation
    split are split by `is_held_out`. Prints one line about the problems of a file or a hub dataset.
    limit: at most this many. A task gives its first ones, cycling through the difficulties; other sources give a random
    choice in their own order. seed: for the task's draws and for that choice. unanswered: rows may lack an answer,
    because a learned reward scores them."""
    if split not in ("train", "eval", "all"):
        raise ValueError(f"split is 'train', 'eval' or 'all', not {split!r}")
    name, _, difficulties = source.partition(":")
    task = None if is_file(source) else load_task(name)
    if task:
        problems = draw_problems(task, split, limit, seed, parse_difficulties(task, source, difficulties))
    else:
        rows, divided = (file_rows(source), False) if is_file(source) else hub_rows(source, split)
        problems = read_problems(rows, source, unanswered)
        if split != "all" and not divided:
            problems = [p for p in problems if is_held_out(p.question) == (split == "eval")]
    if not problems:
        hint = "; give held-out problems with --eval-data" if split == "eval" else ""
        fail(f"{source}: no problem left in its {split} split{hint}")
    if limit and limit < len(problems) and not task:
        chosen = random.Random(f"limit {seed}").sample(range(len(problems)), limit)
        problems = [problems[i] for i in sorted(chosen)]
    if not task:
        print(f"problems: {len(problems)} from {source} ({split}); {findings(problems)}")
    return problems


def load_train_problems(problems: str, eval_data: str | None, unanswered: bool = False) -> list[Problem]:
    """The train split of --problems, or all of it if it is undivided and --eval-data gives the held-out problems.
    unanswered: see load_problems."""
    split = "all" if eval_data and is_undivided(problems) else "train"
    return load_problems(problems, split, unanswered=unanswered)


def load_eval_problems(problems: str, eval_data: str | None, limit: int, unanswered: bool = False) -> list[Problem]:
    """All of --eval-data if it is undivided, else its eval split. Without it: the eval split of --problems. unanswered:
    see load_problems."""
    split = "all" if eval_data and is_undivided(eval_data) else "eval"
    return load_problems(eval_data or problems, split, limit, unanswered=unanswered)


def findings(problems: list[Problem]) -> str:
    """What is worth knowing about problems before a run: answers that can't be matched, repetitions, length."""
    answers = [p.answer for p in problems if p.answer and not verifier_of(p.task) and not can_match(p.answer)]
    unanswered = sum(not is_judged(problem) for problem in problems)
    repeated = len(problems) - len({(p.question, p.messages) for p in problems})
    shown = ", ".join(repr(answer[:60]) for answer in answers[:3])
    unmatched = f"answers that match nothing, or only their very text: {len(answers)}, such as {shown}; "
    longest = max(sum(len(text) for _, text in p.messages or [("", p.question)]) for p in problems)
    counts = f"without an answer: {unanswered}; " * bool(unanswered) + unmatched * bool(answers)
    counts += f"repeated questions: {repeated}; " * bool(repeated)
    return f"{counts}longest prompt: {longest:,} characters"


@functools.cache
def load_task(name: str):
    """The module tasks/NAME.py; None if there is none."""
    exists = name.isidentifier() and (Path(__file__).parent / "tasks" / f"{name}.py").exists()
    return importlib.import_module(f"tasks.{name}") if exists else None


def verifier_of(task: str) -> Callable | None:
    """The task's own verifier, as a function of texts and their problems; None without one."""
    module = load_task(task)
    if hasattr(module, "are_right"):
        return module.are_right
    return one_by_one(module.is_right) if hasattr(module, "is_right") else None


def is_judged(problem: Problem) -> bool:
    """Whether a completion of the problem can be right: it has an answer, or its task a verifier."""
    return bool(problem.answer or verifier_of(problem.task))


def one_by_one(is_right: Callable) -> Callable:
    """A function of one text and its problem as a function of a batch."""
    return lambda texts, problems: [is_right(*pair) for pair in zip(texts, problems, strict=True)]


def parse_difficulties(task, source: str, text: str) -> list[int]:
    """The difficulties that `text` names: "7-8", "7", or "" for all of the task's own."""
    low, _, high = text.partition("-")
    if not text:
        return list(task.DIFFICULTIES)
    if not re.fullmatch("[1-9](-[1-9])?", text) or int(low) > int(high or low):
        fail(f"{source}: {source.partition(':')[0]}:LOW-HIGH is expected, with difficulties from 1 to 9")
    return list(range(int(low), int(high or low) + 1))


def draw_problems(task, split: str, limit: int | None, seed: int, difficulties: list[int]) -> list[Problem]:
    """At most `limit` distinct problems of a split, cycling through the difficulties. A difficulty with few problems
    (there are 1,700 chains of one operation) runs out first: it ends after 50,000 draws without a new problem."""
    limit, name = limit or (6000 if split == "train" else 3000), task.__name__.removeprefix("tasks.")
    by_difficulty = []
    for difficulty in difficulties:
        rng = random.Random(f"problems {split} {difficulty} {seed}")
        wanted, found, in_vain = -(-limit // len(difficulties)), {}, 0
        while len(found) < wanted and in_vain < 50_000:
            row = task.draw_problem(rng, difficulty)
            question = row["question"]
            in_vain += 1
            if question not in found and (split == "all" or is_held_out(question) == (split == "eval")):
                found[question], in_vain = Problem(**row, task=name), 0
        by_difficulty.append(list(found.values()))
    in_turn = [group[i] for i in range(max(map(len, by_difficulty))) for group in by_difficulty if i < len(group)]
    return in_turn[:limit]


def read_problems(rows: list[tuple[str, dict]], source: str, unanswered: bool = False) -> list[Problem]:
    """rows: (place, row) with a question and an answer, and optionally `id`, `topic`, `difficulty`, `pass_rate`, by any
    of their NAMES. Other columns are kept. If a task has a verifier, its rows have that task's columns instead of an
    answer (Countdown: `nums` and `target`). Bad rows end the program; the error names the first five. An optional
    column that can't be read is ignored with a note. unanswered: a row may lack the answer."""
    problems, errors, ignored, ids = [], [], {}, set()

    def as_new_id(name: str, value) -> str:
        if (text := as_text(name, value)) in ids:
            raise ValueError(f"field {name!r} is {text[:80]!r} a second time")
        ids.add(text)
        return text

    optional = {"id": as_new_id, "topic": as_text, "difficulty": as_number, "pass_rate": as_share}
    for place, row in rows:
        try:
            task = task_of(row)
            if hasattr(load_task(task), "complete_row"):
                row = load_task(task).complete_row(row)
            needless = verifier_of(task) or (unanswered and (find(row, "answer") or ("", None))[1] in EMPTY)
            answer = "" if needless else answer_field(row)
            question, messages = as_prompt(*prompt_turns(row, needed=() if task else NEEDED))
            found = {kind: optional_field(row, kind, read, ignored) for kind, read in optional.items()}
            read = {*UNKEPT, *(kind for kind in found if found[kind] is not None or row.get(kind) in EMPTY)}
            columns = {name: value for name, value in row.items() if name not in read}
            found |= {"id": found["id"] or place, "topic": found["topic"] or ""}
            problems.append(Problem(question, answer, messages=messages, task=task, columns=columns, **found))
        except ValueError as error:
            errors.append((place, error))
    fail_on(errors, source)
    for name, ignored_errors in ignored.items():
        count = f"{len(ignored_errors)} of {len(rows)} rows"
        print(f"note: {source}: column {name!r} is not read in {count}: {ignored_errors[0]}")
    return problems


def task_of(row: dict) -> str:
    """The name of a row's task: its field `task`, "countdown" if it has `nums`, or "" for most rows."""
    name = row.get("task") or ("countdown" if row.get("nums") is not None else "")
    return name if isinstance(name, str) and load_task(name) else ""


# ---- Prompts of several turns -------------------------------------------------------------------------------------


def as_dicts(messages: tuple) -> list[dict]:
    return [{"role": role, "content": content} for role, content in messages]


def prompt_value(question: str, messages: tuple | None) -> str | list[dict]:
    """A prompt as it is written to a file: its text, or its list of turns."""
    return question if messages is None else as_dicts(messages)


def add_mode(question: str, messages: tuple | None, mode: str | None) -> tuple[str, tuple | None]:
    """Appends Qwen3's flag /think or /no_think to the user's turn (arXiv:2505.09388, section 4.3)."""
    if not mode:
        return question, messages
    if messages is not None:
        *before, (role, content) = messages
        messages = (*before, (role, f"{content} /{mode}"))
    return f"{question} /{mode}", messages


# ---- The samples file: problems with scored completions ------------------------------------------------------------


def read_samples(rows: list[tuple[str, dict]], source: str) -> list[dict]:
    """Checks a samples file's rows (place, row); adds `question` as text and `messages` (see data.Problem)."""
    records, errors = [], []
    for place, row in rows:
        try:
            question, messages = as_prompt(*prompt_turns(row, needed=()))
            if not isinstance(row.get("completions"), list):
                raise ValueError("no field 'completions' with a list, as a samples file has (evaluate.py --output)")
            for completion in row["completions"]:
                if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
                    raise ValueError("a completion has no field 'text'")
                check_text("text", completion["text"])
                for name, allowed in (("correct", (True, False, None)), ("finished", (True, False))):
                    if not any(completion.get(name, True) is value for value in allowed):  # 1 == True, but is not it
                        raise ValueError(f"a completion's {name!r} is {completion[name]!r}, true or false is expected")
                ids = completion.get("ids", [])
                if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
                    raise ValueError("a completion's 'ids' are no list of token ids; leave the field out")
                score = completion.get("reward")
                if not isinstance(score, int | float) or not abs(score) < 1e9:  # also refuses NaN
                    raise ValueError(f"a completion's 'reward' is {str(score)[:80]}, a number is expected")
            if row.get("mode") not in (None, *MODES):
                raise ValueError(f"field 'mode' is {row['mode']!r}, {' or '.join(MODES)} is expected")
            records.append(row | {"question": question, "messages": messages})
        except ValueError as error:
            errors.append((place, error))
    fail_on(errors, source)
    return records


def is_correct(completion: dict) -> bool:
    """Whether a completion in a samples file is right: its `correct`, which is null if its problem has no answer;
    without that field, a reward above 0."""
    return bool(completion.get("correct", completion["reward"] > 0))


def counts_as_right(completion: dict) -> bool:
    """Whether a completion in a samples file is right and was not cut by the length limit."""
    return is_correct(completion) and completion.get("finished", True)


# ---- Demonstrations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demonstration:
    question: str
    completion: str
    messages: tuple | None = None  # the prompt's turns, see data.Problem
    prompt_ids: tuple = field(default=(), compare=False, repr=False)  # both are set by encode_demonstrations; before,
    completion_ids: tuple = field(default=(), compare=False, repr=False)  # this holds the ids of a samples file, if any

    def to_row(self) -> dict:
        return {"prompt": prompt_value(self.question, self.messages), "completion": self.completion}


def mix_demonstrations(sources: tuple[str, ...], count: int, keep: str) -> list[Demonstration]:
    """The demonstrations of several sources (see load_demonstrations). FILE:COUNT takes COUNT of FILE's at random."""
    if not sources:
        fail("--data: at least one file is needed")
    mixed = []
    for source in sources:
        file, colon, number = source.rpartition(":")
        limit = int(number) if colon and re.fullmatch("[0-9]{1,9}", number) and not is_file(source) else None
        found = load_demonstrations(source if limit is None else file, limit or count, keep=keep)
        if limit is not None and not 0 < limit <= len(found):
            fail(f"--data {source}: from 1 to {len(found)} can be drawn from {file}")
        mixed += random.Random(f"mix {source}").sample(found, limit) if limit else found
    return mixed


def load_demonstrations(source: str, count: int, seed: int = 0, keep: str = "correct") -> list[Demonstration]:
    """source: NAME-demonstrations, such as "arithmetic-demonstrations" (the task's teacher makes `count` of them from
    the seed); a file or hub dataset with a question and a `completion` (see NAMES), or with conversations that end with
    the assistant's turn; or a samples file, from which `chosen_samples` picks completions by `keep`."""
    if source.endswith("-demonstrations") and (task := load_task(source.removesuffix("-demonstrations"))):
        return [Demonstration(*pair) for pair in task.demonstrations(count, seed)]
    rows = placed_rows(source)
    if "completions" in rows[0][1]:
        chosen = demonstrations_from(read_samples(rows, source), keep)
        if not chosen:
            fail(f"{source}: none of its completions is right and finished: nothing to learn from")
        return chosen
    demonstrations, errors = [], []
    for place, row in rows:
        try:
            if str(row.get("label")).lower() == "false":  # TRL's unpaired preferences
                raise ValueError("field 'label' is false: not to be learned from; remove such rows")
            asked, turns = prompt_turns(row, ("messages", "conversations", "prompt"))
            name = asked
            if name.lower() not in ("messages", "conversations") or turns[-1]["role"] != "assistant":
                as_prompt(asked, turns)
                name, value = required(row, "completion")
                turns = continued(turns, name, value)
            question, messages = as_prompt(asked, turns[:-1])
            demonstrations.append(Demonstration(question, as_text(name, turns[-1]["content"]), messages))
        except ValueError as error:
            errors.append((place, error))
    fail_on(errors, source)
    return demonstrations


def chosen_samples(record: dict, keep: str) -> list[str]:
    """Completions for SFT. keep "correct": all right ones without duplicates (rejection sampling). "longest",
    "shortest", "random": one of them, and of those in the right format if there is any; ties are broken at random."""
    right = {c["text"]: c for c in record["completions"] if counts_as_right(c) and c["text"]}
    if keep == "correct" or not right:
        return list(right)
    well_formed = [text for text in right if right[text].get("format")] or list(right)
    random.Random(f"keep {record['question']}").shuffle(well_formed)
    lengths = {text: right[text].get("length", len(text)) for text in well_formed}
    choose = {"longest": max, "shortest": min, "random": lambda texts, key: texts[0]}[keep]
    return [choose(well_formed, key=lengths.get)]


def demonstrations_from(records: list[dict], keep: str) -> list[Demonstration]:
    demonstrations = []
    for record in records:
        question, messages = add_mode(record["question"], record["messages"], record.get("mode"))
        ids = {completion["text"]: tuple(completion.get("ids", ())) for completion in record["completions"]}
        chosen = chosen_samples(record, keep)
        demonstrations += [Demonstration(question, text, messages, (), ids[text]) for text in chosen]
    return demonstrations


# ---- Prompts and completions as token ids --------------------------------------------------------------------------


def encode_prompts(tokenizer, prompts: list, system_prompt: str = "") -> list[list[int]]:
    """Token ids of each prompt as chat turns, up to the point where the assistant's text begins.

    prompts: texts (one user turn) or tuples of (role, content). A prompt's own system turn replaces system_prompt.
    Without a chat template the prompt is the bare text. If the template refuses system turns (Gemma's), the system
    prompt is put at the start of the first turn instead. An error if it refuses a prompt or leaves out the user's text.
    Special tokens in a user's text, such as a question about <|im_end|>, are text: they end no turn.
    """
    turns = [as_dicts((("user", prompt),) if isinstance(prompt, str) else prompt) for prompt in prompts]
    if not tokenizer.chat_template:
        texts = ["\n\n".join(message["content"] for message in messages) for messages in turns]
        encoded = [tokenizer(text, split_special_tokens=True).input_ids for text in texts]
        return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in encoded]  # some append their EOS
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    turns = [messages if messages[0]["role"] == "system" else [*system, *messages] for messages in turns]

    def without_system(messages: list[dict]) -> list[dict]:
        if messages[0]["role"] != "system" or len(messages) < 2:
            return messages
        system, first, *rest = messages
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def render(messages: list[dict]) -> str:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if "".join(messages[-1]["content"].split()) not in "".join(text.split()):
            raise ValueError("it leaves out the user's text")
        return text

    texts = []
    for messages in turns:
        try:
            try:
                texts.append(render(messages))
            except TemplateError:  # for example: system turns are not supported
                texts.append(render(without_system(messages)))
        except Exception as error:  # a template may raise anything
            prompt = messages[-1]["content"][:200]
            whose = tokenizer.name_or_path or "this tokenizer"
            fail(f"the chat template of {whose} can't render {prompt!r} ({reason(error)})")
    # The template writes the BOS itself, if there is one. With add_special_tokens there would be two.
    encoded = token_ids(tokenizer, texts)
    special = re.compile("|".join(map(re.escape, special_tokens(tokenizer).values())) or "(?!)")
    for i, messages in enumerate(turns):
        if any(special.search(message["content"]) for message in messages if message["role"] == "user"):
            encoded[i] = encode_around(tokenizer, texts[i], messages)
    return encoded


def encode_around(tokenizer, text: str, messages: list[dict]) -> list[int]:
    """Token ids of a rendered prompt in which the special tokens of the user's texts are text."""
    ids = []
    for message in messages:
        content = message["content"].strip()
        before, found, text = text.partition(content)
        if not found:
            fail(f"{tokenizer.name_or_path}: its chat template changes a text with special tokens: {content[:200]!r}")
        ids += token_ids(tokenizer, [before])[0]
        ids += tokenizer(content, add_special_tokens=False, split_special_tokens=message["role"] == "user").input_ids
    return ids + token_ids(tokenizer, [text])[0]


def encode_problems(
    tokenizer, problems: list[Problem], system_prompt: str, config, room: int, flag="--max-new-tokens", mode=None
) -> list[Problem]:
    """The problems with their prompt_ids. An error if a prompt and `room` completion tokens exceed the model's context.
    flag: the flag that sets `room`, named in the error. mode: see add_mode."""
    prompts = [add_mode(problem.question, problem.messages, mode) for problem in problems]
    encoded = encode_prompts(tokenizer, [messages or question for question, messages in prompts], system_prompt)
    context = context_length(config)
    too_long = [i for i, ids in enumerate(encoded) if len(ids) + room > context]
    if too_long:
        name, tokens = problems[too_long[0]].id, len(encoded[too_long[0]])
        more = f" (so do {len(too_long) - 1} more)" if len(too_long) > 1 else ""
        need = f"{tokens} prompt tokens + {flag} {room}"
        fail(f"problem {name!r}: {need} exceed the model's context of {context}{more}")
    return [replace(problem, prompt_ids=tuple(ids)) for problem, ids in zip(problems, encoded, strict=True)]


def encode_completions(
    tokenizer, completions: list[str], prompts: list[list[int]], sampled: list[tuple] | None = None
) -> list[list[int]]:
    """Token ids of each completion after its prompt, with one EOS at the end. No token spans prompt and completion. The
    part of the think block that the template wrote into the prompt (see `decode`) is left out.

    sampled: for each completion the ids that a samples file holds of it, or (). They are taken if this tokenizer
    decodes them to the same text; encoded anew, a text may have other ids than the policy sampled."""
    heads, eos = thinking_heads(tokenizer, prompts), tokenizer.eos_token
    texts = [text.removeprefix(head).removesuffix(eos) for text, head in zip(completions, heads, strict=True)]
    encoded = ids_after(tokenizer, prompts, texts)
    known = [i for i, ids in enumerate(sampled or []) if ids and max(ids) < len(tokenizer)]
    decoded = tokenizer.batch_decode([list(sampled[i]) for i in known]) if known else []  # of [] it would be [""]
    for i, text in zip(known, decoded, strict=True):
        encoded[i] = list(sampled[i]) if text == texts[i] else encoded[i]
    return [ids + [tokenizer.eos_token_id] for ids in encoded]


def ids_after(tokenizer, before: list[list[int]], texts: list[str]) -> list[list[int]]:
    """Token ids of each text as it would stand after the ids before it. Encoded alone it may begin with a space that
    nobody wrote (SentencePiece's dummy prefix). If both would share a token, the text is encoded alone."""
    anchors = tokenizer.batch_decode([list(ids[-1:]) for ids in before])
    anchor_ids = {anchor: token_ids(tokenizer, [anchor])[0] for anchor in {*anchors}}
    joint = token_ids(tokenizer, [anchor + text for anchor, text in zip(anchors, texts, strict=True)])
    encoded = []
    for ids, anchor, text in zip(joint, anchors, texts, strict=True):
        head = anchor_ids[anchor]
        encoded.append(ids[len(head) :] if ids[: len(head)] == head else token_ids(tokenizer, [text])[0])
    return encoded


def follow_up_ids(tokenizer, text: str, finished: bool = True) -> list[int]:
    """Token ids of a user's next turn, to append to a completion's ids (see common.continue_groups); they end where the
    assistant's next text begins. finished: the completion ends with its EOS; if it does not, the ids first close the
    assistant's turn."""
    if not tokenizer.chat_template:
        return token_ids(tokenizer, ["\n\n" + text])[0]
    turns = as_dicts((("user", "-"), ("assistant", "%%"), ("user", text)))
    rest = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False).partition("%%")[2]
    return token_ids(tokenizer, [rest.removeprefix(tokenizer.eos_token if finished else "")])[0]


def token_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. In chunks, because a tokenizer's output takes a hundred times the memory of the ids."""
    chunks = [texts[start : start + 1000] for start in range(0, len(texts), 1000)]
    return [ids for chunk in chunks for ids in tokenizer(chunk, add_special_tokens=False).input_ids]


def thinking_heads(tokenizer, prompts: list[list[int]]) -> list[str]:
    """The think block, or its beginning, that the chat template wrote at each prompt's end; "" if there is none. It
    counts as the completion's beginning."""
    tails = tokenizer.batch_decode([list(prompt[-32:]) for prompt in prompts])
    found = [re.search(r"<think>(\s*</think>\s*)?\s*$", tail) for tail in tails]
    return ["<think>" + (match[1] or "") if match else "" for match in found]


def decode(tokenizer: Tokenizer, rollout: Rollout) -> list[str]:
    """(B,) completion texts for rewards and for people, without padding and the tokens at which sampling stops. Other
    special tokens, such as some models' <think>, are text. Don't encode the texts again: the rollout has the ids.

    A think block that the chat template wrote or began in the prompt is put in front of the text, where it belongs.
    """
    texts, heads = tokenizer.batch_decode(text_ids(tokenizer, rollout)), thinking_heads(tokenizer, rollout.prompt_ids)
    return [heads[i // rollout.group_size] + text for i, text in enumerate(texts)]


def text_ids(tokenizer: Tokenizer, rollout: Rollout) -> list[list[int]]:
    """(B,) the ids of each completion's text: without padding and stops."""
    drop = {tokenizer.eos_token_id, tokenizer.pad_token_id, *rollout.stop_ids}
    rows = zip(rollout.completion_ids.tolist(), rollout.mask.sum(1).tolist(), strict=True)
    return [[token for token in ids[:n] if token not in drop] for ids, n in rows]


def encode_demonstrations(tokenizer, demonstrations: list[Demonstration], system_prompt: str, context: float) -> list:
    """The demonstrations that fit the context, with their token ids. Longer ones are dropped and counted: if they were
    cut, they would lose the answer and the EOS."""
    prompts = encode_prompts(tokenizer, [d.messages or d.question for d in demonstrations], system_prompt)
    sampled = [d.completion_ids for d in demonstrations]
    completions = encode_completions(tokenizer, [d.completion for d in demonstrations], prompts, sampled)
    encoded = [
        replace(d, prompt_ids=tuple(prompt), completion_ids=tuple(completion))
        for d, prompt, completion in zip(demonstrations, prompts, completions, strict=True)
    ]
    fits = [d for d in encoded if len(d.prompt_ids) + len(d.completion_ids) <= context]
    if len(fits) < len(encoded):
        dropped = f"{len(encoded) - len(fits)} of {len(encoded)} demonstrations"
        print(f"note: {dropped} exceed the context of {context}: dropped")
    return fits


# ---- The order in which problems are drawn -------------------------------------------------------------------------


CONTENTS = {  # what an item holds that a run learns from, and its name in an error
    "prompt_ids": "the prompts' tokens",
    "answer": "the answers",
    "completion_ids": "the demonstrations' tokens",
    "chosen_ids": "the chosen completions' tokens",
    "rejected_ids": "the rejected completions' tokens",
    "weight": "the pairs' weights",
}


class ProblemSampler:
    """Draws items: problems, demonstrations or pairs. `state_dict()` holds its whole state, so that a resumed run draws
    what it would have drawn.

    mode "uniform": every item once per epoch, in an order fixed by (seed, epoch).
    "curriculum": uniformly from the easiest items by `difficulty`. Their share grows with the iterations, however many
    draws one takes, and reaches all items after `iterations`.
    "prioritized": with weight 1 - s, at least `floor` (Kimi K1.5, arXiv:2501.12599, section 2.3.4). s is the recent
    success rate. It starts as the problem's `pass_rate` (if unknown: the mean of the known ones); each draw moves it
    halfway to the success rate of the group.

    contents: what a resumed run must find unchanged; None: the items.
    """

    def __init__(
        self,
        items: list,
        mode: str = "uniform",
        seed: int = 0,
        floor: float = 0.05,
        iterations: int = 0,
        contents: list | None = None,
    ):
        if mode not in ("uniform", "curriculum", "prioritized"):
            raise ValueError(f"mode is 'uniform', 'curriculum' or 'prioritized', not {mode!r}")
        if mode == "curriculum" and any(item.difficulty is None for item in items):
            fail("--problem-sampling curriculum: needs problems that all have a difficulty")
        self.items, self.size, self.mode, self.seed, self.floor = items, len(items), mode, seed, floor
        self.contents = items if contents is None else contents
        self.drawn, self.iterations, self.unweighted = 0, max(1, iterations), 0
        self.attempts, self.successes = [0] * self.size, [0.0] * self.size
        rates = {i: getattr(item, "pass_rate", None) for i, item in enumerate(items)}
        known = {i: rate for i, rate in rates.items() if rate is not None}
        mean = sum(known.values()) / len(known) if known else 0.0
        self.rates = [known.get(i, mean) for i in range(self.size)]
        self.epoch, self.order = -1, []

    def draw(self, count: int, iteration: int | None = None) -> list:
        """The next `count` items. iteration: how many the run has finished; a curriculum needs it."""
        if self.mode == "curriculum":
            return [self.items[i] for i in self.draw_easiest(count, iteration)]
        draw = self.draw_uniform if self.mode == "uniform" else self.draw_prioritized
        return [self.items[i] for i in draw(count)]

    def draw_uniform(self, count: int) -> list[int]:
        indices = []
        while len(indices) < count:
            epoch, position = divmod(self.drawn, self.size)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, list(range(self.size))
                random.Random(f"epoch {epoch} {self.seed}").shuffle(self.order)
            part = self.order[position : position + count - len(indices)]
            indices += part
            self.drawn += len(part)
        return indices

    def draw_easiest(self, count: int, iteration: int | None) -> list[int]:
        """Draws uniformly, without replacement, from the easiest iteration / iterations of the items."""
        if iteration is None:
            raise ValueError("a curriculum is paced by iterations: draw(count, iteration)")
        if not self.order:
            self.order = sorted(range(self.size), key=lambda i: self.items[i].difficulty)
        share = min(1.0, max(iteration / self.iterations, count / self.size))
        pool = self.order[: math.ceil(share * self.size)]
        random.Random(f"curriculum {self.drawn} {self.seed}").shuffle(pool)
        self.drawn += count
        return (pool * -(-count // len(pool)))[:count]

    def draw_prioritized(self, count: int) -> list[int]:
        """Weighted draw without replacement: the `count` largest u ** (1 / weight), u uniform (Efraimidis and Spirakis
        2006). Items of weight 0 come last, in random order; `unweighted` counts those drawn."""
        rng = random.Random(f"prioritized {self.drawn} {self.seed}")
        weights = [max(self.floor, 1 - rate) for rate in self.rates]
        keys = [rng.random() ** (1 / weight) if weight > 0 else rng.random() - 1 for weight in weights]
        self.drawn += count
        order = sorted(range(self.size), key=lambda i: -keys[i])
        chosen = (order * -(-count // self.size))[:count]
        self.unweighted += sum(weights[i] == 0 for i in chosen)
        return chosen

    def record(self, problems: list, rates: list[float | None]) -> None:
        """Takes success rates of problems, now or later than their draw; None: unknown. Updates each problem's number
        of draws, its sum of rates and its recent rate."""
        for problem, rate in zip(problems, rates, strict=True):
            if problem not in self.place:
                raise ValueError(f"record: not a problem of this sampler: {str(problem)[:200]}")
            if rate is not None:
                index = self.place[problem]
                self.attempts[index] += 1
                self.successes[index] += rate
                self.rates[index] += (rate - self.rates[index]) / 2

    @functools.cached_property
    def place(self) -> dict:
        """The index of each item."""
        return {item: index for index, item in enumerate(self.items)}

    def summary(self) -> dict[str, float]:
        """The share of problems drawn so far, and their mean success rate over all their draws."""
        rates = [s / n for s, n in zip(self.successes, self.attempts, strict=True) if n]
        values = {"sampler/seen": len(rates) / self.size, "sampler/success_rate": sum(rates) / max(1, len(rates))}
        return values | ({"sampler/unweighted": self.unweighted} if self.mode == "prioritized" else {})

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """A digest of the contents by kind: prompts as token ids, answers, and so on."""
        kinds = [name for name in CONTENTS if hasattr(self.contents[0], name)] if self.contents else []
        content = {name: repr([getattr(item, name) for item in self.contents]) for name in kinds}
        return {name: hashlib.sha256(text.encode(errors="replace")).hexdigest() for name, text in content.items()}

    def state_dict(self) -> dict:
        ledger = {"attempts": list(self.attempts), "successes": list(self.successes), "rates": list(self.rates)}
        counts = {"drawn": self.drawn, "iterations": self.iterations, "unweighted": self.unweighted}
        return ledger | counts | {"digests": self.digests}

    def load_state_dict(self, state: dict) -> None:
        if len(state["attempts"]) != self.size:
            fail(f"--resume: the run had {len(state['attempts'])} problems to draw from, now there are {self.size}")
        if differ := [CONTENTS[name] for name, digest in self.digests.items() if state["digests"].get(name) != digest]:
            what = " and ".join(differ)
            fail(
                f"--resume: {what} are not those of the run: was a file, or a date in the chat template, changed? "
                "Restore it, or start a new run with --model RUN/final or a checkpoint's directory"
            )
        self.drawn, self.unweighted = state["drawn"], state["unweighted"]
        self.iterations = state["iterations"]
        self.attempts, self.successes = list(state["attempts"]), list(state["successes"])
        self.rates = list(state["rates"])
