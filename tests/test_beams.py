"""Diverse beam search against a search in plain Python, greedy decoding and transformers' own beam search."""

import math

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from rlhf_fast import beams
from rlhf_fast.beams import diverse_beams
from rlhf_fast.data import pad
from rlhf_fast.generate import decode
from rlhf_fast.models import forward

TOKENIZER = tiny_tokenizer()
PAD = TOKENIZER.pad_token_id
PROMPTS = [TOKENIZER(text)["input_ids"] for text in (" the movie was", " I", " this plot is not very")]
STOPS = list(range(1, len(TOKENIZER), 6))


def search(model, prompts=PROMPTS, *, stops=STOPS, longest=6, **options):
    ids, mask = pad(prompts, PAD, side="left")
    return diverse_beams(model, ids, mask, max_new_tokens=longest, stop_ids=stops, pad_id=PAD, **options)


def responses(found):
    """[B][N] lists of tokens."""
    return [
        [ids[mask].tolist() for ids, mask in zip(*row, strict=True)]
        for row in zip(found.responses, found.mask, strict=True)
    ]


def one_by_one(model, prompt, *, groups, width, diversity, longest, length_penalty=1.0):
    """The same search over lists, a full forward pass for every beam and token."""
    running, ended = [[([], 0.0)] for _ in range(groups)], [[] for _ in range(groups)]
    for step in range(longest):
        taken = []
        for g in range(groups):
            if len(ended[g]) == width:
                continue
            candidates = []
            for said, total in running[g]:
                logp = model(torch.tensor([prompt + said])).logits[0, -1].log_softmax(-1).tolist()
                for token, value in enumerate(logp):
                    plain = total + value
                    candidates.append((plain - diversity * taken.count(token), plain, [*said, token]))
            candidates.sort(key=lambda c: -c[0])
            best = candidates[:width]
            for _, plain, said in best:
                if said[-1] in STOPS or step == longest - 1:
                    ended[g].append((plain / len(said) ** length_penalty, said))
            ended[g] = sorted(ended[g], key=lambda e: -e[0])[:width]
            taken_now = [said[-1] for _, _, said in best]
            running[g] = [(said, plain) for _, plain, said in candidates if said[-1] not in STOPS][:width]
            taken += taken_now
    return [e for group in ended for e in group]


@pytest.fixture(scope="module", params=[tiny_gpt2, tiny_llama])
def model(request):
    return request.param(TOKENIZER, initializer_range=0.35).double().eval()


@pytest.mark.parametrize(
    ("groups", "width", "diversity"), [(1, 1, 0.0), (4, 1, 1.5), (2, 2, 1.0), (3, 2, 4.0), (1, 3, 9.0), (3, 1, 0.0)]
)
def test_it_is_the_search_beam_by_beam(model, groups, width, diversity):
    found = search(model, beams=groups * width, groups=groups, diversity=diversity)
    said = responses(found)
    with torch.no_grad():
        for b, prompt in enumerate(PROMPTS):
            expected = one_by_one(model, prompt, groups=groups, width=width, diversity=diversity, longest=6)
            assert said[b] == [ids for _, ids in expected]
            assert found.scores[b].tolist() == pytest.approx([score for score, _ in expected], rel=1e-9)
            assert found.ended[b].tolist() == [ids[-1] in STOPS for _, ids in expected]
    assert (found.responses[~found.mask] == PAD).all()


def test_the_cases_above_stop_early_differ_and_run_out(model):
    """Or they would hold of less than they seem to."""
    found = search(model, beams=4, groups=4, diversity=1.5)
    assert 0 < found.ended.float().mean() < 1
    assert all(len({tuple(ids) for ids in row}) > 1 for row in responses(found))
    same = search(model, beams=4, groups=4, diversity=0.0)
    assert all(len({tuple(ids) for ids in row}) == 1 for row in responses(same))


def test_one_beam_is_greedy(model):
    ids, mask = pad(PROMPTS, PAD, side="left")
    greedy = decode(model, ids, mask, max_new_tokens=20, stop_ids=STOPS, pad_id=PAD, temperature=0.0)
    found = search(model, beams=1, longest=20)
    assert responses(found) == [[row[m].tolist()] for row, m in zip(greedy.responses, greedy.mask, strict=True)]
    assert torch.equal(found.ended[:, 0], greedy.ended)


@pytest.mark.parametrize("length_penalty", [1.0, 0.5])
def test_one_group_is_the_beam_search_of_transformers(model, length_penalty):
    found = search(model, beams=4, groups=1, longest=12, length_penalty=length_penalty)
    ids, mask = pad(PROMPTS, PAD, side="left")
    theirs = model.generate(
        input_ids=ids, attention_mask=mask.long(), num_beams=4, num_return_sequences=4, early_stopping=True,
        max_new_tokens=12, eos_token_id=STOPS, pad_token_id=PAD, do_sample=False, length_penalty=length_penalty,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert found.scores.flatten().tolist() == pytest.approx(theirs.sequences_scores.tolist(), rel=1e-6)
    said = theirs.sequences[:, ids.shape[1] :].view(3, 4, -1)
    # After the end it pads with the first of the stop tokens.
    assert torch.equal(said[..., : found.responses.shape[2]].where(found.mask, torch.tensor(PAD)), found.responses)


def test_a_row_does_not_depend_on_its_neighbours_or_the_padding(model):
    alone = [responses(search(model, [prompt], beams=4, groups=2))[0] for prompt in PROMPTS]
    assert responses(search(model, beams=4, groups=2)) == alone


def test_the_model_is_left_as_it_was_and_its_cache_is_not_needed(monkeypatch):
    model = tiny_gpt2(TOKENIZER)
    found = search(model, beams=4, groups=2)
    assert model.training

    def without_cache(model, ids, mask, **extra):
        assert extra.pop("past_key_values", None) is None
        return forward(model, ids, mask, **extra | {"use_cache": False})

    monkeypatch.setattr(beams, "forward", without_cache)
    assert responses(search(model, beams=4, groups=2)) == responses(found)


def test_what_cannot_be_searched():
    model = tiny_gpt2(TOKENIZER)
    with pytest.raises(ValueError, match="5 beams cannot form 2 groups of the same size"):
        search(model, beams=5, groups=2)
    with pytest.raises(ValueError, match="0 beams cannot form 0 groups"):
        search(model, beams=0)
    with pytest.raises(ValueError, match="diversity must be at least 0, got nan"):
        search(model, beams=2, diversity=math.nan)
    with pytest.raises(ValueError, match="context of 128"):
        search(model, beams=2, longest=126)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN or infinite for prompt 1 of 3"):
        search(model, beams=2)
