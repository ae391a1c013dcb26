"""The site of a model of the transformers package: the block after which its sinks are predicted,
and the channel.

What this file does not do: Table 3 and the finder are kvsink.py's.
"""

import warnings

import torch

import kvsink
from kvsink import NOWHERE
from quant import NotFinite
from support import hub
from support.site import listed_site


def site_of(decoder, tokenizer=None):
    """Return Table 3's Site if it lists the model's name and shape, else what the finder finds with
    a tokenizer, by default the model's own. If the model shows no stable outliers, warn and return
    NOWHERE."""
    from transformers import AutoTokenizer

    name = decoder.config._name_or_path
    short_names = {repository: short for short, repository in hub.MODELS.items()}
    short_name = short_names.get(name, name.rstrip("/").rpartition("/")[2])
    if site := listed_site(short_name, len(decoder.layers), decoder.config.hidden_size):
        return site
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        raise ValueError(
            "this model comes without a tokenizer: give tokenizer=, or site=Site(l_E, c)"
        ) from None
    prompts = [tokenizer(prompt).input_ids for prompt in kvsink.PROMPTS]
    try:
        with torch.no_grad():
            return kvsink.find_site(DecoderView(decoder), prompts)
    except NotFinite:
        raise
    except ValueError as error:
        advice = "If you know the site, give site=Site(l_E, c)"
        # Level 3 is the line of the user's code that makes the KVSinkCache.
        warnings.warn(f"no sink will be predicted: {error}. {advice}", stacklevel=3)
        return NOWHERE


class DecoderView:
    """A decoder of transformers with the names by which kvsink.py knows the parts of a model."""

    def __init__(self, decoder):
        self.decoder = decoder
        self.blocks = decoder.layers
        self.device = decoder.get_input_embeddings().weight.device

    def __call__(self, tokens):
        return self.decoder(input_ids=tokens, use_cache=False)
