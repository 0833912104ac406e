"""Packed sequences have the logits that they have alone; the rows are few and always the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_gpt2, tiny_llama

from rlhf_fast import dispatch
from rlhf_fast.models import token_logits
from rlhf_fast.packing import check_packing, first_fit, pack, packed_logits, prefer_varlen, uses_varlen

CPU = torch.device("cpu")
SEQUENCES = [([5, 9, 3, 7], [False, True, True, True]), ([8], [True]), ([6, 6], [True, True]), ([4] * 7, [True] * 7)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 25))
def test_every_sequence_is_in_one_row_that_holds_it(lengths, room):
    rows = first_fit(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for n, row in enumerate(rows):
        assert len(row) == 1 or sum(lengths[i] for i in row) <= room
        for earlier in rows[:n]:  # or it would stand there
            assert sum(lengths[i] for i in earlier) + lengths[row[0]] > room
    assert rows == first_fit(lengths, room)


def test_first_fit_by_hand():
    assert first_fit([2, 5, 4, 7, 1, 3, 8], 10) == [[6, 0], [3, 5], [1, 2, 4]]


def test_positions_and_masks_by_hand():
    packed = pack([SEQUENCES[:2], SEQUENCES[2:3]], 0, CPU)
    assert packed.ids.tolist() == [[5, 9, 3, 7, 8], [6, 6, 0, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert packed.at.tolist() == [0, 1, 2, 5]  # 8 and the first 6 are the first of their sequences
    assert packed.targets.tolist() == [9, 3, 7, 6]
    flat = pack([SEQUENCES[:2], SEQUENCES[2:3]], 0, CPU, flat=True)
    assert flat.ids.tolist() == [[5, 9, 3, 7, 8, 6, 6]]
    assert flat.positions.tolist() == [[0, 1, 2, 3, 0, 0, 1]]
    assert (flat.at.tolist(), flat.targets.tolist()) == ([0, 1, 2, 5], [9, 3, 7, 6])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("flat", [False, True])
def test_no_sequence_sees_another(make, flat, attention):
    model = make().double().eval()
    model.set_attn_implementation(attention)
    packed = pack([SEQUENCES[:3], SEQUENCES[3:]], 0, CPU, flat=flat)
    found = packed_logits(model, packed)
    expected = []
    for ids, mask in SEQUENCES:
        logits = token_logits(model, torch.tensor([ids]), torch.ones(1, len(ids)).bool())[0]
        expected += [logits[i - 1] for i in range(1, len(ids)) if mask[i]]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-10)


def test_a_model_whose_sequences_would_see_each_other_is_refused():
    model = tiny_gpt2()
    check_packing(model)
    assert model.training
    # With a mask, transformers does not look at the positions.
    forward = model.transformer.forward
    model.transformer.forward = lambda input_ids, **more: forward(
        input_ids, **more | {"attention_mask": torch.ones_like(input_ids)}
    )
    with pytest.raises(ValueError, match="the sequences of GPT2LMHeadModel see each other when they are packed"):
        check_packing(model)
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM takes no position_ids"):
        check_packing(bloom)


@pytest.mark.parametrize(
    ("device", "precision", "installed", "chosen"),
    [
        ("cuda", "bf16", True, True),
        ("cuda", "bf16", False, False),
        ("cuda", "fp32", True, False),
        ("cpu", "bf16", True, False),
    ],
)
def test_flash_attn_is_asked_for_where_it_can_run(monkeypatch, device, precision, installed, chosen):
    model = tiny_llama()
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object() if installed else None)
    asked = []
    monkeypatch.setattr(model, "set_attn_implementation", asked.append)
    prefer_varlen(model, torch.device(device), precision)
    assert asked == ["flash_attention_2"] * chosen
    assert not uses_varlen(model)
    model.config._attn_implementation = "flash_attention_2"
    assert uses_varlen(model)
