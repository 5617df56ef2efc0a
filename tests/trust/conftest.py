from tests.benchmarks.conftest import stl10_files  # noqa: F401
