"""Tiny models and tokenizers for the tests: random weights, built in code, nothing downloaded."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

WORDS = "the a good bad movie was is not very fun dull I like hate this plot and great awful Human Bot"
WORDS = WORDS.split()
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@contextmanager
def accelerate_on(device: str) -> Iterator[None]:
    """Let Accelerate, and so the trainers and ``generate``, choose ``device`` whatever this machine has.

    Accelerate chooses once per process: what it chose is forgotten before and after.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", device)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def tiny_tokenizer(pad_is_eos=False, *, chat=False, bos=False):
    """A byte-level BPE tokenizer of about 370 tokens that knows ``WORDS`` and can spell any other text.

    ``pad_is_eos``: the pad token is the end token. ``chat``: with a chat template. ``bos``: it puts ``<bos>`` first,
    as Llama's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<eos>", "<bos>"]
    vocab = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = []
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    if bos:
        fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<eos>" if pad_is_eos else "<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=[] if not pad_is_eos else ["<pad>"],
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def tiny_gpt2(tokenizer=None, seed=0, **overrides):
    """A GPT-2 of two layers, in training mode, with GPT-2's own dropout of 0.1 unless overridden."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128, "initializer_range": 0.2}
    return _build(GPT2LMHeadModel, GPT2Config, tokenizer, seed, sizes, overrides)


def tiny_llama(tokenizer=None, seed=0, **overrides):
    """A Llama of two layers with grouped key-value heads, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
    return _build(LlamaForCausalLM, LlamaConfig, tokenizer, seed, sizes, overrides)


def _build(model_class, config_class, tokenizer, seed, sizes, overrides):
    tokenizer = tokenizer or tiny_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config_class(vocab_size=len(tokenizer), **(ids | sizes | overrides)))
