"""rf.patch("trl") with an older TRL: its functions, its losses, DPO's trainer, in a process that finds it first."""

import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from peers import needs

from rlhf_fast.integrations.patching import release

needs("trl")

OLDER = Path(sys.prefix) / "older"
HERE = Path(__file__).parent
RUN = "import sys, pytest, trl; print(trl.__version__); sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.skipif(not OLDER.exists(), reason="there is no older TRL: make test installs one into .venv/older")
def test_an_older_trl_is_patched_alike():
    """Before 1.15 the head stands elsewhere and DPO's loss comes from logits: code that the newest TRL never runs."""
    (found,) = (d.version for d in distributions(path=[str(OLDER)]))
    assert release(found) < (1, 15, 0)
    files = [str(HERE / name) for name in ("test_trl.py", "test_trl_losses.py")]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not same_steps and not alike or same_steps[dpo]"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *options, *files],
        env=os.environ | {"PYTHONPATH": str(OLDER)},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[0] == found
