"""Given answers as tensors, by hand; padding moves no number."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama

from rlhf_fast.trainers import offline

CPU = torch.device("cpu")
PADDED = SimpleNamespace(precision="fp32", packing=False)
SEQUENCES = [[5, 6, 7, 8, 9], [4, 3], [8, 8, 8]]
MASKS = [[False, False, True, False, True], [True, True], [False] * 3]


def test_collate_by_hand():
    """An answer begins with the first token that counts, but for the very first; what follows may have holes."""
    found = offline.collate(SEQUENCES, MASKS, 0, CPU)
    assert found.ids.tolist() == [[0, 5, 6, 7, 8, 9], [0, 0, 4, 3, 0, 0], [8, 8, 8, 0, 0, 0]]
    assert found.attention.long().tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert found.responses.tolist() == [[7, 8, 9], [3, 0, 0], [0, 0, 0]]
    assert found.mask.tolist() == [[True, False, True], [True, False, False], [False] * 3]
    part = found.select(torch.tensor([1]))
    assert part.responses.tolist() == [[3, 0, 0]]
    assert offline.answered([1, 2, 3], 2) == [False, False, True]


def test_answers_without_a_token_that_counts():
    found = offline.collate([[1, 2], [3]], [[False, False], [True]], 0, CPU)
    assert found.mask.shape == (2, 0)
    assert offline.logprobs(tiny_gpt2(), found, PADDED).shape == (2, 0)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("pad_id", [0, 7])
def test_logprobs_are_those_of_each_sequence_alone(make, pad_id):
    model = make().double().eval()
    found = offline.logprobs(model, offline.collate(SEQUENCES, MASKS, pad_id, CPU), PADDED)
    for row, ids, mask in zip(found, SEQUENCES, MASKS, strict=True):
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [table[i - 1, ids[i]].item() for i in range(1, len(ids)) if mask[i]]
        assert row[row != 0].tolist() == pytest.approx(expected, abs=1e-12)
