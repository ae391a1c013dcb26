"""A student's file: it is run as Python runs it, and the functions that it makes take the place of
the reference's. worker.py calls this, in the student's process.

What this file does not do: it looks at no source text.
"""

import importlib
import importlib.util
import linecache
import sys
import traceback
import types


def take_functions(file, data, names):
    """Run the student's `file`, of these bytes, and put its functions `names` into the reference's
    module of that file. Return name -> why a function cannot be had.

    The student's module and the reference's stay apart, but both have the same functions: these of
    the student, and the reference's version of all else that the reference has.
    """
    module_name = file.removesuffix(".py").replace("/", ".")
    student, stop = run_file(file, data, module_name)
    reference = importlib.import_module(module_name)
    taken = {}
    missing = {}
    for name in names:
        try:
            owner, short_name = find_owner(student, name)
            taken[name] = owner, vars(owner)[short_name]
        except (AttributeError, KeyError, TypeError):
            missing[name] = stop or f"{name} is not in {file}"
    for name, value in list(vars(reference).items()):
        if not name.startswith("__"):
            setattr(student, name, value)
    vars(reference)["of_student"] = student
    reference.__class__ = SharedModule
    for name, (student_owner, function) in taken.items():
        owner, short_name = find_owner(reference, name)
        if owner is not reference:  # a class: the student's own methods come along
            for helper in vars(student_owner).keys() - vars(owner).keys():
                setattr(owner, helper, vars(student_owner)[helper])
        setattr(owner, short_name, function)
    return missing


def run_file(file, data, module_name):
    """Return the module that a file makes, and why it stopped before its end, or "". What it made
    before that counts."""
    module = types.ModuleType(module_name)
    sys.modules[module_name] = module
    stop = ""
    try:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise SyntaxError("the file is in UTF-16: save it in UTF-8")
        text = importlib.util.decode_source(data)
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec", dont_inherit=True), vars(module))
    except BaseException as error:  # SystemExit too
        stop = f"{file} stops: {describe(error, file)}"
    sys.modules.pop(module_name, None)
    return module, stop


def find_owner(module, name):
    """Return the module or the class that a function belongs to, and its name there."""
    owner, _, short_name = name.rpartition(".")
    return getattr(module, owner) if owner else module, short_name


class SharedModule(types.ModuleType):
    """A module of the reference. What is set in it, as scenarios do, is also set in the
    student's."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        setattr(self.of_student, name, value)


def describe(error, file):
    """Return an exception in one line: its type, its message, and the line of the student's file
    that it came from."""
    message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if frames and not isinstance(error, NotImplementedError):
        message += f" ({file}, line {frames[-1].lineno}: {frames[-1].line})"
    return message
