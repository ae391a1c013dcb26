"""The checks of KVSinkCache's arguments."""

import math
import operator

import kvsink
from kvsink import AUTO, NOWHERE, Site
from paper.kvcache import check_head

ATTENTIONS = ("dequantized", "codes")


def choose_group_size(group_size, heads):
    """Return the group size, at most a head. Raises ValueError if it does not divide the heads, a
    set of numbers of channels, or if such a head cannot be packed."""
    d_k = math.gcd(*heads)
    check_head(d_k)
    group_size = min(group_size or math.gcd(128, d_k), d_k)
    if d_k % group_size:
        raise ValueError(f"group_size={group_size} does not divide a head of {d_k} channels")
    return group_size


def check_options(scheme, keep, sinks, attention):
    """Raise ValueError if there is no such scheme, number of sinks or attention."""
    if attention not in ATTENTIONS:
        raise ValueError(
            f"attention={attention!r} is neither {' nor '.join(map(repr, ATTENTIONS))}"
        )
    if scheme not in kvsink.SCHEMES:
        raise ValueError(f"scheme={scheme!r} is none of {', '.join(kvsink.SCHEMES)}")
    is_number = type(sinks) is int and sinks >= 0
    if not (is_number or sinks == AUTO):
        raise ValueError(f"sinks={sinks!r} is neither a number of tokens nor {AUTO!r}")
    if keep == "pfn" and sinks == AUTO:
        raise ValueError("keep='pfn' needs a number of tokens, such as sinks=5")


def checked_site(site, decoder):
    """Return a site, which may be a plain pair. Raises ValueError if a model has no such block or
    channel. NOWHERE fits every model."""
    if site is None:
        return None
    try:
        site = Site(*map(operator.index, site))
    except TypeError:
        raise ValueError(f"site={site!r} is not a pair Site(l_E, c)") from None
    L = len(decoder.layers)
    d = decoder.config.hidden_size
    if site != NOWHERE and not (1 <= site.l_E <= L and 0 <= site.c < d):
        limits = f"blocks 1 to {L} and channels 0 to {d - 1}"
        raise ValueError(f"{site}: this model has {limits}")
    return site
