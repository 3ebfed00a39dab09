"""requirements.lock pins what the requirements files ask for, each file by its hash."""

import re

from tests import fixtures


def pins(name: str) -> dict[str, str]:
    """{package: version} of a requirements file."""
    text = (fixtures.ROOT / name).read_text(encoding="utf-8")
    found = re.findall(r"(?m)^([\w.-]+)==([^\s;\\]+)", text)
    return {re.sub(r"[._-]+", "-", package).lower(): version for package, version in found}


def test_the_lock_is_of_these_requirements():
    locked = pins("requirements.lock")
    wanted = pins("requirements.txt") | pins("requirements-serve.txt")
    assert len(wanted) > 15 and len(locked) > len(wanted)
    assert {name: locked.get(name) for name in wanted} == wanted, "make lock"


def test_everything_locked_has_its_hashes():
    blocks = re.split(r"(?m)^(?=[\w.-]+==)", (fixtures.ROOT / "requirements.lock").read_text(encoding="utf-8"))[1:]
    assert len(blocks) == len(pins("requirements.lock"))
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
