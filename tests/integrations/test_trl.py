"""rf.patch("trl"): every replaced function against TRL's own, and its trainers for a few steps with and without."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import agree, needs, results_and_gradients
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

import rlhf_fast as rf

needs("trl")

from importlib.metadata import version  # noqa: E402

import trl  # noqa: E402
import trl.trainer.utils as utils  # noqa: E402

from rlhf_fast.integrations.patching import release  # noqa: E402

VERSION = release(version("trl"))
HEAD = "_ChunkedLogProbFunction"
THEIRS = {name: value for name, value in vars(utils).items() if name.startswith(("sel", "ent", "_Chunked"))}


@pytest.fixture(scope="module")
def ours():
    """The functions of TRL's module as a patch leaves them, by name."""
    with rf.patch("trl"):
        return {name: getattr(utils, name) for name in THEIRS}


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40))


def logits_and_ids(shape, seed, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator)
    return logits.to(dtype), torch.randint(shape[-1], shape[:-1], generator=generator)


@settings(max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 2**20), scale=st.sampled_from([0.1, 3.0, 30.0]))
def test_selected_logprobs_and_entropy(ours, shape, seed, scale):
    logits, ids = logits_and_ids(shape, seed, scale)
    for name in ("selective_log_softmax", "entropy_from_logits"):
        rest = (ids,) if name.startswith("sel") else ()
        agree(lambda z, f=name, r=rest: ours[f](z, *r), lambda z, f=name, r=rest: THEIRS[f](z, *r), logits)


@settings(max_examples=20)
@given(shape=SHAPES, seed=st.integers(0, 2**20), k=st.integers(1, 4))
def test_several_ids_of_each_row(ours, shape, seed, k):
    logits, _ = logits_and_ids(shape, seed)
    ids = torch.randint(shape[-1], (*shape[:-1], k), generator=torch.Generator().manual_seed(seed))
    f = "selective_log_softmax"
    agree(lambda z: ours[f](z, ids), lambda z: THEIRS[f](z, ids), logits)


@pytest.mark.skipif(VERSION < (1, 14, 0), reason="TRL has these arguments since 1.14")
@settings(max_examples=20)
@given(shape=SHAPES, seed=st.integers(0, 2**20), t=st.sampled_from([0.5, 1.0, 1.7]), wants=st.booleans())
def test_temperature_and_row_mask(ours, shape, seed, t, wants):
    logits, ids = logits_and_ids(shape, seed)
    mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(seed)) < 0.7
    f, both = "selective_log_softmax", "selective_log_softmax_and_entropy"
    agree(lambda z: ours[f](z, ids, t, mask), lambda z: THEIRS[f](z, ids, t, mask), logits)
    agree(lambda z: ours[both](z, ids, wants, t, mask), lambda z: THEIRS[both](z, ids, wants, t, mask), logits)
    for functions in (ours, THEIRS):
        with pytest.raises(ValueError, match="temperature must be"):
            functions[f](logits, ids, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_is_nearer_to_the_truth(ours, dtype):
    logits, ids = logits_and_ids((2, 50, 300), 0, dtype=dtype)
    true = logits.double().log_softmax(-1)
    for name, rest, truth in (
        ("selective_log_softmax", (ids,), true.gather(-1, ids[..., None])[..., 0]),
        ("entropy_from_logits", (), -(true.exp() * true).sum(-1)),
    ):
        mine, its = ours[name](logits, *rest), THEIRS[name](logits, *rest)
        assert mine.dtype == its.dtype == dtype
        assert (mine - truth).abs().max() <= (its - truth).abs().max()


@pytest.mark.parametrize(("kernel", "dtype"), [(None, torch.bfloat16), (print, torch.float32)])
def test_the_dtype_is_that_of_trls_kernel_where_it_would_run(ours, monkeypatch, kernel, dtype):
    """1.14 and 1.15 say so by a name that is None; 1.16, without Triton, by one that is absent; before, by none."""
    monkeypatch.setattr(utils, "_fused_logprob_entropy", kernel, raising=False)
    monkeypatch.setattr(utils, "_supports_trl_loss_kernel", lambda *_: True, raising=False)
    monkeypatch.delattr(utils, "is_triton_available", raising=False)
    logits, ids = logits_and_ids((2, 3, 11), 0, dtype=torch.bfloat16)
    assert ours["selective_log_softmax"](logits, ids).dtype == dtype
    assert ours["entropy_from_logits"](logits).dtype == dtype


def head_arguments(hidden, weight, bias, ids, temperature, softcap, scale, outputs=None):
    rest = (ids, temperature, 32, softcap, scale)
    given = (hidden, weight, *rest) if VERSION < (1, 13, 0) else (hidden, weight, bias, *rest)
    return given if outputs is None or VERSION < (1, 15, 0) else (*given, outputs)


def head_inputs(n, vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=generator) for s in ((n, 8), (vocab, 8), (vocab,)))
    ids = torch.randint(vocab, (n,), generator=generator)
    return hidden / 8, weight, bias / 4, ids  # logits of about unit variance after scale and temperature


@settings(max_examples=30)
@given(
    n=st.integers(1, 9),
    vocab=st.integers(2, 70),
    seed=st.integers(0, 2**20),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.25, 2.0, -1.0]),
    tile=st.sampled_from([1, 100, 1 << 26]),
)
def test_the_chunked_head(ours, n, vocab, seed, temperature, softcap, scale, tile):
    *leaves, ids = head_inputs(n, vocab, seed)

    def call(functions):
        def run(h, w, b):
            out = functions[HEAD].apply(*head_arguments(h, w, b, ids, temperature, softcap, scale))
            return out[:1] if VERSION < (1, 13, 0) else out  # before, the entropy had no gradient: see the page

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_fast.integrations.head.TILE", tile)
        # An error of the logsumexp is in every probability, and the gradients multiply these by scale / temperature.
        agree(call(ours), call(THEIRS), *leaves, slope=abs(scale) / temperature)


@pytest.mark.skipif(VERSION < (1, 13, 0), reason="TRL's head had no gradient for the entropy before 1.13")
@pytest.mark.parametrize("vocab", [2, 5, 70])
def test_the_chunked_head_is_as_near_to_float64(ours, vocab):
    """Where the two differ, ours is not the one that is further off: the RMS error of many cases, of each result."""
    squares = {"ours": torch.zeros(5), "theirs": torch.zeros(5)}
    for seed, temperature, softcap, scale in product(range(20), (0.5, 1.7), (None, 5.0), (1.0, 2.0)):
        *leaves, ids = head_inputs(1 + seed % 9, vocab, seed)
        knobs = (temperature, softcap, scale)

        def exact(h, w, bias, ids=ids, knobs=knobs):
            temperature, softcap, scale = knobs
            z = scale * (h @ w.T + bias)
            logp = ((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature).log_softmax(-1)
            return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

        def call(functions, ids=ids, knobs=knobs):
            head = functions[HEAD]
            return lambda h, w, bias: head.apply(*head_arguments(h, w, bias, ids, *knobs))[:2]

        results, grads = results_and_gradients(exact, *(x.double() for x in leaves))
        for name, functions in (("ours", ours), ("theirs", THEIRS)):
            found = results_and_gradients(call(functions), *leaves)
            pairs = zip([*found[0], *found[1]], [*results, *grads], strict=True)
            squares[name] += torch.tensor([float((a - b).square().mean()) for a, b in pairs])
    ratios = (squares["ours"] / squares["theirs"]).sqrt()
    assert (ratios <= 2).all(), ratios  # of logprobs, entropies, and the gradients of hidden, weight and bias


def test_the_chunked_head_under_autocast_and_frozen(ours):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=generator) for s in ((20, 16), (50, 16)))
    ids = torch.randint(50, (20,), generator=generator)
    bias = None

    def call(functions, wanted):
        with torch.autocast("cpu", torch.bfloat16):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(wanted)
            outputs = functions[HEAD].apply(*head_arguments(h, w, bias, ids, 1.0, None, 1.0, ("entropy",)))
        outputs[0].sum().backward()
        return outputs, h.grad, w.grad

    if VERSION < (1, 14, 0):
        pytest.skip("TRL's head took no dtype from autocast before 1.14")
    for wanted in (True, False):
        (mine, mine_h, mine_w), (its, its_h, its_w) = call(ours, wanted), call(THEIRS, wanted)
        torch.testing.assert_close(mine[0], its[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(mine[1], its[1], rtol=0, atol=1e-5)
        assert [x is None for x in mine] == [x is None for x in its]
        torch.testing.assert_close(mine_h, its_h, rtol=0, atol=0.02)  # both round the logits' gradient to bfloat16
        assert (mine_w is None) == (its_w is None) == (not wanted)


def test_a_head_without_a_row_has_a_graph(ours):
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    out = ours[HEAD].apply(*head_arguments(hidden, weight, None, torch.empty(0, dtype=torch.int64), 1.0, None, 1.0))
    out[0].sum().backward()
    assert weight.grad.abs().sum() == 0
    expected = THEIRS[HEAD].apply(
        *head_arguments(hidden, weight, None, torch.empty(0, dtype=torch.int64), 1.0, None, 1.0)
    )
    assert [(x.shape, x.dtype) for x in out] == [(x.shape, x.dtype) for x in expected]


def test_a_head_in_float64_has_gradients(ours):
    *leaves, ids = (x.double() if x.is_floating_point() else x for x in head_inputs(5, 11, 0))
    bias = leaves.pop() if VERSION >= (1, 13, 0) else None
    agree(
        lambda h, w: ours[HEAD].apply(*head_arguments(h, w, bias, ids, 0.7, None, 1.0))[0],
        lambda h, w: ((h @ w.t() + (0 if bias is None else bias)) / 0.7).log_softmax(-1)[range(5), ids],
        *leaves,
        tolerance=1e-12,
    )


def test_the_heads_entropy_has_a_gradient(ours):
    weight, ids = torch.randn(7, 4), torch.zeros(3, dtype=torch.int64)
    for functions, has in ((ours, True), (THEIRS, VERSION >= (1, 13, 0))):
        hidden = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        functions[HEAD].apply(*head_arguments(hidden, weight, None, ids, 1.0, None, 1.0))[1].sum().backward()
        assert bool(hidden.grad.any()) == has
    outside = head_arguments(hidden, weight, None, ids - 1, 1.0, None, 1.0)
    with pytest.raises(IndexError, match="ids must be in"):
        ours[HEAD].apply(*outside)


def test_impossible_tokens_leave_the_entropy_a_number(ours):
    logits = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    assert THEIRS["entropy_from_logits"](logits).isnan().all()
    entropy = ours["entropy_from_logits"](logits)
    torch.testing.assert_close(entropy.detach(), torch.tensor([math.log(2)]))
    entropy.sum().backward()
    assert not logits.grad.isnan().any()


@pytest.mark.skipif(VERSION < (1, 14, 0), reason="TRL masks rows since 1.14")
def test_nan_in_a_masked_row_stays_there(ours):
    logits, ids = logits_and_ids((1, 4, 11), 0)
    logits[0, 1] = math.nan
    mask = torch.tensor([[True, False, True, True]])
    both = "selective_log_softmax_and_entropy"
    for functions, leaks in ((THEIRS, True), (ours, False)):
        z = logits.clone().requires_grad_()
        sum(out.sum() for out in functions[both](z, ids, True, 1.0, mask)).backward()
        assert bool(z.grad.isnan().any()) == leaks


PROMPTS = [
    {"prompt": f" the {word} movie was"} for word in ("good", "bad", "dull", "fun", "great", "awful", "a", "hate")
]
PAIRS = [row | {"chosen": " great fun" + " very" * i, "rejected": " not good"} for i, row in enumerate(PROMPTS)]
KIND = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}


def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / 10 for text in completions]


def make_trainer(tmp_path, kind, make, of=lambda trainer_class: trainer_class, **options):
    """A trainer of a tiny model; ``of`` makes a subclass."""
    from datasets import Dataset

    tokenizer = tiny_tokenizer()
    model = str(tmp_path / "model")  # TRL reads its reference from there
    make(tokenizer, seed=1).save_pretrained(model)
    # SGD, for Adam's first steps take the sign of a gradient however near to zero it is, rounding and all.
    basics = {
        "optim": "sgd", "output_dir": str(tmp_path), "max_steps": 3, "learning_rate": 0.1, "logging_steps": 1,
        "seed": 7, "report_to": [], "use_cpu": True, "save_strategy": "no", "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False,
    }  # fmt: skip
    if kind == "dpo":
        config = trl.DPOConfig(**basics, **{"per_device_train_batch_size": 4, "max_length": 64} | options)
        trainer_class, rows, given = trl.DPOTrainer, PAIRS, {}
    else:
        config_class, trainer_class = KIND[kind]
        options = {"num_generations": 4, "max_completion_length": 8, "beta": 0.05, "num_iterations": 2} | options
        config = config_class(**basics, per_device_train_batch_size=8, **options)
        rows, given = PROMPTS, {"reward_funcs": vowels}
    rows = Dataset.from_list(rows)
    return of(trainer_class)(
        model, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, **given
    )


def train(tmp_path, kind, make, **options):
    """The losses and entropies of a few steps, and the parameters after them."""
    trainer = make_trainer(tmp_path, kind, make, **options)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 3
    names = set.intersection(*(set(row) for row in logs)) - {"step_time"}
    assert names >= LOGGED[kind]
    numbers = torch.tensor([[float(row[name]) for name in sorted(names)] for row in logs])
    return numbers, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


CLIPPED = {f"clip_ratio/{x}" for x in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
LOGGED = {
    "grpo": {"loss", "grad_norm", "entropy", "kl", *CLIPPED},
    "rloo": {"loss", "grad_norm", "entropy", *CLIPPED},
    "dpo": {"loss", "grad_norm", "entropy", "logits/chosen", "logps/rejected", "mean_token_accuracy", "num_tokens"},
}
RUNS = {
    "grpo": ("grpo", tiny_gpt2, {}),
    "grpo, temperature, dr_grpo": ("grpo", tiny_llama, {"temperature": 0.7, "loss_type": "dr_grpo"}),
    "grpo, accumulated, grpo": ("grpo", tiny_gpt2, {"gradient_accumulation_steps": 2, "loss_type": "grpo"}),
    "grpo, accumulated, bnpo": ("grpo", tiny_gpt2, {"gradient_accumulation_steps": 2, "loss_type": "bnpo"}),
    "grpo, high entropy": ("grpo", tiny_gpt2, {"top_entropy_quantile": 0.5, "use_bias_correction_kl": False}),
    "grpo, gspo": ("grpo", tiny_gpt2, {"importance_sampling_level": "sequence"}),  # TRL's own
    "rloo": ("rloo", tiny_gpt2, {}),
    "rloo, accumulated": ("rloo", tiny_gpt2, {"gradient_accumulation_steps": 2}),
    "dpo": ("dpo", tiny_gpt2, {}),
    "dpo, ipo": ("dpo", tiny_llama, {"loss_type": ["ipo"]}),
    "dpo, accumulated": ("dpo", tiny_gpt2, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "dpo, bco_pair": ("dpo", tiny_gpt2, {"loss_type": ["bco_pair"]}),  # TRL's own
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_the_trainers_take_the_same_steps(tmp_path, run, monkeypatch):
    kind, make, options = RUNS[run]
    expected, before = train(tmp_path / "unpatched", kind, make, **options)
    calls = []
    ops = [f"{place}.logprobs" for place in ("trl", "head", "trl_dpo")]
    for place in (*ops, "trl_losses.ppo_loss", "trl_dpo.dpo_loss"):
        op = place.split(".")[1]
        count = lambda *a, op=op, **k: calls.append(op) or getattr(rf, op)(*a, **k)  # noqa: E731
        monkeypatch.setattr(f"rlhf_fast.integrations.{place}", count)
    with rf.patch("trl"):
        numbers, after = train(tmp_path / "patched", kind, make, **options)
    assert calls.count("logprobs") >= 3, calls  # the patch was used, once a step at least
    losses = len(calls) - calls.count("logprobs")
    assert losses == 0 if run in ("grpo, gspo", "dpo, bco_pair") else losses >= 3
    torch.testing.assert_close(numbers, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert utils.selective_log_softmax is THEIRS["selective_log_softmax"]


def doubled(trainer_class):
    """A user's subclass, on top of TRL's loss."""

    class Doubled(trainer_class):
        def _compute_loss(self, *args):
            return 2 * super()._compute_loss(*args)

    return Doubled


@pytest.mark.parametrize("kind", LOGGED)
def test_a_subclass_that_was_there_before_is_evaluated_alike(tmp_path, kind, monkeypatch):
    trainer = make_trainer(tmp_path, kind, tiny_gpt2, of=doubled)

    def evaluate():
        torch.manual_seed(3)  # completions are drawn
        found = trainer.evaluate()
        return {k: v for k, v in found.items() if not k.endswith(("runtime", "per_second", "step_time"))}

    expected, calls = evaluate(), []
    name = "trl_dpo.dpo_loss" if kind == "dpo" else "trl_losses.ppo_loss"
    count = lambda *a, **k: calls.append(1) or getattr(rf, name.split(".")[1])(*a, **k)  # noqa: E731
    monkeypatch.setattr(f"rlhf_fast.integrations.{name}", count)
    with rf.patch("trl"):
        assert evaluate() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert calls
    assert evaluate() == expected  # after undo TRL's own again
