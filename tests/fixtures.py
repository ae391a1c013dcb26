"""The fixtures of all test files: conftest.py has them for tests/, test_kvsink.py imports them."""

import pytest
import torch

from support import hub, machine
from tests import helpers

# Before a test that has a cache of its own runs a command that would name that one
machine.keep_compiled_code()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def planted():
    return helpers.planted_model()


@pytest.fixture
def sequences():
    return helpers.two_sequences()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The options of a command: a tiny planted model on a text of bytes."""
    return helpers.write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def sample_calibration(monkeypatch):
    """A text of bytes for static schemes to calibrate on, in the place of the training split."""
    monkeypatch.setattr(hub, "documents", helpers.sample_documents)


@pytest.fixture
def default_model():
    """The directory of the default model."""
    try:
        return helpers.fetched_default_model()
    except ConnectionError as error:
        pytest.skip(f"the default model and its text could not be fetched: {error}")


@pytest.fixture
def default_llama(default_model):
    """The default model itself, loaded once."""
    return helpers.loaded(default_model)
