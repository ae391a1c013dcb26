"""The paper's models at their true shape (paper/shapes.py), against known numbers of parameters and
Table 3."""

import pytest
import torch

import kvsink
from llama import Llama, LlamaConfig, checkpoint_names
from paper import shapes
from support import hub, machine
from tests.helpers import PLANTED


@pytest.mark.parametrize("name, billions", [
    ("llama2-7b", 6.74),
    ("llama2-13b", 13.02),
    ("llama2-70b", 68.98),
    ("llama2-7b-chat", 6.74),
    ("mistral-7b", 7.24),
    ("llama3-8b", 8.03),
    ("llama3.1-8b-instruct", 8.03),
    ("llama3.2-1b", 1.24),
    ("llama3.2-3b", 3.21),
])  # fmt: skip
def test_the_papers_models_at_their_true_shape(name, billions):
    """They have the known numbers of parameters, a place for every tensor of a checkpoint, the
    depth and width of Table 3, and a forward pass, in shapes."""
    config = shapes.shape(name)
    with torch.device("meta"):
        model = Llama(config)
        assert model(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, config.vocab_size)
    parameters = dict(model.named_parameters())
    tied = model.W_vocab.weight.numel() if config.tie_word_embeddings else 0  # counted once
    count = sum(weight.numel() for weight in parameters.values()) - tied
    assert f"{count / 1e9:.2f}" == f"{billions:.2f}"
    assert set(checkpoint_names(config).values()) == set(parameters)
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    if row := kvsink.TABLE_3.get(name):
        assert (row.layers, row.hidden_size) == (config.num_hidden_layers, config.hidden_size)
    assert set(shapes.SHAPES) == set(hub.MODELS)


def test_a_random_model(monkeypatch):
    config = LlamaConfig.from_dict({**PLANTED, "tie_word_embeddings": True})
    model = shapes.random_model(config, "cpu", torch.float32)
    assert model.W_vocab.weight is model.embedding.weight and model.LN_final.weight.eq(1).all()
    assert model.blocks[0].W_q.weight.std() == pytest.approx(0.02, rel=0.2)
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="weights take.*are free.*--shape"):
        shapes.random_model(LlamaConfig.from_dict(PLANTED), "cpu", torch.float32)
