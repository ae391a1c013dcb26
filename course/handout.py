"""Writes the students' repository: the same bytes each time.

Read top to bottom: what goes into it; its README; the check that it holds no solution.

What this file does not do: problems.py says which functions are assigned, source.py cuts them out.
"""

import ast
import textwrap
from pathlib import Path

from course import source
from course.problems import FILES, PROBLEMS

ROOT = Path(__file__).resolve().parent.parent

# Given as they are: what the students' four files and `python eval_ppl.py` stand on.
GIVEN = ("LICENSE", "requirements.txt", "eval_ppl.py", "paper/__init__.py", "support/*.py")
PYTEST = "[pytest]\ntestpaths = checks\n"


def files():
    """Path in the handout -> text of every file."""
    given = [
        path.relative_to(ROOT).as_posix()
        for pattern in GIVEN
        for path in sorted(ROOT.glob(pattern))
    ]
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*given, *FILES)}
    for name in FILES:
        stubs = {
            f.name: (f"Problem {p.number}: {f.says}", f.cut)
            for p in PROBLEMS
            for f in p.functions
            if f.file == name
        }
        texts[name] = source.stubbed(texts[name], stubs)
    for path in sorted((ROOT / "course/checks").glob("*.py")):
        name = f"test_{path.name}" if path.name.startswith("problem") else path.name
        texts[f"checks/{name}"] = path.read_text(encoding="utf-8")
    texts |= {"README.md": readme(), "pytest.ini": PYTEST}
    return dict(sorted(texts.items()))


# --------------------------------------------------------------------------------------------------
# README


def readme():
    """handout.md, with a table and a section for each problem in the places of {overview} and
    {problems}."""
    text = (ROOT / "course/handout.md").read_text(encoding="utf-8")
    return text.replace("{overview}\n", overview()).replace(
        "{problems}\n", "\n".join(map(section, PROBLEMS))
    )


def overview():
    """The problems as a table; the lecturer's README has it too."""
    rows = ["| problem | functions | points | about |", "|---|---|---|---|"]
    for p in PROBLEMS:
        names = ", ".join(f"`{f.name}`" for f in p.functions) or "in writing"
        rows.append(
            f"| {p.number} {p.title} | {names} | {p.points}{' (bonus)' if p.bonus else ''} | {p.hours} |"
        )
    return "\n".join(rows) + "\n"


def section(problem):
    points = f"{problem.points} points" + (" (bonus)" if problem.bonus else "")
    lines = [
        f"## Problem {problem.number}: {problem.title} ({points}, about {problem.hours})",
        "",
        f"**Read:** {problem.paper}.",
        "",
    ]
    if problem.functions:
        lines += ["| write | in | points |", "|---|---|---|"]
        lines += [f"| `{f.name}` | `{f.file}` | {f.points} |" for f in problem.functions] + [""]
    lines += [wrapped(problem.write), ""]
    if problem.functions:
        lines += [f"**Check:** `python -m pytest checks/test_problem{problem.number}.py`", ""]
    if problem.hint:
        lines += [
            "<details><summary>A hint</summary>",
            "",
            wrapped(problem.hint),
            "",
            "</details>",
            "",
        ]
    return "\n".join(lines)


def wrapped(text):
    return text if "\n" in text else textwrap.fill(text, 120, break_on_hyphens=False)


# --------------------------------------------------------------------------------------------------
# No solution in it


EVERYDAY = (
    "device = model.embedding.weight.device",
)  # stands elsewhere too, and says nothing of how it is done


def solution_parts(name, file):
    """The statements of an assigned function, and the parts of what it returns, as `ast.unparse`
    writes them: those of more than 32 characters, which no other code has by chance, or else the
    longest."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    body = source.functions_of(tree)[name].body[1:]  # without the docstring
    nodes = [
        node for statement in body for node in ast.walk(statement) if isinstance(node, ast.stmt)
    ]
    for node in list(nodes):
        if isinstance(node, ast.Return) and node.value:
            nodes += [part for part in ast.walk(node.value) if isinstance(part, ast.expr)]
    texts = {ast.unparse(node) for node in nodes}
    return {text for text in texts if len(text) > 32} - set(EVERYDAY) or {max(texts, key=len)}


def leaks(texts):
    """(function, file, part) for every part of a solution that a file of the handout has."""
    plain = {
        name: ast.unparse(ast.parse(text)) if name.endswith(".py") else text
        for name, text in texts.items()
    }
    flat = {name: " ".join(text.split()) for name, text in plain.items()}
    return [
        (function.name, name, part)
        for problem in PROBLEMS
        for function in problem.functions
        for part in sorted(solution_parts(function.name, function.file))
        for name, text in flat.items()
        if " ".join(part.split()) in text
    ]


def write(folder):
    """Writes the handout. Raises ValueError where the folder is not empty, or a file would hold
    part of a solution."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name a new one")
    texts = files()
    if found := leaks(texts):
        function, name, part = found[0]
        raise ValueError(f"{name} would give away a line of {function}: {part}")
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    print(f"wrote {folder}: {len(texts)} files")
    for problem in PROBLEMS:
        cut = ", ".join(f"{f.name} ({f.file})" for f in problem.functions) or "a written answer"
        print(f"  Problem {problem.number}, {problem.points} points: {cut}")
