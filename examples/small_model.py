"""A language model of a few thousand weights and its tokenizer, made in code, for examples that run in seconds."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = [
    "the",
    "this",
    "movie",
    "plot",
    "was",
    "is",
    "it",
    "very",
    "not",
    "good",
    "great",
    "fun",
    "bad",
    "dull",
    "awful",
]
SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<end>"}


def small_model(seed: int = 0):
    """A random GPT-2 of two layers, and a tokenizer of ``WORDS``."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)
    torch.manual_seed(seed)
    end = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": len(vocabulary)}
    return GPT2LMHeadModel(GPT2Config(**sizes, **end)), tokenizer


def praise(prompts, responses, **_columns):
    """A reward: words of praise less words of blame."""
    good, bad = {"good", "great", "fun"}, {"bad", "dull", "awful"}
    return [float(sum((w in good) - (w in bad) for w in response.split())) for response in responses]


def mean_praise(model, tokenizer, prompts):
    """What ``praise`` gives on the average for what ``model`` writes."""
    import rlhf_fast as rf

    asked = [record["prompt"] for record in prompts] * 16
    written = rf.generate(model, asked, tokenizer=tokenizer, max_new_tokens=6, seed=0)
    return sum(praise(asked, written)) / len(asked)


PROMPTS = [{"prompt": f"{a} {b} {c}"} for a in ("the", "this") for b in ("movie", "plot") for c in ("was", "is")]
