"""Does the wheel work with torch alone? ``check_wheel.py WHEEL TORCH...`` runs the tests of the ops in empty venvs.

Of each version: what the wheel holds, that a process has one OpenMP and C++ serves every op, then tests/ops but for
Triton's forms, from a folder in which only the wheel can be imported.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

LIMIT = 5_000_000  # bytes
ROOT = Path(__file__).parents[1]
SETTINGS = "[pytest]\naddopts = --import-mode=importlib -q\npythonpath = tests\nmarkers = ops(*names)\n"
PROBE = """
import sys, torch, rlhf_fast
from rlhf_fast import dispatch
assert torch.__version__.split("+")[0] == sys.argv[1], torch.__version__
assert rlhf_fast.__file__.startswith(sys.prefix), rlhf_fast.__file__
for op in dispatch.IMPLEMENTATIONS:
    assert dispatch.serving(op, "CPU") == "cpp" or op.endswith("_backward"), op  # gae_backward calls gae
maps = [line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1].rsplit("/")[-1]]
assert len({path for path in maps if ".so" in path}) == 1, set(maps)
print(sys.version.split()[0], "torch", torch.__version__, "one", maps[0].rsplit("/")[-1])
"""


def check_contents(wheel: Path) -> None:
    """Small, for any Linux of its tag, both modules in it and no library of others'."""
    assert wheel.stat().st_size <= LIMIT, f"{wheel.name} has {wheel.stat().st_size} bytes, more than {LIMIT}"
    assert "manylinux" in wheel.name, f"{wheel.name} is for this machine alone: auditwheel has not seen it"
    names = zipfile.ZipFile(wheel).namelist()
    compiled = [name for name in names if ".so" in name]
    assert {name.split(".")[0] for name in compiled} <= {"rlhf_fast/_cpu", "rlhf_fast/_cuda"}, compiled
    assert any(name.startswith("rlhf_fast/_cpu.") for name in compiled), compiled
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {', '.join(compiled)}")


def check_with(wheel: Path, torch_version: str, folder: Path) -> None:
    """Install into an empty venv and run the tests there."""
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command: str) -> None:
        subprocess.run([python, *command], check=True, cwd=folder, env=environment)

    run("-m", "pip", "install", "-q", f"torch=={torch_version}", "numpy")
    run("-m", "pip", "install", "-q", "--no-deps", str(wheel.resolve()))
    run("-m", "pip", "check")
    run("-c", PROBE, torch_version)
    run("-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), "pytest", "pytest-xdist", "hypothesis")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("simt", "__pycache__"))
    (folder / "pytest.ini").write_text(SETTINGS)
    run("-m", "pytest", "tests/ops", "-k", "not triton", "-n", "logical", "--maxprocesses", "8", "--dist", "worksteal")


def main() -> None:
    """Check the wheel that the command line names with each version of torch."""
    wheel, *versions = sys.argv[1:]
    check_contents(Path(wheel))
    for version in versions:
        with tempfile.TemporaryDirectory(prefix="rlhf-fast-wheel-") as folder:
            check_with(Path(wheel), version, Path(folder))


if __name__ == "__main__":
    main()
