"""Tests call scenarios by `run`. Here it simply calls them; the lecturer's grader has one that lets
a process of its own call them."""

import pytest
import torch


@pytest.fixture
def run():
    def call(scenario, *arguments):
        with torch.no_grad():
            return scenario(*arguments)

    return call
