"""Where the sinks of a model of the transformers package emerge: Table 3's place, else what the
finder sees.

What this file does not do: Table 3 and the finder are kvsink.py's.
"""

import warnings
from types import SimpleNamespace

import torch

import kvsink
from quant import NotFinite
from support import hub

NOWHERE = kvsink.Site(0, 0)


def head_dim(config):
    """d_k. Not every configuration has it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Decoder(SimpleNamespace):
    """A decoder of transformers as `kvsink.find_site` looks at one."""

    def __call__(self, tokens):
        return self.decoder(input_ids=tokens, use_cache=False)


@torch.no_grad()
def site_of(decoder, tokenizer=None):
    """Table 3's, by the model's name and shape; else what the finder sees with a tokenizer, by
    default the model's. Where it sees no stable outliers: NOWHERE, and a warning."""
    from transformers import AutoTokenizer

    name = decoder.config._name_or_path
    names = {repository: short for short, repository in hub.MODELS.items()}
    short = names.get(name, name.rstrip("/").rpartition("/")[2])
    if site := hub.listed_site(short, len(decoder.layers), decoder.config.hidden_size):
        return site
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        raise ValueError(
            "this model has no tokenizer beside it: give tokenizer=, or site=Site(l_E, c)"
        ) from None
    model = Decoder(
        decoder=decoder, blocks=decoder.layers, embedding=decoder.get_input_embeddings()
    )
    try:
        return kvsink.find_site(model, [tokenizer(prompt).input_ids for prompt in kvsink.PROMPTS])
    except NotFinite:
        raise
    except ValueError as error:
        warnings.warn(
            f"no sink will be predicted: {error}. A site that you know is given as site=Site(l_E, c)"
        )
        return NOWHERE
