"""The README's snippets run as they are printed, and the Chinese README shows the same code."""

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny import tiny_gpt2, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = [  # as printed they run for minutes, on a model that is downloaded
    ('prompts="prompts.jsonl", output_dir', 'prompts="prompts.jsonl", config=rf.PPOConfig(**SHORT), output_dir'),
    ("rf.PPOConfig(kl_coef=0.1)", "rf.PPOConfig(kl_coef=0.1, **SHORT)"),
]
SHORT = {"steps": 2, "batch_size": 4, "minibatch_size": 2, "max_new_tokens": 6}


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model called gpt2 and the data files that the README shows."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tiny_gpt2(tokenizer).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    for name, record in re.findall(r"^(\w+\.jsonl) +({.*?})", README, re.MULTILINE):
        Path(name).write_text(f"{record}\n" * 4)
    return tmp_path


def test_every_python_snippet_runs(here):
    names = {"SHORT": SHORT}
    snippets = "\n".join(blocks("README.md", "python"))
    for printed, shorter in SHORTER:
        assert snippets.count(printed) == 1
        snippets = snippets.replace(printed, shorter)
    exec(snippets, names)
    assert names["stats"]["scores"] > 0
    assert {path.name for path in (here / "runs").iterdir()} == {"sft", "reward", "ppo"}


def test_every_command_runs(here, capsys):
    from rlhf_fast.cli import main

    commands = [line for text in blocks("README.md", "bash") for line in text.splitlines() if "--model" in line]
    assert [command.split()[1] for command in commands] == ["sft", "reward", "ppo", "generate"]
    for command in commands:
        argv = shlex.split(command)[1:]
        short = SHORT.items() if argv[0] == "ppo" else ()
        assert main([*argv, *(f"--{name}={value}" for name, value in short)]) == 0


def test_the_chinese_readme_shows_the_same_code():
    for language in ("python", "bash"):
        both = [
            [re.sub(r" *#.*", "", text) for text in blocks(name, language)] for name in ("README.md", "README.zh-CN.md")
        ]
        assert both[0] == both[1]


def skeleton(name):
    """What two languages share: levels of headings, shapes of tables, links and names in code."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("#", "README"))]
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    code = {name for name in re.findall(r"`([^`\n]+)`", text) if name != "with"}
    return re.findall(r"^#+", text, re.MULTILINE), sorted(links), tables, code


def test_the_chinese_readme_has_the_same_headings_tables_links_and_names():
    assert skeleton("README.md") == skeleton("README.zh-CN.md")


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_times_faster_are_the_committed_ones(name):
    results = json.loads((ROOT / "benchmarks" / "results" / "amd-epyc-x2.json").read_text())
    text, op, count = (ROOT / name).read_text(encoding="utf-8"), "", 0
    table = text[re.search(r"^\| `logprobs`.*256 × 151936", text, re.MULTILINE).start() :].split("\n\n")[0]
    for line in table.splitlines():
        what, *_, said = (cell.strip() for cell in line.split("|")[1:-1])
        op = (re.findall(r"^`(\w+)`", what) or [op])[0]
        ratios = [ratio for row in results[op]["rows"] for ratio in row["ratios"].values()]
        for figure in said.split(" / "):
            places = len(figure.partition(".")[2])
            assert figure in {f"{ratio:.{places}f}" for ratio in ratios}, f"{op}: {figure}"
            count += 1
    assert count == 16
