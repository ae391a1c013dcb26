"""Functions as text: cut out of the reference for the handout, put in from a submission for the
grader.

Read top to bottom: where the functions of a file are; the stub that a student gets; the file that
the grader runs.

What this file does not do: it runs nothing of what it reads. A name is qualified, as in
"Quantizer.calibrate".
"""

import ast
import functools
import textwrap


def functions_of(tree):
    """Qualified name -> node, of the functions and methods at the top of a file. The last
    definition counts."""
    found = {}
    for node in tree.body:
        is_class = isinstance(node, ast.ClassDef)
        for part in node.body if is_class else [node]:
            if isinstance(part, ast.FunctionDef):
                found[f"{node.name}.{part.name}" if is_class else part.name] = part
    return found


def lines_of(node):
    """The first and the last line of a function, from 1, decorators included."""
    return min(
        [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
    ), node.end_lineno


def replaced(text, changes):
    """The text with lines first to last, from 1, replaced: `changes` are (first, last, new
    text)."""
    lines = text.splitlines(keepends=True)
    for first, last, new in sorted(changes, reverse=True):
        lines[first - 1 : last] = [new]
    return "".join(lines)


# --------------------------------------------------------------------------------------------------
# The handout


def stubbed(text, stubs):
    """The file with the body of each function in `stubs`, name -> (message, cut), replaced by
    NotImplementedError(message). Signature and docstring stay; with `cut` only the docstring's
    first paragraph does."""
    functions, changes, lines = functions_of(ast.parse(text)), [], text.splitlines()
    for name, (message, cut) in stubs.items():
        node, doc = functions[name], functions[name].body[0]
        indent = " " * doc.col_offset
        kept = lines[doc.lineno - 1 : doc.end_lineno]
        if cut and "" in kept:
            kept = kept[: kept.index("")]
            kept[-1] += '"""'
        stub = [*kept, f'{indent}raise NotImplementedError("{message}")', ""]
        changes.append((doc.lineno, node.end_lineno, "\n".join(stub)))
    return replaced(text, changes)


# --------------------------------------------------------------------------------------------------
# The grader


class Absent(Exception):
    """A file or a function that a student's folder does not have, in one line."""


def parsed(folder, name):
    """The tree of a file in a student's folder. Raises Absent where there is none."""
    path = folder / name
    if (
        not path.is_file() or folder.resolve() not in path.resolve().parents
    ):  # a link may lead to the reference
        raise Absent(f"{name} is not there")
    if path.stat().st_size > 1_000_000:
        raise Absent(f"{name} is larger than 1 MB")
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise Absent(f"{name}, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise Absent(f"{name} is not Python") from None


def merged(text, tree, names):
    """The reference's file with the student's functions `names` in the places of its own, and what
    these need of the student's own names: imports, functions, classes and constants, after the
    reference's imports; methods beside them. All else of the student's file is left out, above all
    what would run when it is imported. Raises Absent where the student has no such function."""
    reference, theirs = parsed_reference(text), functions_of(tree)
    own = functions_of(reference)
    if missing := [name for name in names if name not in theirs]:
        raise Absent(f"{missing[0]} is not there")
    known = bindings(reference).keys() | own.keys()
    offered = {name: node for name, node in (bindings(tree) | theirs).items() if name not in known}
    needed, waiting = {}, [theirs[name] for name in names]
    while waiting:  # what is needed by what is needed
        for name in names_in(waiting.pop()):
            for full in {name, *(f"{owner_of(n)}.{name}" for n in names)} & offered.keys():
                needed[full] = offered.pop(full)
                waiting.append(needed[full])
    beside = [node for node in tree.body if node in needed.values()]
    last_import = max(
        node.end_lineno for node in reference.body if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    line = text.splitlines(keepends=True)[last_import - 1]
    changes = [
        (last_import, last_import, line + "".join(f"{ast.unparse(node)}\n" for node in beside))
    ]
    for name in names:
        methods = [
            node
            for full, node in needed.items()
            if "." in full and owner_of(full) == owner_of(name)
        ]
        body = "\n".join(ast.unparse(node) for node in [theirs[name], *methods])
        changes.append(
            (*lines_of(own[name]), textwrap.indent(body, " " * own[name].col_offset) + "\n")
        )
    return replaced(text, changes)


@functools.cache  # for each function of a file, and each submission
def parsed_reference(text):
    return ast.parse(text)


def owner_of(name):
    """The class of a method; nothing for a function."""
    return name.rpartition(".")[0]


def bindings(tree):
    """Name -> statement, for what a file binds at its top by import, def, class or plain
    assignment."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.partition(".")[0]: node for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                part.id: node
                for target in targets
                for part in ast.walk(target)
                if isinstance(part, ast.Name)
            }
    return found


def names_in(node):
    """All names and attributes that a piece of code mentions, in order."""
    parts = [getattr(part, "id", None) or getattr(part, "attr", None) for part in ast.walk(node)]
    return dict.fromkeys(part for part in parts if isinstance(part, str))
