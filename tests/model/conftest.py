"""A machine, a process and a device, fresh for each test."""

import pytest

from hmmlab import Machine, Process


@pytest.fixture
def machine():
    return Machine(4096)


@pytest.fixture
def process(machine):
    return Process(machine)


@pytest.fixture
def device(process):
    return process.open(0)
