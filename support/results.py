"""The JSON file of results: one object per row, added as the row is done.

What this file does not do: it measures nothing (evaluate.py) and prints nothing (report.py).
"""

import json

from kvsink import AUTO, SCHEMES
from support.cache import lock, write_atomically
from support.rows import FULL_PRECISION, row_of

LARGEST_FILE = 2**26  # bytes; a row of 256 windows has 8,000
LONGEST_STRING = 4096  # characters: those of a path

# What a row measures. All other keys of a result are the settings that identify it.
MEASURED = {"ppl", "ppl_fp", "avg_bits", "stored_bits", "seconds", "nll", "kept"}


def read_results(path):
    """Return the results of earlier runs, or [] if there is no such file. Raises ValueError if the
    file holds anything else; the file is not changed."""
    if not path or not path.exists():
        return []
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError
        results = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(results, list) and all(map(is_result, results)):
            return results
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(
        f"{path} does not hold results of this program: it was left as it is, name another file"
    )


def add_result(path, result):
    """Add a result to the file as it is now: another run may have written to it since. If that run
    wrote a result with the same settings, its result stays, and this one is dropped."""

    def settings(result):
        return {key: value for key, value in result.items() if key not in MEASURED}

    with lock(path):
        results = read_results(path)
        if settings(result) not in map(settings, results):
            write_atomically(path.resolve(), json.dumps([*results, result], indent=1).encode())


def is_number(x):
    return type(x) in (int, float) and abs(x) < 2**63  # neither NaN nor inf


def is_string(x):
    """Return whether this is a string that is not too long, without a lone surrogate."""
    return type(x) is str and len(x) <= LONGEST_STRING and x == x.encode(errors="ignore").decode()


def is_result(result):
    """Return whether tables and figures can show this object. Raises an exception if it is not even
    a dict with a row's keys."""
    lists = [result.get("nll", []), result.get("kept", [])]  # one number per window
    others = [value for key, value in result.items() if key not in ("nll", "kept")]
    row = row_of(result)
    sinks = result["sinks"]
    return (
        all(is_number(x) for numbers in lists for x in numbers)
        and all(x is None or type(x) is bool or is_string(x) or is_number(x) for x in others)
        and all(is_string(result[key]) for key in ("model", "data"))
        and result["scheme"] in (FULL_PRECISION.scheme, "kvquant", *SCHEMES)
        and all(is_number(result[key]) for key in ("ppl", "ppl_fp"))
        and type(row.bits) is int
        and (type(sinks) is int and sinks >= 0 or sinks == AUTO and len(result["kept"]) > 0)
    )
