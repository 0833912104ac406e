"""docs: every example of every page runs, the site has every page, and tables name what exists."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny import tiny_gpt2, tiny_tokenizer

from rlhf_fast import dispatch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
PRINTED = re.compile(r"^print\(.*\) +# (.*)$", re.MULTILINE)
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
SHORT = "batch_size=4, minibatch_size=2, max_new_tokens=6"
SHORTER = {  # as printed they run for hours
    "index.md": [('prompts="prompts.jsonl", output_dir', f"config=rf.PPOConfig(steps=2, {SHORT}), \\g<0>")],
    "from-trl-ppo.md": [("steps=200", "steps=2"), ("=64", "=4"), ("=16", "=2")],
}


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def model(folder, *, scalar=False):
    from rlhf_fast.models import load_scalar_model

    tokenizer = tiny_tokenizer()
    found = tiny_gpt2(tokenizer)
    (load_scalar_model(found) if scalar else found).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def records():
    for name, record in re.findall(r"^(\w+\.jsonl) +({.*?})", page("index.md"), re.MULTILINE):
        Path(name).write_text(f"{record}\n" * 4)


def index():
    model("gpt2")
    records()


def from_trl():
    model("runs/sft")
    model("runs/reward", scalar=True)
    records()


def faq():
    Path("runs/ppo").mkdir(parents=True)
    line = {"step": 7, "cause": "no_eos", "warning": "only 10% of the responses end"}
    Path("runs/ppo/warnings.jsonl").write_text(json.dumps(line) + "\n")


def transformers():
    import torch
    from transformers import TrainingArguments

    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer(["the movie was"] * 2)["input_ids"])
    quiet = {"report_to": "none", "use_cpu": True, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return {
        "model": tiny_gpt2(tokenizer), "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "arguments": TrainingArguments(output_dir="runs/trainer", per_device_train_batch_size=2, **quiet),
        "rows": [{"input_ids": row, "labels": row} for row in ids],
    }  # fmt: skip


#: Page → what must be there before its examples run; returns the names that it takes for granted.
PREPARED = {"index.md": index, "from-trl-ppo.md": from_trl, "faq.md": faq, "transformers.md": transformers}
#: Page → what holds of names and output afterwards.
HOLDS = {
    "index.md": lambda names, out: names["stats"]["scores"] <= 0 and len(out.splitlines()) >= 3,
    "from-trl-ppo.md": lambda names, out: json.loads(Path("runs/ppo/run.json").read_text())["finished"],
    "faq.md": lambda names, out: out == "7  no_eos  only 10% of the responses end\n",
    "transformers.md": lambda names, out: (
        names["logprobs"].shape == (2, 64) and names["trainer"].state.global_step == 1
    ),
    "design.md": lambda names, out: out == dispatch.serving("gae", "CPU") + "\n",
}


@pytest.mark.parametrize("name", [name for name in PAGES if "```python" in page(name)])
def test_every_example_runs_or_says_why_not(name, tmp_path, monkeypatch, capsys):
    blocks = list(BLOCK.finditer(page(name)))
    assert len(blocks) == page(name).count("```python")
    code = "\n".join(block["code"] for block in blocks if block["reason"] is None)
    if "_cpu" in code and isinstance(dispatch.extension("_cpu"), str):
        pytest.skip("the C++ kernels were not built here")
    for printed, shorter in SHORTER.get(name, []):
        code, count = re.subn(re.escape(printed), shorter, code)
        assert count, f"{name} no longer says {printed}"
    monkeypatch.chdir(tmp_path)
    names = (PREPARED.get(name) or dict)() or {}
    capsys.readouterr()
    exec(code, names)
    out = capsys.readouterr().out
    assert HOLDS.get(name, lambda names, out: True)(names, out)
    if name.startswith("ops/"):
        assert out.splitlines() == PRINTED.findall(code)


def test_what_does_not_run_has_a_good_reason():
    reasons = {(name, block["reason"]) for name in PAGES for block in BLOCK.finditer(page(name)) if block["reason"]}
    assert all(re.match(r"needs \w+", reason) for _, reason in reasons)
    assert {"scale.md", "from-trl-ppo.md"} <= {name for name, _ in reasons}


def leaves(nav):
    """The files of a navigation, from the top."""
    for entry in nav:
        for value in entry.values():
            yield from leaves(value) if isinstance(value, list) else [value]


def test_the_site_has_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(leaves(nav)) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    prose = re.sub(r"```.*?```", "", page(name), flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", prose):
        target = (DOCS / name).parent / (path or Path(name).name)
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_out_of_the_site_become_names_and_pictures_come_along():
    def at(name):
        return SimpleNamespace(file=SimpleNamespace(src_uri=name))

    spec = importlib.util.spec_from_file_location("site_links", ROOT / ".ci" / "site_links.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    text = "[a](../benchmarks/x.py), [benchmarks/y](../benchmarks/y), [the rule](../CONTRIBUTING.md#rules), [b](b.md)"
    said = "a (`benchmarks/x.py`), `benchmarks/y`, the rule (`CONTRIBUTING.md`), [b](b.md)"
    assert hook.on_page_markdown(text, page=at("a.md")) == said
    text = "![c](../../benchmarks/c.png), [d](../d.md#e), [f](../../g/f.py)"
    assert hook.on_page_markdown(text, page=at("ops/a.md")) == "![c](../benchmarks/c.png), [d](../d.md#e), f (`g/f.py`)"


def test_every_flag_of_a_command_exists():
    from rlhf_fast.cli import SOURCES, config_class

    used = []
    for name in PAGES:
        for command, flags in re.findall(r"^rlhf-fast (\w+)((?:.*\\\n)*.*)$", page(name), re.MULTILINE):
            if command == "doctor":
                continue
            fields = {field.name for field in dataclasses.fields(config_class(command))}
            for flag in re.findall(r"--(\w+)", flags.split("#")[0]):
                assert flag in fields | SOURCES[command].keys() | {"sweep", "config"}, f"{name}: {command} --{flag}"
                used.append(flag)
    assert len(used) > 10


#: What the tables of the page about TRL say; tests/integrations/trl_ppo_page.py holds them to TRL's own.
GIVEN = {"none": None, "true": True, "false": False}


def table(header):
    """The rows below the one that begins with ``header`` in the page about TRL, each a list of cells."""
    _, _, rest = page("from-trl-ppo.md").partition(f"| {header}")
    for line in rest.split("\n")[2:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_fields_of_the_migration_are_ours_with_our_defaults():
    from rlhf_fast.trainers.ppo import PPOConfig

    defaults = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
    remarks = ""
    for _, ours, remark in table("TRL's `PPOConfig`"):
        remarks += remark
        if ours == "–":
            assert remark
            continue
        name, said = re.fullmatch(r"`(\w+)` \((.+)\)", ours).groups()
        default = defaults[name]
        assert default == (said if isinstance(default, str) else GIVEN[said] if said in GIVEN else float(said)), name
    assert {"cliprange_high", "critic_learning_rate"} <= set(re.findall(r"`(\w+)`", remarks)) & defaults.keys()


def test_the_arguments_of_the_migration_are_ours():
    import inspect

    from rlhf_fast.trainers.ppo import PPOTrainer

    ours = [name for _, cell, _ in table("TRL's `PPOTrainer`") for name in re.findall(r"`(\w+)`", cell)]
    known = inspect.signature(PPOTrainer).parameters.keys()
    assert set(ours) == known - {"output_dir", "generator"}  # which TRL has in its config, and not at all


def test_the_figures_of_the_migration_are_ours():
    from rlhf_fast.metrics import METRICS

    ours = [name for _, cell, _ in table("TRL logs") for name in re.findall(r"`(\w+)`", cell)]
    assert len(ours) > 8
    assert set(ours) <= METRICS.keys()


def test_the_symptoms_are_those_that_are_watched_for():
    from rlhf_fast.trainers.watch import Watch

    assert re.findall(r"^### `(\w+)`", page("faq.md"), re.MULTILINE) == [*Watch().checks]


def test_what_is_said_to_be_refused_is_refused_in_these_words():
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "rlhf_fast").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?["\']|\'\s*\n\s*f?["\']', "", source)  # a sentence goes on in the next line
    source = re.sub(r"\{[^{}]*\}", "…", source)
    said = re.findall(r"^\| `(.+?)` \|", page("faq.md"), re.MULTILINE)
    assert len(said) > 20
    for sentence in said:
        for part in sentence.split("…"):
            assert part.strip() in source, f"{sentence!r}: nothing says {part!r}"
