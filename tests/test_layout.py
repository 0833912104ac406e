"""The three laws of the tree (CONTRIBUTING.md), asserted: one op one word, one chooser, imports flow one way."""

import ast
import re
from pathlib import Path

import pytest

import rlhf_fast.ops  # noqa: F401
from rlhf_fast.dispatch import IMPLEMENTATIONS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlhf_fast"
PYTHON = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels" / "triton").rglob("*.py")])
OPS = {name for name in IMPLEMENTATIONS if not name.endswith("_backward")}

# Each module may import those to its left and its own neighbours in the same group.
LAYERS = (
    {"triton_kernels"},
    {"dispatch", "products"},
    {"ops"},
    {"losses"},
    {
        "models",
        "pretrained",
        "sharded",
        "zero",
        "sharing",
        "data",
        "records",
        "columns",
        "preferences",
        "generate",
        "generators",
        "beams",
        "candidates",
        "attention",
        "packing",
        "rollout",
        "shaping",
        "rewards",
    },
    {"metrics", "report", "trainers"},
    {"demo", "evaluation", "integrations"},
    {"cli", "commands", "flags", "doctor", "sweep", "bench"},
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}

# Not the kernels of an op, but what several of that language share.
SHARED = {"kernels/cuda/launch", "kernels/triton/rows"}


def module_of(path: Path) -> str:
    if "kernels" in path.parts:
        return "triton_kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files_of(op: str) -> list[Path]:
    """The op's file, or the files of the folder it became when it passed 300 lines."""
    folder = PACKAGE / "ops" / op
    return sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / "ops" / f"{op}.py"]


def functions(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def public(tree: ast.Module):
    """Public functions and classes of a module, and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def test_every_op_has_its_files():
    for op in OPS:
        for path in (*files_of(op), PACKAGE / "bench" / f"{op}.py", ROOT / "tests" / "ops" / f"test_{op}.py"):
            assert path.exists(), f"{op} lacks {path.relative_to(ROOT)}"


def test_the_worked_example_has_all_of_them():
    for file in ("csrc/cpu/gae.cpp", "kernels/cuda/gae.cu", "kernels/triton/gae.py", "rlhf_fast/bench/gae.py"):
        assert (ROOT / file).exists()


@pytest.mark.parametrize("pattern", ["csrc/cpu/*.cpp", "kernels/cuda/*.cu", "kernels/triton/[a-z]*"])
def test_a_kernel_file_is_named_after_its_op(pattern):
    """Or the folder that it became."""
    for path in ROOT.glob(pattern):
        name = str(path.relative_to(ROOT).with_suffix(""))
        assert name in SHARED or path.stem in OPS, f"{name} names no op"


def test_each_kernel_is_found_by_the_dispatcher():
    from rlhf_fast import dispatch

    for module, implementation, folder in (("_cpu", "cpp", "csrc/cpu"), ("_cuda", "cuda", "kernels/cuda")):
        if isinstance(dispatch.extension(module), str):
            continue  # not built here: RLHF_FAST_CPP=OFF, or a machine without nvcc
        for op in OPS:
            if list((ROOT / folder).glob(f"{op}.c*")):
                assert implementation in IMPLEMENTATIONS[op], f"{module} lacks {op}: is it bound?"


@pytest.mark.parametrize("path", PYTHON, ids=ids(PYTHON))
def test_imports_flow_one_way(path):
    if path == PACKAGE / "__init__.py":
        return  # the public names, from everywhere
    own = LEVEL[module_of(path)]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "rlhf_fast" and len(parts) > 1 and parts[1] in LEVEL:
                assert LEVEL[parts[1]] <= own, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", PYTHON, ids=ids(PYTHON))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for function in functions(ast.parse(text)):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        assert lines <= 50, f"{function.name} is {lines} lines long"


@pytest.mark.parametrize("path", PYTHON, ids=ids(PYTHON))
def test_public_things_are_typed_and_documented(path):
    for node in public(ast.parse(path.read_text())):
        assert ast.get_docstring(node), f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            is_kernel = "kernels" in path.parts  # Triton reads annotations as types: pointers have none
            assert is_kernel or not untyped, f"{node.name}: {untyped} have no type"
            assert is_kernel or node.returns is not None, f"{node.name} has no return type"


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_tensor_argument_of_an_op_has_a_shape_comment(op):
    for path in files_of(op):
        check_shape_comments(op, path)


def check_shape_comments(op: str, path: Path):
    lines = path.read_text().splitlines()
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef) or node.name not in (op, "reference", "backward"):
            continue
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            annotation = ast.unparse(argument.annotation)
            if re.search(r"\bTensor\b", annotation):
                line = lines[argument.lineno - 1]
                assert re.search(r"#.*(\[.*\]|0-d)", line), f"{op}: {node.name}({argument.arg}) has no shape comment"


@pytest.mark.parametrize("path", PYTHON, ids=ids(PYTHON))
def test_the_environment_is_read_by_the_command_line_only(path):
    if module_of(path) != "cli":
        assert not re.search(r"\benviron\b|\bgetenv\b", path.read_text())


def test_every_package_is_in_the_wheel():
    lines = (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    listed = set(re.findall(r'"(rlhf_fast[\w.]*)"', lines))
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    kernels = ROOT / "kernels" / "triton"
    folders = [path.parent.relative_to(kernels).parts for path in kernels.rglob("__init__.py")]
    assert listed == found | {".".join(("rlhf_fast", "triton_kernels", *parts)) for parts in folders}


def test_no_module_is_named_after_nothing():
    forbidden = {"utils", "helpers", "common", "misc", "core", "base"}
    assert not [path for path in PYTHON if path.stem in forbidden]


def test_hugging_face_kernels_is_not_shadowed():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_only_dispatch_talks_to_the_dispatcher():
    for path in PYTHON:
        if path.name != "dispatch.py":
            assert "torch.library" not in path.read_text(), f"{path} talks to torch.library"
