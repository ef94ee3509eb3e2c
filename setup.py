"""Everything is in pyproject.toml except two things. The kernels lie in the top-level folder
kernels/ but are imported as fastsiu.kernels; and one of them is C++.

A top-level *module* called `kernels` is Hugging Face's, and transformers imports it, so the folder
must not be a package: it has no __init__.py. The wheel gets it from the mapping below, a checkout
from the symlink fastsiu/kernels -> ../kernels, and the source distribution holds it twice."""

import runpy
from importlib.util import find_spec
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

# torch is at hand where the wheel is built for its own machine (--no-build-isolation), and not
# where it is built for others: that one stays the same for every platform, and the first use of the
# CPU kernel compiles it (kernels/notes/cpu-kernel.md).
FOR_THIS_MACHINE = find_spec("torch") is not None


class BuildWithKernel(build_py):
    """Puts the CPU kernel's libraries beside its source; without a compiler there are none."""

    def run(self) -> None:
        super().run()
        if not FOR_THIS_MACHINE or self.editable_mode:
            return
        cpu = runpy.run_path(str(Path(__file__).parent / "kernels" / "cpu_build.py"))
        try:
            cpu["build"](Path(self.build_lib) / "fastsiu" / "kernels" / "cpu", cpu["compiles"]())
        except (cpu["CannotBuild"], OSError) as error:
            self.warn(f"{error} The loss will run without it.")


class ForThisMachine(Distribution):
    def has_ext_modules(self) -> bool:  # a wheel with libraries is no wheel for every platform
        return FOR_THIS_MACHINE


setup(
    cmdclass={"build_py": BuildWithKernel},
    distclass=ForThisMachine,
    packages=[
        "fastsiu",
        "fastsiu.kernels",
        "fastsiu.cli",
        "fastsiu.guards",
        "fastsiu.text",
        "fastsiu.pictures",
        "fastsiu.loss",
        "fastsiu.model",
        "fastsiu.judging",
        "fastsiu.samples",
        "fastsiu.step",
        "fastsiu.evaluate",
        "fastsiu.evaluate.benchmarks",
        "fastsiu.evaluate.deep",
        "fastsiu.evaluate.suites",
        "fastsiu.compare",
        "fastsiu.report",
        "fastsiu.show",
        "fastsiu.disk",
        "fastsiu.workers",
        "fastsiu.app",
        "fastsiu.demo",
    ],
    package_dir={"fastsiu.kernels": "kernels"},
)
