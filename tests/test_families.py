"""Families of causal language models, tiny and random: exact, or refused in one line. See families.py."""

import families
import pytest
from conftest import slow_case

# Plain attention with rotary, learned and ALiBi positions, fused projections, windows, caps, experts, a recurrence, an
# attention of its own.
DIFFERENT = ["llama", "gpt2", "bloom", "gpt_neox", "phi3", "qwen3_moe", "gemma2", "gemma3", "mamba", "diffllama"]
OTHERS = [name for name in [*families.FAMILIES, *families.VARIANTS] if name not in DIFFERENT]
SOME = OTHERS[::24]  # python tests/families.py tries all of them, in some eight minutes


@pytest.mark.parametrize("name", [*DIFFERENT, *map(slow_case, SOME)])
def test_a_family_is_exact_or_refused_in_one_line(name):
    """Catches: a family whose cache, positions, window, head or layers our batches don't fit, in sampling, logprobs,
    gradients, checkpointed layers, saved files, values or scores; a traceback instead of a line."""
    verdict = families.check_apart(name) if name in OTHERS else families.check(name)
    assert verdict.kind not in ("crash", "wrong"), verdict.why
    assert verdict.kind != "unbuildable" or name in OTHERS, verdict.why
