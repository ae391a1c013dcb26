"""Values as bytes, between the grader and the student's process: JSON, in which an array is a
dictionary. Not pickle, because a student's code makes them."""

import base64
import json

import numpy as np

DTYPES = ("|b1", "|u1", "|i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")


def encode(value):
    """Return the bytes of a value: a number, a string, None, a NumPy array, or a list of values or
    a dictionary of them with strings as keys. Raises TypeError for any other."""

    def array_to_json(x):
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{type(x).__name__} is neither a number nor a tensor")
        data = base64.b64encode(x.tobytes()).decode()
        return {"array": x.dtype.str, "shape": x.shape, "data": data}

    return json.dumps(value, default=array_to_json).encode()


def decode(data):
    """Undo `encode`. Raises ValueError for bytes that it cannot have made."""

    def array_from_json(x):
        if "array" not in x:
            return x
        if x["array"] not in DTYPES:
            raise ValueError(f"{x['array']} is no dtype of an array")
        return np.frombuffer(base64.b64decode(x["data"]), x["array"]).reshape(x["shape"]).copy()

    try:
        return json.loads(data, object_hook=array_from_json)
    except (KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a value: {error}") from None
