"""Distillation: float64 written out with log_softmax, closed forms, the memory it takes, what must not leak."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.losses import distill_loss

KINDS = ("forward", "reverse", "jsd")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).to(dtype)


def divergence(student, teacher, kind):
    """Of two rows of probabilities, term by term; 0 log 0 is 0."""

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)

    mixture = [(a + b) / 2 for a, b in zip(student, teacher, strict=True)]
    return {
        "forward": lambda: kl(teacher, student),
        "reverse": lambda: kl(student, teacher),
        "jsd": lambda: (kl(student, mixture) + kl(teacher, mixture)) / 2,
    }[kind]()


def oracle(logits, teacher, mask, *, temperature=1.0, kind="forward", advantages=None, ids=None, alpha=1.0):
    """The same with autograd through ``log_softmax``, on the rows that count."""
    p, q = ((x[mask].double() / temperature).log_softmax(-1) for x in (logits, teacher))
    m = ((p.exp() + q.exp()) / 2).log()
    terms = {
        "forward": q.exp() * (q - p),
        "reverse": p.exp() * (p - q),
        "jsd": (p.exp() * (p - m) + q.exp() * (q - m)) / 2,
    }[kind]
    each = alpha * temperature**2 * terms.sum(-1)
    if ids is not None:
        chosen = logits[mask].double().log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]
        each = each - advantages[mask].double() * chosen
    return each.sum() / max(len(each), 1)


def case(shape=(3, 5, 7), dtype=torch.float64, policy=True, seed=0):
    """Student, teacher, mask and the arguments of the policy gradient, with NaN and nonsense where masked."""
    logits, teacher = random(*shape, seed=seed, dtype=dtype), random(*shape, seed=seed + 1, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape[:-1], generator=generator) < 0.7
    logits[~mask], teacher[~mask] = torch.nan, torch.inf
    if not policy:
        return logits, teacher, mask, {}
    ids = torch.randint(0, shape[-1], shape[:-1], generator=generator).masked_fill(~mask, -100)
    advantages = random(*shape[:-1], seed=seed + 2).masked_fill(~mask, torch.nan)
    return logits, teacher, mask, {"ids": ids, "advantages": advantages}


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind):
    student, teacher = [0.5, 0.25, 0.25], [0.125, 0.375, 0.5]
    logits, teacher_logits = (torch.tensor([[row]]).double().log() + 3 for row in (student, teacher))
    mask = torch.ones(1, 1).bool()
    loss = distill_loss(logits, teacher_logits, mask, kind=kind)
    assert loss.item() == pytest.approx(divergence(student, teacher, kind), rel=1e-12)
    # At temperature 2 the probabilities are the square roots, normalised; and the loss is 4 times theirs.
    softer = [[math.sqrt(x) / sum(map(math.sqrt, row)) for x in row] for row in (student, teacher)]
    loss = distill_loss(logits, teacher_logits, mask, kind=kind, temperature=2.0, alpha=0.5)
    assert loss.item() == pytest.approx(2 * divergence(*softer, kind), rel=1e-12)
    # The policy gradient is of the policy itself, at temperature 1.
    options = {"ids": torch.tensor([[2]]), "advantages": torch.tensor([[3.0]])}
    with_reward = distill_loss(logits, teacher_logits, mask, kind=kind, temperature=2.0, alpha=0.5, **options)
    assert (with_reward - loss).item() == pytest.approx(-3 * math.log(0.25), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_those_of_float64(kind, policy, temperature, dtype):
    logits, teacher, mask, options = case(dtype=dtype, policy=policy)
    options |= {"kind": kind, "temperature": temperature, "alpha": 0.7}
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, expected = distill_loss(leaf, teacher, mask, **options), oracle(exact, teacher, mask, **options)
    loss.backward()
    expected.backward()
    # Float32 inside; the gradient is rounded to the dtype of the logits once. The advantages are float64.
    assert loss.dtype == (torch.float64 if policy or dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(loss.double(), expected, rtol=tolerance, atol=tolerance)
    assert (leaf.grad[~mask] == 0).all()
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else tolerance
    assert torch.allclose(leaf.grad[mask].double(), exact.grad[mask], rtol=rounding, atol=max(tolerance, 1e-7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_the_teacher_may_have_another_dtype(kind, dtypes):
    (logits, _, mask, options), teacher = case(dtype=dtypes[0]), case(dtype=dtypes[1])[1]
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    distill_loss(leaf, teacher, mask, kind=kind, temperature=1.5, **options).backward()
    oracle(exact, teacher, mask, kind=kind, temperature=1.5, **options).backward()
    rounding = max(torch.finfo(dtypes[0]).eps, 1e-5)
    assert leaf.grad.dtype == dtypes[0]
    assert torch.allclose(leaf.grad[mask].double(), exact.grad[mask], rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(kind, policy, temperature):
    logits, teacher, mask, options = case((2, 3, 4), policy=policy)
    logits = torch.where(mask[..., None], logits, 0).requires_grad_()  # its differences would be of NaN
    options |= {"kind": kind, "temperature": temperature}
    assert torch.autograd.gradcheck(lambda x: distill_loss(x, teacher, mask, **options), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_like_its_teacher_has_nothing_to_learn(kind):
    logits = random(4, 9).requires_grad_()
    loss = distill_loss(logits, logits.detach() + 5, torch.ones(4).bool(), kind=kind)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert torch.allclose(logits.grad, torch.zeros(4, 9).double(), atol=1e-15)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 6)),
    seed=st.integers(0, 1000),
    shift=st.floats(-30, 30),
)
def test_bounds_shift_order_and_padding(kind, shape, seed, shift):
    logits, teacher, mask, options = case(shape, seed=seed)
    loss = distill_loss(logits, teacher, mask, kind=kind, alpha=2.0, **options)
    plain = distill_loss(logits, teacher, mask, kind=kind)
    assert plain >= -1e-14
    if kind == "jsd":
        assert plain <= math.log(2) + 1e-14
        assert torch.allclose(distill_loss(teacher, logits, mask, kind=kind), plain, atol=1e-13)
    order = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(seed))
    place = order.argsort()  # where each token went
    ids = torch.where(mask, place[options["ids"].clamp(min=0)], -1)
    moved = distill_loss(
        logits[..., order] + shift, teacher[..., order] - shift, mask, kind=kind, alpha=2.0, **(options | {"ids": ids})
    )
    assert torch.allclose(moved, loss, atol=1e-10)
    wider = [torch.nn.functional.pad(x, (0, 0, 1, 2), value=torch.nan) for x in (logits, teacher)]
    more, ids, advantages = (torch.nn.functional.pad(x, (1, 2)) for x in (mask, options["ids"], options["advantages"]))
    padded = distill_loss(*wider, more, kind=kind, alpha=2.0, ids=ids, advantages=advantages)
    assert torch.allclose(padded, loss, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_probability_0(kind):
    # Both forbid the last; the teacher alone forbids the first, so that the reverse KL is infinite.
    inf = math.inf
    logits = torch.tensor([[0.0, 1.0, 2.0, -inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-inf, 1.0, 1.0, -inf]], dtype=torch.float64)
    loss = distill_loss(logits, teacher, torch.ones(1).bool(), kind=kind)
    if kind == "reverse":
        assert loss == inf
        return
    student = logits.detach().softmax(-1)[0].tolist()
    assert loss.item() == pytest.approx(divergence(student, [0, 0.5, 0.5, 0], kind), rel=1e-12)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 3] == 0
    if kind == "forward":
        expected = torch.tensor(student).double() - torch.tensor([0, 0.5, 0.5, 0])
        assert torch.allclose(logits.grad[0], expected, atol=1e-15)
    else:
        torch.autograd.gradcheck(
            lambda x: distill_loss(
                torch.cat([x, torch.full((1, 1), -inf)], 1), teacher, torch.ones(1).bool(), kind=kind
            ),
            logits.detach()[:, :3].clone().requires_grad_(),
        )


def test_disjoint_distributions_are_log_2_apart():
    inf = math.inf
    logits, teacher = torch.tensor([[0.0, -inf]]), torch.tensor([[-inf, 0.0]])
    loss = distill_loss(logits, teacher, torch.ones(1).bool(), kind="jsd")
    assert loss.item() == pytest.approx(math.log(2))
    assert distill_loss(logits, teacher, torch.ones(1).bool()) == inf


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_weight_of_0_leaves_the_policy_gradient_even_of_an_infinite_divergence(temperature):
    logits, teacher = torch.tensor([[0.0, 0.0]], requires_grad=True), torch.tensor([[0.0, -math.inf]])
    options = {
        "kind": "reverse",
        "alpha": 0.0,
        "temperature": temperature,
        "ids": torch.tensor([1]),
        "advantages": torch.tensor([2.0]),
    }
    loss = distill_loss(logits, teacher, torch.ones(1).bool(), **options)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2))
    assert torch.allclose(logits.grad, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_has_a_graph(kind):
    logits = torch.full((2, 3, 4), torch.nan, requires_grad=True)
    none = torch.zeros(2, 3).bool()
    options = {"ids": torch.full((2, 3), 99), "advantages": torch.full((2, 3), torch.inf)}
    for extra in ({}, options):
        logits.grad = None
        loss = distill_loss(logits, torch.full((2, 3, 4), torch.nan), none, kind=kind, **extra)
        loss.backward()
        assert loss == 0
        assert torch.equal(logits.grad, torch.zeros(2, 3, 4))
    assert distill_loss(logits[:0], torch.zeros(0, 3, 4), none[:0], kind=kind) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_advantage_per_sequence_micro_batches_and_views(kind):
    logits, teacher, mask, options = case((4, 6, 5))
    options["advantages"] = torch.tensor([1.0, -2.0, 0.5, 3.0], requires_grad=True)
    spread = options | {"advantages": options["advantages"].detach()[:, None].expand(4, 6)}
    whole = distill_loss(logits, teacher, mask, kind=kind, **options)
    assert torch.allclose(whole, oracle(logits, teacher, mask, kind=kind, **spread))
    assert not whole.requires_grad  # advantages are constants, and the student is no leaf here
    parts = [
        distill_loss(*(x[i : i + 2] for x in (logits, teacher, mask)), kind=kind, denominator=mask.sum(),
                     ids=options["ids"][i : i + 2], advantages=options["advantages"][i : i + 2])
        for i in (0, 2)
    ]  # fmt: skip
    assert torch.allclose(sum(parts), whole, atol=1e-13)
    learning_teacher = distill_loss(logits, teacher.clone().requires_grad_(), mask, kind=kind)
    assert not learning_teacher.requires_grad
    shifted = distill_loss(logits[:, :-1], teacher[:, 1:], mask[:, 1:] & mask[:, :-1], kind=kind)
    copied = distill_loss(logits[:, :-1].clone(), teacher[:, 1:].clone(), mask[:, 1:] & mask[:, :-1], kind=kind)
    assert torch.equal(shifted, copied)


class Sizes(TorchDispatchMode):
    """The tensors that each operation makes: how many of the size of the logits, and in which dtypes."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.numel() >= self.size and t.untyped_storage().data_ptr() not in known:
                self.made.append(t.dtype)
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_float32_copy_of_the_logits_is_made(kind, temperature):
    rows, size = 64, 20_000  # more than the blocks in which the rows are read
    logits, teacher = (random(rows, size, seed=i, dtype=torch.bfloat16) for i in range(2))
    options = {"ids": torch.zeros(rows).long(), "advantages": torch.ones(rows)}
    leaf = logits.requires_grad_()
    with Sizes(rows * size) as sizes:
        distill_loss(leaf, teacher, torch.ones(rows).bool(), kind=kind, temperature=temperature, **options).backward()
    assert sizes.made == [torch.bfloat16]  # the gradient


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "kl"}, ValueError, "distill_loss: kind must be one of forward, reverse, jsd, got 'kl'"),
        ({"temperature": 0}, ValueError, "distill_loss: temperature must be finite and above 0, got 0"),
        ({"alpha": -1}, ValueError, "distill_loss: alpha must be between 0"),
        ({"denominator": 0.0}, ValueError, "distill_loss: denominator must be finite and above 0"),
        (
            {"teacher_logits": torch.zeros(2, 3, 5)},
            ValueError,
            "teacher_logits must be like logits .a teacher of the same",
        ),
        ({"teacher_logits": [1]}, TypeError, "distill_loss: teacher_logits must be a tensor, got list"),
        ({"logits": torch.zeros(2, 3, 0)}, ValueError, r"logits must be \[..., V\] with V at least 1, got \[2, 3, 0\]"),
        ({"mask": torch.ones(2, 3)}, TypeError, "distill_loss: mask must be bool, got float32"),
        ({"mask": torch.ones(2).bool()}, ValueError, "distill_loss: mask must be like logits without its last"),
        ({"ids": torch.zeros(2, 3).long()}, ValueError, "distill_loss: advantages and ids must be given together"),
        ({"advantages": torch.zeros(2, 3)}, ValueError, "distill_loss: advantages and ids must be given together"),
        (
            {"advantages": torch.zeros(3), "ids": torch.zeros(2, 3).long()},
            ValueError,
            r"distill_loss: advantages must be like mask, or \[B\], got \[3\]",
        ),
        (
            {"advantages": torch.zeros(2), "ids": torch.full((2, 3), 4)},
            IndexError,
            r"distill_loss: ids must be in \[0, 4\), got 4 in row 0",
        ),
    ],
)
def test_bad_input_names_function_argument_and_rule(options, error, message):
    plain = {"logits": torch.zeros(2, 3, 4), "teacher_logits": torch.zeros(2, 3, 4), "mask": torch.ones(2, 3).bool()}
    with pytest.raises(error, match=message):
        distill_loss(**(plain | options))
