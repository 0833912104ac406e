"""docs/from-trl-ppo.md and rf.patch("trl") with the last PPO trainer of TRL, in a process that finds that first."""

import sys
from pathlib import Path

import pytest
from peers import needs, passes_with

from rlhf_fast.integrations.patching import release

needs("trl")

LAST = Path(sys.prefix) / "trl-ppo"


@pytest.mark.skipif(not LAST.exists(), reason="TRL has a PPO trainer until 1.12: make test installs it, .venv/trl-ppo")
def test_the_last_ppo_trainer_of_trl():
    """What is said of it where one comes from it: trl_ppo_page.py, of words, and trl_ppo_steps.py, of numbers."""
    version, summary = passes_with(LAST, "trl", ["trl_ppo_page.py", "trl_ppo_steps.py"])
    assert (1, 12, 0) <= release(version) < (1, 13, 0)
    assert "skipped" not in summary
