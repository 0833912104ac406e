"""Builds the two extension modules with CMake; everything else about the package is in pyproject.toml.

Knobs, all from the environment: RLHF_FAST_CPP=OFF (pure Python), RLHF_FAST_CUDA=AUTO|ON|OFF,
RLHF_FAST_CUDA_ARCHS="80-real;90-real", MAX_JOBS, CUDACXX or CUDA_HOME; RLHF_FAST_VARIANT=cu12 puts "+cu12" behind the
version, for a wheel that is not the one of the package index.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """One CMake run builds both modules into the folder where setuptools wants the package."""

    def run(self) -> None:  # noqa: D102
        import pybind11

        root = Path(__file__).parent.resolve()
        package = root if self.inplace else Path(self.build_lib).resolve()
        build = (Path(self.build_temp) / "cmake").resolve()
        environment = dict(os.environ)
        # cmake and ninja may be installed beside a Python whose folder is not on the PATH.
        environment["PATH"] = os.pathsep.join([environment.get("PATH", os.defpath), str(Path(sys.executable).parent)])
        if "CUDACXX" not in environment and "CUDA_HOME" in environment:
            environment["CUDACXX"] = str(Path(environment["CUDA_HOME"]) / "bin" / "nvcc")
        options = [
            # Named anew, for the one of the last build was pip's own and is gone with its environment.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=environment['PATH']) or 'ninja'}",
            f"-DCMAKE_INSTALL_PREFIX={package / 'rlhf_fast'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRLHF_FAST_CUDA={os.environ.get('RLHF_FAST_CUDA', 'AUTO')}",
            f"-DRLHF_FAST_CUDA_ARCHS={os.environ.get('RLHF_FAST_CUDA_ARCHS', '')}",
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (
            ["cmake", "-G", "Ninja", "-S", str(root), "-B", str(build), *options],
            ["cmake", "--build", str(build), "--parallel", jobs],
            ["cmake", "--install", str(build)],
        ):
            subprocess.run(command, check=True, env=environment)

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing to link back: an editable install has the modules in the source tree already."""
        return {}

    def get_outputs(self) -> list[str]:
        """The modules that the CMake run installed."""
        return [str(path) for path in Path(self.build_lib).glob("rlhf_fast/_c*.so")]


if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools {setuptools.__version__} cannot read the licence in pyproject.toml: 77 or newer is needed")
variant = os.environ.get("RLHF_FAST_VARIANT", "")
options = {"egg_info": {"tag_build": f"+{variant}"}} if variant else {}
if os.environ.get("RLHF_FAST_CPP", "ON").upper() in ("OFF", "0", "FALSE"):
    setup(options=options)
else:
    setup(ext_modules=[Extension("rlhf_fast._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild}, options=options)
