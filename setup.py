"""Everything is in pyproject.toml except this: the kernels lie in the top-level folder kernels/ but
are imported as fastsiu.kernels.

A top-level *module* called `kernels` is Hugging Face's, and transformers imports it, so the folder
must not be a package: it has no __init__.py. The wheel gets it from the mapping below, a checkout
from the symlink fastsiu/kernels -> ../kernels, and the source distribution holds it twice."""

from setuptools import setup

setup(
    packages=[
        "fastsiu",
        "fastsiu.kernels",
        "fastsiu.cli",
        "fastsiu.guards",
        "fastsiu.text",
        "fastsiu.loss",
        "fastsiu.model",
        "fastsiu.samples",
        "fastsiu.evaluate",
        "fastsiu.evaluate.deep",
        "fastsiu.compare",
        "fastsiu.report",
        "fastsiu.demo",
    ],
    package_dir={"fastsiu.kernels": "kernels"},
)
