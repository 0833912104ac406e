"""docs: examples run as they are printed, figures are the committed ones, flags and links lead somewhere."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast import dispatch

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "kernels.md").read_text(encoding="utf-8")


def raw_call():
    """The page's two Python blocks, and the names that the first leaves."""
    first, second = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    exec(first, names)
    return first, second, names


@pytest.mark.skipif(isinstance(dispatch.extension("_cpu"), str), reason="the C++ kernels were not built here")
def test_the_raw_call_computes_what_it_says():
    np = pytest.importorskip("numpy")
    snippet, _, names = raw_call()
    (printed,) = re.findall(r"print\(advantages.round\(3\)\) +# (.*)", snippet)
    assert str(names["advantages"].round(3)) == printed
    # By hand: 1 - .3, then .3 - .4 + .95 * .7, then .4 - .5 + .95 * .565.
    assert np.allclose(names["advantages"], [[0.43675, 0.565, 0.7]], atol=1e-6)
    assert np.allclose(names["returns"], [[0.93675, 0.965, 1.0]], atol=1e-6)
    codes = {str(dtype).removeprefix("torch."): code for dtype, code in dispatch.DTYPE_CODES.items()}
    assert names["CODES"].items() <= codes.items()
    said = dict(re.findall(r"(\d) (\w+)", re.findall(r"The codes: (.*?)\.", TEXT, re.DOTALL)[0]))
    assert {name: int(code) for code, name in said.items()} == codes


@pytest.mark.skipif(isinstance(dispatch.extension("_cpu"), str), reason="the C++ kernels were not built here")
def test_tensors_of_other_libraries_come_by_dlpack():
    np = pytest.importorskip("numpy")
    _, dlpack, names = raw_call()
    exact = np.array([np.exp(1) / (1 + np.exp(1)), np.exp(3) / (1 + np.exp(3))])  # of two logits 1 and 3 apart
    parts = dlpack.split("\n\n")
    assert len(parts) == 3
    for part in ("\n\n".join(parts[:2]), parts[2]):  # float32 strided, then bfloat16
        exec(part, names)
        (printed,) = re.findall(r"print\(logprobs.round\(3\)\) +# (.*)", part)
        assert str(names["logprobs"].round(3)) == printed
        assert np.allclose(names["logprobs"], np.log(exact), atol=1e-6)
        assert np.allclose(names["entropy"], -(exact * np.log(exact) + (1 - exact) * np.log(1 - exact)), atol=1e-6)
        names["logprobs"][:] = 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_cpp_calls_a_kernel_without_python(tmp_path):
    (source,) = re.findall(r"```cpp\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "main.cpp").write_text(source)
    kernel, program = DOCS.parent / "csrc" / "cpu" / "gae.cpp", tmp_path / "gae"
    flags = ["-std=c++17", "-O1", "-fopenmp", "-Wno-psabi", "-I", str(DOCS.parent / "csrc")]
    subprocess.run(["g++", *flags, str(tmp_path / "main.cpp"), str(kernel), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert printed == re.findall(r"advantages\[2\]\);  // (.*)", source)[0] + "\n"


def test_the_scratch_of_the_kernels_is_what_the_page_says():
    from rlhf_fast.ops import advantages, ppo_loss, sample

    said = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)`", TEXT, re.MULTILINE))
    scratch = {name: sys.modules[op.__module__]._scratch for name, op in
               {"advantages": advantages, "ppo_loss": ppo_loss, "sample": sample}.items()}  # fmt: skip
    assert said.keys() == scratch.keys()

    def size(op, word=4, **sizes):
        return eval(said[op].replace("·", "*").replace("4 *", f"{word} *"), {"ceil": math.ceil}, sizes)

    for rows, tokens in ((3, 5), (64, 1024), (7, 1025)):
        x = torch.zeros(rows, tokens)
        assert size("ppo_loss", B=rows, T=tokens) == len(scratch["ppo_loss"](x))
        assert size("ppo_loss", B=1, T=rows * tokens) == len(scratch["ppo_loss"](x.flatten()))
        assert size("advantages", B=rows, T=tokens) == len(scratch["advantages"](x[:, 0], x))
        assert size("sample", B=rows, V=tokens, k=1) == len(scratch["sample"](x, None, None))
        assert size("sample", B=rows, V=tokens, k=2) == len(scratch["sample"](x, None, None, logit_bias=x))
        wide = size("sample", word=8, B=rows, V=tokens, k=1)
        assert wide == len(scratch["sample"](x.double(), None, None))


@pytest.mark.parametrize("page", ["kernels.md", "rrhf.md", "scale.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", (DOCS / page).read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (DOCS / link).exists(), link


def test_the_launch_line_has_flags_of_ppo_and_the_fields_that_are_named_exist():
    import dataclasses

    from rlhf_fast.cli import SOURCES, config_class

    text = (DOCS / "scale.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"rlhf_fast\.cli ppo \\\n(.*?)```", text, re.DOTALL)
    fields = {field.name for field in dataclasses.fields(config_class("ppo"))}
    flags = re.findall(r"--(\w+)", command)
    assert len(flags) == 4
    assert set(flags) <= fields | SOURCES["ppo"].keys()
    named = set(re.findall(r"`([a-z_]+)=[\w:]+`", text))
    assert {"precision", "share", "gradient_checkpointing", "old_logprobs"} <= named <= fields


def blocks_of_the_patches():
    return re.findall(r"```python\n(.*?)```", (DOCS / "integrations.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_patched_trainer_runs_as_the_page_says(capsys):
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed: make test installs it")
    own, seen = utils.selective_log_softmax, []

    class Trainer:
        def train(self):
            logits = torch.zeros(1, 2, 4)
            assert torch.equal(
                utils.selective_log_softmax(logits, torch.tensor([[0, 3]])), logits[..., 0] - math.log(4)
            )
            seen.append(utils.selective_log_softmax)

    names = {"trainer": Trainer()}
    blocks = [block for block in blocks_of_the_patches() if "trainer.train()" in block]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
        assert utils.selective_log_softmax is own
    assert len(seen) == 2
    assert all(function.__module__ == "rlhf_fast.integrations.trl" for function in seen)
    printed = capsys.readouterr().out
    assert "trl.trainer.utils.selective_log_softmax is rlhf_fast's in trl.trainer.utils" in printed


def test_the_hook_of_rays_workers_is_the_function_of_the_page(monkeypatch):
    hook, start = (block for block in blocks_of_the_patches() if "patched" in block)
    asked, patched = [], {}
    ray = SimpleNamespace(init=lambda runtime_env: asked.append(runtime_env["worker_process_setup_hook"]))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("runpy.run_module", lambda name, run_name: asked.append((name, run_name)))
    exec(start, {})
    assert asked == ["patched.openrlhf", ("openrlhf.cli.train_ppo_ray", "__main__")]
    exec(hook, patched)
    monkeypatch.setattr("rlhf_fast.patch", asked.append)
    patched["openrlhf"]()
    assert asked[-1] == "openrlhf"


def test_the_page_names_every_function_that_is_replaced():
    from rlhf_fast.integrations import openrlhf, trl, verl

    text = (DOCS / "integrations.md").read_text(encoding="utf-8")
    for peer in (openrlhf.PEER, trl.PEER, verl.PEER):
        for replacement in peer.replacements:
            assert replacement.name.rpartition(".")[2] in text, replacement.name
