"""rf.patch("trl") with an older TRL: its functions, its losses, DPO's trainer, in a process that finds it first."""

import sys
from pathlib import Path

import pytest
from peers import needs, passes_with

from rlhf_fast.integrations.patching import release

needs("trl")

OLDER = Path(sys.prefix) / "older"


@pytest.mark.skipif(not OLDER.exists(), reason="there is no older TRL: make test installs one into .venv/older")
def test_an_older_trl_is_patched_alike():
    """Before 1.15 the head stands elsewhere and DPO's loss comes from logits: code that the newest TRL never runs."""
    chosen = "not same_steps and not alike or same_steps[dpo]"
    version, _ = passes_with(OLDER, "trl", ["test_trl.py", "test_trl_losses.py"], "-k", chosen)
    assert release(version) < (1, 15, 0)
