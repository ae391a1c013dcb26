"""Write the students' repository. The same reference gives the same bytes each time.

Read top to bottom: the files; the README; stubs; lines of code for page.py; the check that nothing
gives a solution away.

What this file does not do: problems.py says which functions are assigned.
"""

import ast
import re
import textwrap
from pathlib import Path

from course.problems import FILES, PROBLEMS, WITHHELD

ROOT = Path(__file__).resolve().parent.parent

# --------------------------------------------------------------------------------------------------
# The files

# Copied as they are: what the students' four files and `python eval_ppl.py` import.
GIVEN = ("LICENSE", "requirements.txt", "eval_ppl.py", "paper/__init__.py", "support/*.py")

PICTURE = "figure10.png"  # the paper's Figure 10, drawn by paper/figures.py

PYPROJECT = """\
[tool.pytest.ini_options]
testpaths = ["checks"]
"""


def write(folder):
    """Write the handout. Raises ValueError if the folder is not empty, if a file would hold part of
    a solution, or without matplotlib."""
    from paper import figures  # only here, because the grader starts faster without it
    from support.report import save_figure

    figures.check_matplotlib()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name a new one")
    texts = files()
    if found := leaks(texts):
        function, name, part = found[0]
        raise ValueError(f"{name} would give away a line of {function}: {part}")
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    save_figure(figures.figure_10(None), folder / PICTURE)
    print(f"wrote {folder}: {len(texts) + 1} files")
    for problem in PROBLEMS:
        cut = ", ".join(f"{f.name} ({f.file})" for f in problem.functions) or "a written answer"
        print(f"  Problem {problem.number}, {problem.points} points: {cut}")


def files():
    """Return path in the handout -> text, of every file."""
    texts = {}
    for pattern in GIVEN:
        for path in ROOT.glob(pattern):
            texts[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        texts[name] = stubbed(text, stubs_of(name))
    for path in (ROOT / "course/checks").glob("*.py"):
        name = f"test_{path.name}" if path.name.startswith("problem") else path.name
        texts[f"checks/{name}"] = path.read_text(encoding="utf-8")
    texts["README.md"] = readme()
    texts["pyproject.toml"] = PYPROJECT
    return dict(sorted(texts.items()))


def stubs_of(file):
    """Return what stubbed needs to cut the functions of a file."""
    stubs = {name: (message, False) for name, message in WITHHELD.get(file, {}).items()}
    for problem in PROBLEMS:
        for function in problem.functions:
            if function.file == file:
                message = f"Problem {problem.number}: {function.topic}"
                stubs[function.name] = message, function.cut_docstring
    return stubs


# --------------------------------------------------------------------------------------------------
# The README


def readme():
    """Return handout.md, with a table of the problems in place of {overview} and a section for each
    in place of {problems}."""
    text = (ROOT / "course/handout.md").read_text(encoding="utf-8")
    text = text.replace("{overview}\n", overview())
    return text.replace("{problems}\n", "\n".join(section(problem) for problem in PROBLEMS))


def overview():
    """Return the table of the problems. The lecturer's README has it, too."""
    rows = ["| problem | functions | points | about |", "|---|---|---|---|"]
    for problem in PROBLEMS:
        names = ", ".join(f"`{function.name}`" for function in problem.functions) or "in writing"
        points = f"{problem.points} (bonus)" if problem.bonus else problem.points
        rows.append(f"| {problem.number} {problem.title} | {names} | {points} | {problem.hours} |")
    return "\n".join(rows) + "\n"


def section(problem):
    number = problem.number
    points = f"{problem.points} bonus points" if problem.bonus else f"{problem.points} points"
    title = f"## Problem {number}: {problem.title} ({points}, about {problem.hours})"
    lines = [title, "", f"**Read:** {problem.paper}.", ""]
    if problem.functions:
        lines += ["| write | in | points |", "|---|---|---|"]
        lines += [f"| `{f.name}` | `{f.file}` | {f.points} |" for f in problem.functions]
        lines += [""]
    lines += [wrapped(problem.task), ""]
    if problem.functions:
        lines += [f"**Check:** `python -m pytest checks/test_problem{number}.py`", ""]
    if problem.hint:
        lines += ["<details><summary>A hint</summary>", "", wrapped(problem.hint), ""]
        lines += ["</details>", ""]
    return "\n".join(lines)


def wrapped(text):
    """Return a paragraph in lines of 100 columns. A text of several lines is Markdown already."""
    return text if "\n" in text else textwrap.fill(text, 100, break_on_hyphens=False)


# --------------------------------------------------------------------------------------------------
# Stubs


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
    lines = text.splitlines(keepends=True)
    for first, last, stub in sorted(changes, reverse=True):
        lines[first - 1 : last] = [stub]
    return "".join(lines)


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


# --------------------------------------------------------------------------------------------------
# Lines of code, for the lecture page


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


# --------------------------------------------------------------------------------------------------
# The check that nothing gives a solution away


def leaks(texts):
    """Return (function, file, part) for each part of a solution that a file of the handout
    holds."""
    flat = {}
    for name, text in texts.items():
        plain = ast.unparse(ast.parse(text)) if name.endswith(".py") else text
        flat[name] = one_line(plain)
    found = []
    for function in (function for problem in PROBLEMS for function in problem.functions):
        for part in sorted(solution_parts(function)):
            names = [name for name, text in flat.items() if one_line(part) in text]
            found += [(function.name, name, part) for name in names]
    return found


def solution_parts(function):
    """Return the statements of an assigned function, and the parts of what it returns, as
    ast.unparse writes them: those of more than 32 characters, which other code does not have by
    chance, or else the longest."""
    tree = ast.parse((ROOT / function.file).read_text(encoding="utf-8"))
    body = functions_of(tree)[function.name].body[1:]  # without the docstring
    parts = set()
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.stmt):
            parts.add(ast.unparse(node))
        if isinstance(node, ast.Return) and node.value:
            inner = [part for part in ast.walk(node.value) if isinstance(part, ast.expr)]
            parts |= {ast.unparse(part) for part in inner}
    return {part for part in parts if len(part) > 32} or {max(parts, key=len)}


def one_line(text):
    return " ".join(text.split())
