"""docs/ops: a page per op, with the committed figures, the signature of the function and errors no larger than said."""

import ast
import inspect
import json
import re

import op_pages
import pytest
import torch

import rlhf_fast as rf
from rlhf_fast import ops

OPS = sorted(name for name in ops.__all__ if name.islower())
HEADINGS = ["Example", "Call", "Formula", "Numerics", "Kernels", "Floor", "Measured", "Elsewhere"]
ROWS, SIZE = 32, 50257


def page(op):
    return (op_pages.PAGES / f"{op}.md").read_text(encoding="utf-8")


def section(op, heading):
    return page(op).split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_every_op_has_its_page():
    assert [path.stem for path in sorted(op_pages.PAGES.glob("*.md"))] == OPS
    listed = (op_pages.PAGES.parent / "kernels.md").read_text(encoding="utf-8")
    assert re.findall(r"\(ops/(\w+)\.md\)", listed) == ["logprobs", "kl", "gae", "advantages", "ppo_loss", "sample"]


@pytest.mark.parametrize("op", OPS)
def test_the_pages_are_alike_and_short(op):
    assert re.findall(r"^## (.+)$", page(op), re.MULTILINE) == HEADINGS
    assert len(page(op).splitlines()) <= 140


@pytest.mark.parametrize("op", OPS)
def test_the_figures_are_the_committed_ones(op):
    results = json.loads(op_pages.RESULTS.read_text(encoding="utf-8"))
    assert op_pages.written(op, page(op), results) == page(op), "python benchmarks/op_pages.py writes them"
    assert (op_pages.RESULTS.parent / f"{op_pages.RESULTS.stem}-{op}.png").exists()


def test_other_results_make_another_page():
    results = json.loads(op_pages.RESULTS.read_text(encoding="utf-8"))
    results["gae"]["rows"][0]["us"] = 1234.5
    assert "| 64 × 1024 | 1.23 ms | " in op_pages.written("gae", page("gae"), results)
    with pytest.raises(ValueError, match=r"kl\.md: the marks"):
        op_pages.written("kl", "# kl\n", results)


def columns(op):
    """What the table of the page measures by, and its peers; without versions."""
    header = re.search(r"^\| case \| ours \| (.*) \|$", page(op), re.MULTILINE)[1]
    return {re.sub(r"^[÷%] | \d+\.[\d.]+$", "", name) for name in header.split(" | ")}


@pytest.mark.parametrize("op", OPS)
def test_what_the_columns_mean_is_said_below_the_table(op):
    remarks = page(op).split(op_pages.END)[1].split("\n## ")[0]
    explained = {name for name in re.findall(r"`([^`]+)`", remarks) if name in set().union(*map(columns, OPS))}
    assert explained <= columns(op)
    assert columns(op) - explained <= {"TRL's formula", "verl's formula", "reference", "copy"}


@pytest.mark.parametrize("op", OPS)
def test_the_signature_is_the_functions(op):
    (block,) = re.findall(r"```\n(rf\.\w+\(.*?)```", section(op, "Call"), re.DOTALL)
    call, _, result = block.partition("->")
    (definition,) = ast.parse(call.replace("rf.", "def ", 1).strip() + ": pass").body
    said = [argument.arg for argument in [*definition.args.args, *definition.args.kwonlyargs]]
    defaults = [default and ast.literal_eval(default) for default in definition.args.kw_defaults]
    parameters = inspect.signature(getattr(rf, op)).parameters.values()
    assert said == [parameter.name for parameter in parameters]
    keyword = [parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    assert defaults == [None if default is inspect.Parameter.empty else default for default in keyword]
    outputs = re.findall(r"\w+", result.partition("(")[2])
    of = inspect.signature(getattr(rf, op)).return_annotation
    assert outputs == (["advantages", "returns"] if op == "gae" else list(of._fields))


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def worst(got, exact):
    """Field → largest error of the results in floating point."""
    pairs = zip(exact._fields, got, exact, strict=True)
    return {name: (a - b).abs().max().item() for name, a, b in pairs if a is not None and a.is_floating_point()}


def rows_of(op, dtype):
    """Errors of an op on rows of logits."""
    logits, other = ((3 * normal(ROWS, SIZE + i)[:, :SIZE]).to(dtype) for i in range(2))
    ids, seeds = torch.arange(ROWS) * 1571, torch.arange(ROWS)
    calls = {
        "logprobs": lambda x, _: rf.logprobs(x, ids, temperature=0.7),
        "kl": lambda x, y: rf.kl(x, y, ids),
        "sample": lambda x, _: rf.sample(x, temperature=0.7, top_k=50, top_p=0.9, seeds=seeds),
    }
    got, exact = calls[op](logits, other), calls[op](logits.double(), other.double())
    if op == "sample":
        assert torch.equal(got.ids, exact.ids)
    return worst(got, exact)


def tokens_of(op):
    """Errors of an op on tokens."""
    mask = torch.arange(1024) < torch.linspace(1, 1024, 64)[:, None]
    found = []
    for dtype in (torch.float32, torch.float64):
        rewards, values, noise = (normal(64, 1024 + i)[:, :1024].to(dtype) for i in range(3))
        logprobs = -(noise.abs())
        if op == "gae":
            found.append(rf.AdvantagesOutput(*rf.gae(rewards, values, mask), rewards))
        elif op == "advantages":
            scores = rewards[:, 0]
            found.append(rf.advantages(scores, logprobs, logprobs + 0.1 * rewards, values, mask, kl_coef=0.05))
        else:
            leaves = logprobs.clone().requires_grad_(), values.clone().requires_grad_()
            others = {"old_values": values + 0.1, "returns": rewards, "ref_logprobs": logprobs + 0.1 * noise}
            old = logprobs + 0.1 * rewards
            loss, _ = rf.ppo_loss(leaves[0], old, noise, mask, values=leaves[1], kl_coef=0.05, **others)
            loss.backward()
            scaled = [leaf.grad * mask.sum() for leaf in leaves]
            found.append(rf.AdvantagesOutput(loss.detach(), *scaled))
    names = {"gae": ("advantages", "returns"), "ppo_loss": ("loss", "logprobs", "values")}.get(op)
    errors = worst(*found)
    return dict(zip(names, errors.values(), strict=False)) if names else errors


@pytest.mark.parametrize("op", OPS)
def test_the_errors_are_as_small_as_is_said(op):
    on_rows = op in ("logprobs", "kl", "sample")
    said = dict(re.findall(r"`(\w+)` ≤ ([\d.]+e-\d+)", section(op, "Numerics")))
    for errors in [rows_of(op, dtype) for dtype in (torch.float32, torch.bfloat16)] if on_rows else [tokens_of(op)]:
        assert said.keys() <= errors.keys()
        for name, bound in said.items():
            assert 0 < errors[name] <= float(bound), name
    assert said
