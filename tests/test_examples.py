"""Every example runs as it stands, and what it prints got better."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny import accelerate_on

FOLDER = Path(__file__).parent.parent / "examples"
PARTS = {"small_model"}  # what the examples import
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in PARTS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path)])
    monkeypatch.syspath_prepend(str(FOLDER))
    torch.manual_seed(0)
    with accelerate_on("cpu"):
        runpy.run_path(str(path), run_name="__main__")
    (found,) = re.findall(r"(-?[\d.]+) before, (-?[\d.]+) after; the \w+ is in (\S+)", capsys.readouterr().out)
    assert float(found[1]) > float(found[0]) + 0.5
    assert (Path(found[2]) / "model.safetensors").is_file()
