"""The two hooks by which a KVSinkCache follows the forward passes of its model.

What this file does not do: what they call, `before_forward` and `after_emergence`, is in
kvsink_cache.py.
"""

import functools
import inspect
import weakref

from kvsink import NOWHERE


def register_hooks(cache):
    """Put the hooks of a cache on its model: one on the decoder, which sees the tokens that come,
    and one on block l_E, which sees channel c. Return a function that removes them, which also runs
    when the cache is garbage-collected."""
    reference = weakref.ref(cache)
    before_forward = functools.partial(call_if_used, reference, "before_forward")
    hooks = [cache.decoder.register_forward_pre_hook(before_forward, with_kwargs=True)]
    if cache.rule.site != NOWHERE:
        block = cache.decoder.layers[cache.rule.site.l_E - 1]
        after_emergence = functools.partial(call_if_used, reference, "after_emergence")
        hooks.append(block.register_forward_hook(after_emergence, with_kwargs=True))

    def remove_hooks():
        for hook in hooks:
            hook.remove()

    return weakref.finalize(cache, remove_hooks)


def call_if_used(cache, method, module, args, kwargs, *output):
    """A hook: call this method of the cache if the forward pass of `module` uses the cache. `cache`
    is a weak reference, so that its hooks do not keep it alive."""
    # The cache may be passed positionally or under another keyword.
    arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments | kwargs
    if cache() is not None and any(value is cache() for value in arguments.values()):
        getattr(cache(), method)(arguments, *output)
