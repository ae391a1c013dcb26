"""Here a scenario is simply called. (The lecturer's grader runs it in a process of its own.)"""

import pytest
import torch


@pytest.fixture
def run():
    def call(scenario, *arguments):
        with torch.no_grad():
            return scenario(*arguments)

    return call
