"""docs/from-trl-ppo.md and rf.patch("trl") with the last PPO trainer of TRL, in a process that finds that first."""

import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from peers import needs

from rlhf_fast.integrations.patching import release

needs("trl")

LAST = Path(sys.prefix) / "trl-ppo"
HERE = Path(__file__).parent
RUN = "import sys, pytest, trl; print(trl.__version__); sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.skipif(not LAST.exists(), reason="TRL has a PPO trainer until 1.12: make test installs it, .venv/trl-ppo")
def test_the_last_ppo_trainer_of_trl():
    """What is said of it where one comes from it: trl_ppo_page.py, of words, and trl_ppo_steps.py, of numbers."""
    (found,) = (d.version for d in distributions(path=[str(LAST)]))
    assert (1, 12, 0) <= release(found) < (1, 13, 0)
    files = [str(HERE / name) for name in ("trl_ppo_page.py", "trl_ppo_steps.py")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, "-q", "-x", "-p", "no:cacheprovider", *files],
        env=os.environ | {"PYTHONPATH": str(LAST), "ACCELERATE_USE_CPU": "true"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[0] == found
    assert "skipped" not in done.stdout.splitlines()[-1]
