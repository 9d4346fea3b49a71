"""The checks A, B and C, and what a trainer's adapter gives them.

An adapter is any object with a `name`, a `formula` (what the trainer says that it computes), and `step(case)`: it makes
the case's step of plain SGD (learning rate 1) and returns a Step. A case that the trainer can't make raises
NotImplementedError with the reason.
"""

import copy
import functools
import itertools
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from conformance import exact, toy
from conformance.exact import Formula, Rows, World
from conformance.toy import EOS, Case, Exact

TOLERANCE = 1e-4  # norm of the update's error / norm of the exact update; fp32 leaves some 1e-6
LEVEL = 1e-3  # check B finds something where the sample's p-value is below this
SAMPLES = 1000  # completions for each prompt in check B


@dataclass
class Step:
    """One row for each completion: groups of case.group_size, one after another; DPO: chosen, rejected, chosen, ..."""

    prompts: list[int]  # index into case.texts
    completions: list[list[int]]  # ids as sampled, EOS included
    rewards: list[float | None]  # as the trainer saw them
    model: nn.Module  # after the step
    values: list[list[float]] | None = None  # the critic's, at sampling time


@dataclass
class Result:
    check: str
    holds: bool | None  # None: not run
    line: str


def rows_of(case: Case, step: Step) -> Rows:
    """The step's rows as the formulas need them. ValueError if they are not groups of the case's prompts."""
    size, count = (1, len(case.data)) if case.data else (case.group_size, len(case.texts) * case.group_size)
    if len(step.prompts) != count or len(step.completions) != count:
        raise ValueError(f"{len(step.completions)} completions came back, not {count}")
    groups = [i // size for i in range(count)]
    if not case.data and any(step.prompts[i] != step.prompts[group * size] for i, group in enumerate(groups)):
        raise ValueError("completions of different prompts stand in one group")
    for ids in step.completions:
        if case.second_turn and (len(ids) != 2 + len(case.second_turn) or ids[1:-1] != case.second_turn):
            raise ValueError(f"{ids} is not one token, the second turn {case.second_turn}, and one token")
        if not (case.second_turn or case.data) and not (1 <= len(ids) <= case.max_new_tokens and EOS not in ids[:-1]):
            raise ValueError(f"{ids} is no completion of 1 to {case.max_new_tokens} tokens that ends at its first EOS")
    trained = [[True] * len(ids) for ids in step.completions]
    for row in trained if case.second_turn else []:
        row[1 : 1 + len(case.second_turn)] = [False] * len(case.second_turn)
    finished = [ids[-1] == EOS for ids in step.completions]
    values = step.values or [[0.0] * len(ids) for ids in step.completions]
    prompts = [case.prompts[i] for i in step.prompts]
    return Rows(prompts, step.completions, step.rewards, groups, trained, finished, values)


def difference(update: Tensor, expected: Tensor) -> float:
    return ((update - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@dataclass
class Seen:
    """A trainer's step, and the worlds to compare it with. base: what check A found, if not the stated formula."""

    case: Case  # with models that the trainer did not touch
    rows: Rows
    update: Tensor  # all parameters' change, in one vector
    formula: Formula
    base: World | None

    @staticmethod
    def of(adapter, case: Case, base: World | None = None) -> "Seen":
        own = replace(case, model=copy.deepcopy(case.model), reference=copy.deepcopy(case.reference))
        step = adapter.step(case)
        before, after = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (own.model, step.model))
        return Seen(own, rows_of(own, step), after.double() - before.double(), adapter.formula, base)

    def expected(self, world: World | None = None) -> Tensor:
        formula, rows = self.formula, self.rows
        for change in filter(None, (self.base, world)):
            formula, rows = change.change(formula, rows, self.case)
        if max(map(len, rows.completions)) > toy.T or not all(rows.prompts):
            return torch.full_like(self.update, torch.nan)  # not enumerated: no update equals it
        return exact.exact_update(formula, self.case, rows)

    @functools.cached_property
    def wanted(self) -> Tensor:
        """The exact update, if the trainer computes what it says or what check A found."""
        return self.expected()

    def explain(self, prefer: tuple[str, ...] = (), pairs: bool = True) -> tuple[float, str, World | None]:
        """The update's error, what it is instead ("" if it is exact), and in which world it would be exact.
        prefer: beginnings of the lines to try first. pairs: try two worlds at once too, which takes a second."""
        wanted = self.wanted
        error = difference(self.update, wanted)
        if error < TOLERANCE:
            return error, "", None
        if not self.update.isfinite().all():
            return error, "the update is NaN or infinite", None
        if not self.update.any():
            return error, "the update is exactly zero", None
        worlds = sorted(exact.WORLDS, key=lambda world: not world.line.startswith(prefer or "\0"))
        other = []  # worlds in which the update would be another one
        for world in [*worlds, *map(at_temperature, exact.TEMPERATURES)]:
            expected = self.expected(world)
            if difference(self.update, expected) < TOLERANCE:
                return error, world.line, world
            other += [world] if world in worlds and difference(expected, wanted) > TOLERANCE else []
        scale = (self.update @ wanted / (wanted @ wanted)).item()
        if difference(self.update, scale * wanted) < TOLERANCE * abs(scale):
            return error, f"gradient is {scale:.4g} times the exact one", None
        for world in itertools.starmap(both, itertools.combinations(other if pairs else [], 2)):
            if difference(self.update, self.expected(world)) < TOLERANCE:
                return error, world.line, world
        cosine = torch.cosine_similarity(self.update, wanted, dim=0).item()
        return (
            error,
            f"unexplained: cosine {cosine:.3f}, length {(self.update.norm() / wanted.norm()).item():.3f}",
            None,
        )


def both(one: World, two: World) -> World:
    return World(f"{one.line}; {two.line}", lambda f, rows, case: two.change(*one.change(f, rows, case), case))


def at_temperature(t: float) -> World:
    return World(f"differentiated at T {t:g}", lambda f, rows, case: (replace(f, temperature=t), rows))


# ---- A: the update -------------------------------------------------------------------------------------------------

RL, PAIRS = ("pg", "ppo", "grpo", "kimi"), ("dpo", "ipo", "simpo")
GIVEN = (*PAIRS, "sft")  # objectives of given completions: nothing is sampled
# Chosen, rejected, ...: (prompt, completion). Decoding and encoding changes none, and none merges with its prompt.
DATA = [(0, [toy.A, toy.A, EOS]), (0, [toy.AB, EOS]), (1, [toy.B, toy.A, EOS]), (1, [toy.A, EOS])]
DATA += [(2, [toy.B, EOS]), (2, [toy.AB, toy.B, EOS])]
MERGED = [(0, [toy.A, toy.B, EOS]), (0, [toy.B, EOS]), *DATA[2:]]  # "ab" in a completion, and across the prompt's end
CUT = [(0, [toy.A, toy.A]), *DATA[1:3], (1, [toy.A]), *DATA[4:]]  # no EOS: the length limit cut them


def case_for(formula: Formula, changes: dict) -> Case:
    return Case(**({"data": DATA} if formula.objective in GIVEN else {}) | changes)


def check_update(adapter) -> tuple[Result, World | None]:
    """Check A, and the world that was found if the update is another formula's."""
    try:
        error, line, world = Seen.of(adapter, case_for(adapter.formula, {})).explain()
    except ValueError as wrong:
        return Result("A update", False, str(wrong)), None
    return Result("A update", not line, line or f"holds ({error:.0e})"), world


# ---- B: the sampler ------------------------------------------------------------------------------------------------


def p_value(counts: Counter, probabilities: dict[tuple, float]) -> float:
    """Of Pearson's chi-square test. Cells that expect fewer than 5 are one cell. 0 if something impossible was seen."""
    total, cells, rest = counts.total(), [], [0, 0.0]
    if any(probabilities.get(ids, 0.0) == 0.0 for ids in counts):
        return 0.0
    for ids, p in probabilities.items():
        if total * p >= 5:
            cells.append((counts[ids], total * p))
        else:
            rest = [rest[0] + counts[ids], rest[1] + total * p]
    cells += [tuple(rest)] if rest[1] > 0 else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def top_k(k: int):
    return lambda logp: logp.masked_fill(logp < logp.topk(k).values[..., -1:], -torch.inf)


def top_p(p: float):
    def cut(logp: Tensor) -> Tensor:
        probs, order = logp.exp().sort(-1, descending=True)
        drop = (probs.cumsum(-1) - probs >= p).gather(-1, order.argsort(-1))
        return logp.masked_fill(drop, -torch.inf)

    return cut


@torch.no_grad()
def sampling_p_value(seen: Seen, temperature: float, cut=None, extra_bos: bool = False) -> float:
    """How well the completions fit the enumerated distribution: the prompts' smallest p-value times their number.
    cut: what a sampler does to the log-probabilities, such as top_k(3)."""
    values = []
    for prompt in {tuple(prompt) for prompt in seen.rows.prompts}:
        mine = Counter(
            tuple(c) for p, c in zip(seen.rows.prompts, seen.rows.completions, strict=True) if tuple(p) == prompt
        )
        model = Exact(Exact.of(seen.case.model), [prompt[0]] * extra_bos + list(prompt), temperature)
        if cut is not None:
            model.steps = tuple(cut(step).log_softmax(-1) for step in model.steps)
        exact_probabilities = {ids: p.item() for ids, p in model.distribution(seen.case.max_new_tokens).items()}
        values.append(p_value(mine, exact_probabilities))
    return min(1.0, min(values) * len(values))


def check_sampling(adapter, base: World | None) -> Result:
    """Check B at temperatures 1 and 0.7."""
    if same := getattr(adapter, "sampler", None):
        return Result("B sampling", None, f"the sampler of {same}")
    values = []
    for temperature in (1.0, 0.7):
        case = Case(group_size=SAMPLES, temperature=temperature)
        try:
            seen = Seen.of(adapter, case, base)
        except NotImplementedError as reason:
            return Result("B sampling", None, str(reason))
        values.append(sampling_p_value(seen, temperature))
        if values[-1] < LEVEL:
            return Result("B sampling", False, what_was_sampled(seen, temperature))
    return Result("B sampling", True, f"holds (p {min(values):.2f} at level {LEVEL:g})")


def what_was_sampled(seen: Seen, stated: float) -> str:
    found = [(f"sampled at T {t:g}", {"temperature": t}) for t in exact.TEMPERATURES]
    found += [(f"sampled from the {k} likeliest tokens", {"cut": top_k(k)}) for k in range(1, toy.V)]
    found += [(f"sampled with top-p {p:g}", {"cut": top_p(p)}) for p in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)]
    found += [("sampled after a prompt that begins with two BOS", {"extra_bos": True})]
    fits = [(sampling_p_value(seen, **({"temperature": stated} | options)), line) for line, options in found]
    best, line = max(fits)
    if best < LEVEL:
        p = sampling_p_value(seen, stated)
        return (
            f"frequencies are not those of the softmax at T {stated:g} (p {p:.0e}), nor of another temperature or top-p"
        )
    if "BOS" in line:
        return line
    for t in [stated, *exact.TEMPERATURES]:
        if difference(seen.update, seen.expected(at_temperature(t))) < TOLERANCE:
            whole = " of the whole distribution" if "top-p" in line or "likeliest" in line else ""
            return f"{line}, differentiated at T {t:g}{whole}"
    return line


# ---- C: invariances ------------------------------------------------------------------------------------------------


@dataclass
class Invariance:
    """A check of type C: the update is still exact when the case changes. wrong: the beginnings of worlds' lines that
    would show in these cases; a check in which they don't show says nothing, and takes another seed."""

    name: str
    objectives: tuple[str, ...]
    cases: list
    wrong: tuple[str, ...] = ()
    otherwise: str = ""  # what an unexplained difference means here


INVARIANCES = [
    Invariance("micro-batches", (*RL, *GIVEN), [{"micro_batch": 1}, {"micro_batch": 4}, {"micro_batch": 5}]),
    Invariance("order of rows", ("grpo", "kimi"), [{"texts": ("bb", "a", "bab", "a")}], ("groups hold",)),
    Invariance("order of rows", ("pg", "ppo"), [{"texts": ("bb", "a", "bab", "a")}]),
    Invariance("order of rows", GIVEN, [{"data": DATA[4:] + DATA[:4]}]),
    Invariance(
        "padding",
        (*RL, *GIVEN),
        [{"texts": ("a", "bbabbbaab", "bb")}, {"learned": True, "texts": ("a", "bbabbbaab", "bb")}],
    ),
    Invariance("pad id", (*RL, *GIVEN), [{"pad": "<eos>"}, {"pad": "<bos>"}]),
    Invariance("old logprobs", ("grpo", "ppo"), [{"updates": 3, "reward_scale": 4.0}], ("every ratio", "no ratio is")),
    Invariance("old logprobs", ("kimi",), [{"updates": 3}], ("every ratio",)),
    Invariance("temperature", RL, [{"temperature": 0.7}], ("differentiated at T 1 ",)),
    Invariance("EOS", (*RL, *GIVEN), [{"max_new_tokens": 1}], ("EOS is not",)),
    Invariance("truncated", RL, [{"truncated": "mask"}], ("completions that the length limit",)),
    Invariance("truncated", GIVEN, [{"data": CUT}], ("an EOS is",)),
    Invariance("token ids", GIVEN, [{"data": MERGED}], ("trained tokens",)),
    Invariance("second turn", RL, [{"second_turn": [toy.B]}], ("the tokens of",)),
    Invariance(
        "KL", ("grpo", "ppo"), [{"kl_coef": 0.3, "updates": 2}, {"kl_coef": 0.3}], ("the KL's sign", "there is no")
    ),
    Invariance("no reward", RL, [{"unscored": True}], ("completions without a reward are",)),
    Invariance("dropout", (*RL, *GIVEN), [{"dropout": 0.5}], (), "dropout is on in the update, not in sampling"),
]


def make_case(formula: Formula, changes: dict) -> Case:
    """A case from its changes, which may name a model and a tokenizer by their properties."""
    changes = dict(changes)
    learned, dropout, pad = changes.pop("learned", False), changes.pop("dropout", 0.0), changes.pop("pad", "<pad>")
    positions = "learned" if learned else "rotary"
    models = {"model": toy.make_model(positions, 0, dropout), "reference": toy.make_model(positions, 1, dropout)}
    return case_for(formula, models | {"tokenizer": toy.make_tokenizer(pad)} | changes)


def check_invariance(adapter, check: Invariance, base: World | None) -> Result:
    name, errors, reasons = f"C {check.name}", [], []
    for changes in check.cases:
        try:
            for seed in range(8):
                seen = Seen.of(adapter, make_case(adapter.formula, changes | {"seed": seed}), base)
                error, line, _ = seen.explain(check.wrong, pairs=not check.otherwise)
                if line:
                    mine = check.otherwise and line.startswith("unexplained")
                    return Result(name, False, check.otherwise if mine else line)
                if all(shows(seen, beginning) for beginning in check.wrong):
                    break
            else:
                return Result(name, None, "says nothing: a wrong update would have been the same in eight seeds")
            errors.append(error)
        except NotImplementedError as reason:
            reasons.append(str(reason))
        except ValueError as wrong:
            return Result(name, False, str(wrong))
    if not errors:
        return Result(name, None, reasons[0])
    part = f", {len(errors)} of {len(check.cases)} cases: {reasons[0]}" if reasons else ""
    return Result(name, True, f"holds ({max(errors):.0e}{part})")


def shows(seen: Seen, beginning: str) -> bool:
    """True if the update would have been another one in that wrong world."""
    world = next(w for w in [*exact.WORLDS, at_temperature(1.0)] if w.line.startswith(beginning.rstrip()))
    return difference(seen.expected(world), seen.wanted) > 10 * TOLERANCE


def check_all(adapter) -> list[Result]:
    """Checks A, B and C. If the update is another formula's than the stated one, the others go on from that."""
    first, base = check_update(adapter)
    results = [first]
    if adapter.formula.objective not in GIVEN:
        results.append(check_sampling(adapter, base))
    if not first.holds and base is None:
        return results  # an update that is not understood has no invariances
    for check in INVARIANCES:
        if adapter.formula.objective in check.objectives:
            results.append(check_invariance(adapter, check, base))
    return results
