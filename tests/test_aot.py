"""Every GPU kernel compiles for every architecture without a GPU, spills nothing and takes what resources.md says."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import resources
from resources import ARCHITECTURES, ROOT, SEEN, TABLE, Resources

HALVES = ("rlhf_fast::cuda::bfloat16", "rlhf_fast::cuda::float16")


@pytest.fixture(scope="module")
def triton_rows() -> list[Resources]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "resources.py"), "--triton"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return [Resources(name, *map(int, numbers[:-1]), scan=numbers[-1]) for name, *numbers in rows]


@pytest.fixture(scope="module")
def nvcc_rows() -> list[Resources]:
    if resources.nvcc_version() is None:
        pytest.skip("nvcc is not installed")
    return resources.nvcc_resources()


def expect_no_spill(rows: list[Resources]) -> None:
    assert {row.architecture for row in rows} == set(ARCHITECTURES)
    assert [row for row in rows if row.stack or row.local] == []


def committed(heading: str) -> str:
    """The part of resources.md under ``heading``; skips where it was written with another version."""
    for part in TABLE.read_text().split("\n## ")[1:]:
        if part.startswith(f"{heading}\n"):
            return f"## {part.rstrip()}\n"
    pytest.skip(f"resources.md was not written with {heading}")


def test_triton_kernels_compile_without_spills(triton_rows: list[Resources]) -> None:
    folder = ROOT / "kernels" / "triton"
    sources = {path.stem: path for path in folder.glob("*.py")} | {
        p.parent.name: p for p in folder.glob("*/__init__.py")
    }
    ops = {name for name, path in sources.items() if f"\ndef {name}(" in path.read_text()}  # else what several share
    assert ops == {op.removesuffix("_backward") for op in resources.TRITON_CALLS}
    expect_no_spill(triton_rows)


def test_triton_kernels_compile_once_for_all_lengths(triton_rows: list[Resources]) -> None:
    compiled = Counter((row.kernel, row.architecture) for row in triton_rows)
    assert set(compiled.values()) == {1}
    variants = {variant for calls in resources.TRITON_CALLS.values() for variant in calls}
    found = {(kernel.split(", ")[1], architecture) for kernel, architecture in compiled}
    assert found == {(variant, architecture) for variant in variants for architecture in ARCHITECTURES}


def test_rows_are_read_16_bytes_at_a_time_where_they_lie_so(triton_rows: list[Resources]) -> None:
    widest = {}
    for row in triton_rows:
        if row.kernel.startswith(("kl", "logprobs")):
            widest.setdefault(row.kernel.split()[-1], set()).add(row.loop)
    assert widest == {"even": {16}, "odd": {2, 4}}


def test_cuda_kernels_compile_without_spills(nvcc_rows: list[Resources]) -> None:
    expect_no_spill(nvcc_rows)


@pytest.mark.parametrize("op", ["logprobs", "kl"])
def test_cuda_kernels_move_sixteen_bytes_at_a_time(nvcc_rows: list[Resources], op: str) -> None:
    """Where logits lie side by side and aligned; the forward writes a few numbers per row, the backward a row."""
    dtypes = {
        "logprobs": [f"{t}, true, {cap}" for t in ("float", *HALVES) for cap in ("false", "true")],
        "kl": [f"{t}, float" for t in ("float", *HALVES)],
    }
    seen = {row.kernel: row for row in nvcc_rows if row.architecture == SEEN}
    for dtype in dtypes[op]:
        assert seen[f"{op}_kernel<{dtype}>"].load == 16
        backward = seen[f"{op}_backward_kernel<{dtype}>"]
        assert (backward.load, backward.store) == (16, 16)


def test_the_built_module_is_read_only_if_it_is_of_the_sources(monkeypatch, tmp_path) -> None:
    built = resources.built_module()
    if built is None:
        pytest.skip("_cuda is not built here, or not for every architecture")
    module, source = tmp_path / "rlhf_fast" / built.name, tmp_path / "kernels" / "cuda" / "gae.cu"
    for path in (tmp_path / "CMakeLists.txt", tmp_path / "csrc" / "ops.h", source, module):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shutil.copyfile(built, module)
    cuda = SimpleNamespace(toolkit=resources.nvcc_version(), __file__=str(module))
    monkeypatch.setattr(resources, "ROOT", tmp_path)
    monkeypatch.setattr(resources.dispatch, "extension", lambda name: cuda)
    assert resources.built_module() == module
    with monkeypatch.context() as other:
        other.setattr(cuda, "toolkit", "12.9.86")
        assert resources.built_module() is None
    with monkeypatch.context() as other:
        other.setattr(resources, "ARCHITECTURES", (*ARCHITECTURES, 130))
        assert resources.built_module() is None
    written = module.stat().st_mtime
    os.utime(source, (written + 1, written + 1))
    assert resources.built_module() is None


def test_widest_access_of_a_listing() -> None:
    code = "/*0*/ LDG.E.U16 R2, [R4] ; @P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ; LDS.128 R4 ; STG.E [R2], R4 ; "
    assert resources.widest(code, "LDG|LD") == 16
    assert resources.widest(code, "STG|ST") == 4
    assert resources.widest(code, "LDGSTS") == 0
    assert resources.widest("LDG.E.U16 R2, [R4] ;", "LDG|LD") == 2


def test_scan_of_gae_has_one_layout(triton_rows: list[Resources]) -> None:
    """Padded and packed rows have the same bits only if all variants are scanned in the same shape; so advantages."""
    scans = {row.scan for row in triton_rows if row.kernel.startswith(("gae_", "advantages_")) and row.scan}
    assert len(scans) == 1
    assert "sizePerThread = [1]" in scans.pop()


def test_committed_table_of_triton(triton_rows: list[Resources]) -> None:
    import triton

    assert resources.section("Triton", triton.__version__, triton_rows) == committed(f"Triton {triton.__version__}")


def test_committed_table_of_nvcc(nvcc_rows: list[Resources]) -> None:
    version = resources.nvcc_version()
    assert version is not None
    assert resources.section("nvcc", version, nvcc_rows) == committed(f"nvcc {version}")
