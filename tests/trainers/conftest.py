"""The numbers of the trainers are held to float64 on the CPU; tests/test_gpu_trainers.py holds a GPU to the CPU."""

from collections.abc import Iterator

import pytest
from tiny import accelerate_on


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with accelerate_on("cpu"):
        yield
