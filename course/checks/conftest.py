"""The fixture `run`, through which tests call scenarios. This one simply calls them; that of the
lecturer's grader lets a separate process call them."""

import pytest
import torch


@pytest.fixture
def run():
    def call(scenario, *arguments):
        with torch.no_grad():
            return scenario(*arguments)

    return call
