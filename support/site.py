"""The site of a model: the block after which, and the channel in which, KVSink predicts the sinks.

What this file does not do: Table 3 and the finder are kvsink.py's. A user who gives --layer and
--channel needs neither (cli.py's `chosen_site`).
"""

import json

from kvsink import PROMPTS, TABLE_3, Site, find_site, table_site
from support import hub
from support.cache import (
    cache_directory,
    checksum_matches,
    lock,
    write_atomically,
    write_checksum,
)


def site_of(model, tokenizer, name, directory):
    """Return the Site of a model: Table 3's if it lists the name, else the finder's. Our cache
    remembers what the finder found, until the checkpoint in `directory` changes."""
    config = model.config
    if site := listed_site(name, config.num_hidden_layers, config.hidden_size):
        return site
    path = cache_directory() / "sites" / f"{hub.fingerprint(directory)}.json"
    with lock(path):
        if checksum_matches(path):
            return Site(*json.loads(path.read_text(encoding="utf-8")))
        site = find_site(model, [tokenizer.encode(prompt) for prompt in PROMPTS])
        write_atomically(path, json.dumps(site).encode())
        write_checksum(path)
    return site


def listed_site(name, layers, hidden_size):
    """Return Table 3's Site for the name of a model, or None if the table does not list it, or
    lists a model of another shape under that name."""
    row = TABLE_3.get(name)
    if row and (row.layers, row.hidden_size) == (layers, hidden_size):
        return table_site(name)
    return None
