"""benchmarks/gpu.py on a CPU: it prints all its rows, and it notices a wrong decoder."""

import pytest
import torch

import common
from benchmarks import gpu
from plumbing.engine import GroupDecoder, batch_class

ARGS = gpu.Args(sizes=["mini"], rows=[16], new_tokens=8, device="cpu")


@pytest.mark.slow
def test_all_is_well_here(capsys):
    gpu.main(ARGS)
    printed = capsys.readouterr().out
    for row in ("fast path, bfloat16", "gap of sampler and trainer", "packed gradients", "equal completions, second"):
        assert any(line.startswith(row) and line.endswith(" ok") for line in printed.splitlines()), row
    for row in ("sampling mini, 16 rows", "GRPO step mini, 2 x 8 x 8", "peak memory mini", "save and resume mini"):
        assert row in printed
    assert "x generate" in printed and "GB computed" in printed and "BAD" not in printed


def test_a_decoder_that_is_off_is_noticed(tmp_path, monkeypatch):
    """Catches: a check that always passes."""
    step = GroupDecoder.compute

    def one_late(decoder, tokens, positions):
        return step(decoder, tokens, positions + 1)

    monkeypatch.setattr(GroupDecoder, "compute", one_late)
    # the trial at load would not choose it
    monkeypatch.setattr(common, "decoder_class", lambda model: batch_class(model) and GroupDecoder)
    mini = gpu.make_model(tmp_path, "mini")
    (row,) = gpu.check_gap(mini, torch.device("cpu"))
    assert row.good is False and "ratios are noise" in row.meaning
