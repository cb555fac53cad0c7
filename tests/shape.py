"""Figures of the notebooks and the package: `python tests/shape.py` prints them, test_repository.py holds them."""
import ast
import collections
import io
import json
import re
import statistics
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORD = re.compile(r"[A-Za-z_]\w*")
QUESTION = re.compile(r"(What|Which|Whether|How|Who|Does|Do|Is|Are|Where|When|Why)\b")
# What each stage, and each way to start, has under the same name: found in its module by that name
SHARED = {
    "make_trainer": "each stage's, which `medllm.train.loop` finds in the stage's module",
    "finish": "each stage's last words, found like its trainer",
    "main": "an entry point: of `medllm`, and of `python -m medllm.train`",
}


def notebooks():
    "Notebooks that export a module."
    found = (ROOT/"nbs").rglob("*.ipynb")
    return sorted(p for p in found if not {".ipynb_checkpoints", "_records", "evidence", "runs", "tutorials"} & set(p.parts))


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def is_export(cell): return cell["cell_type"] == "code" and source(cell).startswith("#| export")
def package(path): return path.parent.name if path.parent.name != "nbs" else ""


def is_patch(node):
    "Whether a function is a method of a class defined elsewhere (`@patch`)."
    return any("patch" in ast.unparse(d) for d in getattr(node, "decorator_list", []))


def cell_lines():
    "Lines of each exported cell, without the line that says so, by notebook and id."
    return {(p, c["id"]): len(c["source"]) - 1 for p in notebooks() for c in cells(p) if is_export(c)}


def shown(path):
    "Public functions and classes of a notebook: whether a cell names one before the next cell that exports."
    own, out = cells(path), {}
    exporting = [i for i, c in enumerate(own) if is_export(c)]
    for at, end in zip(exporting, [*exporting[1:], len(own)]):
        after = set(WORD.findall("\n".join(source(c) for c in own[at + 1:end] if c["cell_type"] == "code")))
        for node in ast.parse(source(own[at])).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_") or is_patch(node): continue
            out.setdefault(node.name, node.name in after)
    return out


def modules():
    "Files of the package that notebooks export, parsed."
    found = sorted(p for p in (ROOT/"medllm").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py"))
    return {p: ast.parse(p.read_text(encoding="utf-8")) for p in found}


def uncommented(path, tree):
    "Parameters, fields and results of what a module offers that have no comment, and what has no docstring."
    text = path.read_text(encoding="utf-8")
    comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
    for owner, node in offered(tree):
        name = f"{path.relative_to(ROOT)}: {owner}{node.name}"
        if not ast.get_docstring(node): yield f"{name} has no docstring"
        if isinstance(node, ast.ClassDef):
            yield from (f"{name}.{f.target.id}" for f in node.body if isinstance(f, ast.AnnAssign)
                and isinstance(f.target, ast.Name) and not f.target.id.startswith("_") and not told(f, comments))
            continue
        given = node.args
        several = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        yield from (f"{name}({a.arg})" for a in several if a.arg not in ("self", "cls")
            and not {a.lineno, a.end_lineno} & comments)


def told(field, comments):
    "Whether a field has a comment, or a help text, which is the same."
    text = ast.unparse(field)
    return "help" in text or "flag(" in text or bool({*range(field.lineno, field.end_lineno + 1)} & comments)


def offered(tree):
    "Public functions and classes of a module, and the public methods of these, each with its owner."
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
        yield "", node
        if not isinstance(node, ast.ClassDef): continue
        yield from ((f"{node.name}.", m) for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))


def names_in_two():
    "Public names that more than one module defines at its top, with the modules."
    found = collections.defaultdict(set)
    for path, tree in modules().items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not is_patch(node): found[node.name].add(path.stem)
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            for t in targets:
                if isinstance(t, ast.Name): found[t.id].add(path.stem)
    return {name: sorted(where) for name, where in found.items() if len(where) > 1 and not name.startswith("_")}


def wide_assignments():
    "Assignments of four names and more at once."
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign): continue
            for target in node.targets:
                if isinstance(target, ast.Tuple) and len(target.elts) > 3 and isinstance(node.value, ast.Tuple):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}"


def folded_bodies():
    "Bodies that begin behind a colon and go on in the next line."
    for path, tree in modules().items():
        lines = path.read_text(encoding="utf-8").split("\n")
        for node in ast.walk(tree):
            for part in ("body", "orelse", "finalbody"):
                body = getattr(node, part, None)
                if not isinstance(body, list) or not body or not isinstance(node, ast.stmt | ast.ExceptHandler): continue
                at, end = body[0].lineno, body[0].end_lineno
                if end > at and lines[at - 1][:body[0].col_offset].rstrip().endswith(":"):
                    yield f"{path.relative_to(ROOT)}:{at}"


def long_lines(most=120):
    "Lines of exported and shown code above a length, by notebook and id."
    return [f"{p.relative_to(ROOT)}#{c['id']}" for p in notebooks() for c in cells(p) if c["cell_type"] == "code"
        for line in source(c).split("\n") if len(line) > most]


def purposes():
    "The line under each title, by notebook."
    return {p: re.match(r"# .*\n\n> (.*)", source(cells(p)[0]))[1] for p in notebooks()}


def shares_shown():
    "Share of the public functions and classes of each package that are shown before the next exported cell."
    by = collections.defaultdict(list)
    for path in notebooks(): by[package(path) or "ground floor"] += shown(path).values()
    return {name: sum(values)/len(values) for name, values in by.items()}


def figures():
    "All of it, to be read."
    lines, every = sorted(cell_lines().values()), [s for p in notebooks() for s in shown(p).values()]
    return {
        "notebooks that export": len(notebooks()), "exported cells": len(lines), "median lines": statistics.median(lines),
        "over 15 lines": sum(n > 15 for n in lines), "over 40 lines": sum(n > 40 for n in lines),
        "public names": len(every), "shown before the next export": f"{sum(every)/len(every):.1%}",
        "least shown package": min(shares_shown().items(), key=lambda one: one[1]),
        "without a comment": sum(1 for p, t in modules().items() for _ in uncommented(p, t)),
        "names in two modules": len(names_in_two().keys() - SHARED.keys()),
        "bodies folded into a line": sum(1 for _ in folded_bodies()),
        "assignments of four names": sum(1 for _ in wide_assignments()), "lines over 120": len(long_lines()),
        "purposes that are questions": sum(bool(QUESTION.match(t)) for t in purposes().values())}


if __name__ == "__main__":
    for name, value in figures().items(): print(f"{name:32} {value}")
