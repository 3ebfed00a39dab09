"""A short version of `bench/serve_load.py`: twice what the server can bear, and those who do harm."""

import asyncio

import pytest

from bench.serve_load import measure
from tests.serving_process import encoded, serving, tiny_run


@pytest.mark.slow
def test_twice_the_load(tmp_path):
    """No crash, the excess is refused, memory is flat, who was accepted is answered in time."""
    run = tiny_run(tmp_path)
    with serving(run, encoded(run)) as (address, process):
        found = asyncio.run(measure(address, "run", process, seconds=60.0, calibration=10.0))
    print(found.as_json())
    assert found.complaints == []
