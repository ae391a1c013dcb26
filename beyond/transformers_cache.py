"""KVSink for the models of the transformers package: what users import, and a command.

    from beyond.transformers_cache import KVSinkCache

    python -m beyond.transformers_cache --model ID    KVSinkCache beside transformers' own caches

What this file does not do: the cache is in kvsink_cache.py, the comparison in side_by_side.py.
"""

import sys

from support import cli

__all__ = ["KVSinkCache"]


def main():
    try:
        from beyond import side_by_side
    except ImportError as error:  # transformers is missing: the error says what to install
        print(f"beyond.transformers_cache: {error}", file=sys.stderr)
        return 2
    return side_by_side.main()


if __name__ == "__main__":
    cli.exit_process(main())
else:
    from beyond.kvsink_cache import KVSinkCache
