"""Functions as text: the handout cuts them out of the reference, the grader puts a student's into
it.

Read top to bottom: the stub that a student gets; the file that the grader runs; the parts of a
file.

What this file does not do: it runs nothing that it reads. A method has its class in its name, as in
"Quantizer.calibrate".
"""

import ast
import functools
import re
import textwrap

# --------------------------------------------------------------------------------------------------
# The handout


def stubbed(text, stubs):
    """Return a file's text in which each function of `stubs`, name -> (message, cut), has a body
    that raises NotImplementedError(message). Signature and docstring stay; with `cut`, only the
    first paragraph of the docstring does."""
    functions = functions_of(ast.parse(text))
    lines = text.splitlines()
    changes = []
    for name, (message, cut) in stubs.items():
        doc = functions[name].body[0]
        docstring = lines[doc.lineno - 1 : doc.end_lineno]
        if cut and "" in docstring:
            docstring = docstring[: docstring.index("")]
            docstring[-1] += '"""'
        indent = " " * doc.col_offset
        stub = [*docstring, f'{indent}raise NotImplementedError("{message}")', ""]
        changes.append((doc.lineno, functions[name].end_lineno, "\n".join(stub)))
    return replace_lines(text, changes)


# --------------------------------------------------------------------------------------------------
# The grader


class Absent(Exception):
    """The submission lacks a file or a function. The message is one line."""


def parse_file(folder, name):
    """Return the syntax tree of a file in a submission. Raises Absent if it is missing or cannot be
    parsed."""
    path = folder / name
    inside = folder.resolve() in path.resolve().parents  # a link may lead to the reference
    if not (path.is_file() and inside):
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
    """Return the reference's file `text` in which the functions `names` are those of a student's
    file `tree`.

    What these functions need of the student's own code comes along: imports, functions, classes
    and constants go after the reference's imports, methods beside the assigned method. All else in
    the student's file is left out, above all what would run on import. Raises Absent if the student
    does not have one of the functions.
    """
    reference = parse_reference(text)
    theirs = functions_of(tree)
    for name in names:
        if name not in theirs:
            raise Absent(f"{name} is not there")
    helpers = needed_helpers(reference, tree, names)
    changes = [insert_after_imports(text, [node for node in tree.body if node in helpers.values()])]
    for name in names:
        old = functions_of(reference)[name]
        methods = [
            node
            for full_name, node in helpers.items()
            if class_of(full_name) and class_of(full_name) == class_of(name)
        ]
        body = "\n".join(ast.unparse(node) for node in (theirs[name], *methods))
        changes.append((*lines_of(old), textwrap.indent(body, " " * old.col_offset) + "\n"))
    return replace_lines(text, changes)


def needed_helpers(reference, tree, names):
    """Return name -> node of the student's own code that the functions `names` need, and what that
    code needs in turn. A name that the reference has, too, means the reference's."""
    theirs = functions_of(tree)
    taken = bindings(reference).keys() | functions_of(reference).keys()
    candidates = {
        name: node for name, node in (bindings(tree) | theirs).items() if name not in taken
    }
    classes = dict.fromkeys(class_of(name) for name in names if class_of(name))
    helpers = {}
    waiting = [theirs[name] for name in names]
    while waiting:
        for name in names_in(waiting.pop()):
            for full_name in (name, *(f"{owner}.{name}" for owner in classes)):
                if full_name in candidates:
                    helpers[full_name] = candidates.pop(full_name)
                    waiting.append(helpers[full_name])
    return helpers


def insert_after_imports(text, nodes):
    """Return the change that adds these statements after the last import of a file."""
    imports = (ast.Import, ast.ImportFrom)
    body = parse_reference(text).body
    last = max(node.end_lineno for node in body if isinstance(node, imports))
    line = text.splitlines(keepends=True)[last - 1]
    return last, last, line + "".join(f"{ast.unparse(node)}\n" for node in nodes)


# --------------------------------------------------------------------------------------------------
# The parts of a file


@functools.cache  # the grader asks for each function, of each submission
def parse_reference(text):
    return ast.parse(text)


def functions_of(tree):
    """Return name -> node of the functions and methods at the top of a file. If a name is defined
    twice, the last definition counts."""
    functions = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    functions[f"{node.name}.{part.name}"] = part
    return functions


def class_of(name):
    """Return the class of a method, "" for a function."""
    return name.rpartition(".")[0]


def bindings(tree):
    """Return name -> statement of what a file binds at its top by import, def, class or plain
    assignment."""
    bound = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                bound[alias.asname or alias.name.partition(".")[0]] = node
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        bound[part.id] = node
    return bound


def names_in(node):
    """Return all names and attributes that a piece of code mentions, in order, each once."""
    parts = [getattr(part, "id", None) or getattr(part, "attr", None) for part in ast.walk(node)]
    return dict.fromkeys(part for part in parts if isinstance(part, str))


def lines_of(node):
    """Return the first and the last line of a function, decorators included, counted from 1."""
    decorators = [decorator.lineno for decorator in node.decorator_list]
    return min([node.lineno, *decorators]), node.end_lineno


def replace_lines(text, changes):
    """Return the text after `changes`, each (first, last, new text) of lines counted from 1."""
    lines = text.splitlines(keepends=True)
    for first, last, new in sorted(changes, reverse=True):
        lines[first - 1 : last] = [new]
    return "".join(lines)


# --------------------------------------------------------------------------------------------------
# The lecture page


def numbered_lines(text, names):
    """Return the lines of functions, docstrings left out, and with each line the numbers in its
    margin ("# 9-10") or, if it has none, that of the equation with which the docstring begins."""
    functions = functions_of(ast.parse(text))
    rows = []
    for node in (functions[name] for name in names):
        docstring = node.body[0]
        equations = re.findall(r"^Eq\. (\d+):", ast.get_docstring(node))
        for i, line in enumerate(text.splitlines(), start=1):
            if node.lineno <= i < docstring.lineno or docstring.end_lineno < i <= node.end_lineno:
                margin = re.search(r"# (\d+)(?:-(\d+))?(?= |$)", line)
                span = margin and range(int(margin[1]), int(margin[2] or margin[1]) + 1)
                rows.append({"text": line, "numbers": list(span or map(int, equations))})
    return rows
