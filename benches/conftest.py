import sys
from pathlib import Path

# for `import loss` and `import rivals`: importlib mode adds no path
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="the benches' full shapes: slow, and appends to benches/results/",
    )
