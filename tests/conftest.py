"""Test set-up: eight fake CPU devices, cheap and kept compilations, set before jax is imported."""

import os
import pathlib
import shutil
import tempfile

from tests import xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(8)}"
_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


# Files that take longest begin first, so that two workers end at about the same time.
LONGEST = ("test_readme.py", "test_processes.py", "test_train.py", "test_lora_training.py", "test_study.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the one that starts the others, or is alone
        os.environ["R3JAX_TESTS_SHARED"] = tempfile.mkdtemp(prefix="r3jax-tests-")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["R3JAX_TESTS_SHARED"], ignore_errors=True)
