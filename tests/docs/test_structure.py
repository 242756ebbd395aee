"""The source keeps its order: a package imports from those above it, in no circle, and nothing grows out of hand."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = re.findall(r"^  (\w+)  ", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.M)
SOURCE = ROOT / "src" / "diglot"
SOURCES = sorted(SOURCE.rglob("*.py"))


def package(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@lru_cache
def modules() -> dict[str, Path]:
    return {module(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """All modules of Diglot that a file names, also inside functions and for type checkers alone."""
    result: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diglot"):
            inside = {f"{node.module}.{name.name}" for name in node.names}
            result |= (inside & modules().keys()) or {str(node.module)}
        elif isinstance(node, ast.Import):
            result |= {name.name for name in node.names if name.name.startswith("diglot")}
    return result


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The ways from a module back to itself, one for each module that is first on such a way."""
    done: set[str] = set()
    results: list[list[str]] = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            results.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return results


def test_no_package_imports_from_one_below_it() -> None:
    """The order is the list in docs/design.md."""
    assert set(PACKAGES) == {package(p) for p in SOURCES} - {"__init__", "__main__"}
    for path in SOURCES:
        if package(path) in PACKAGES:
            for other in {name.split(".")[1] for name in imports(path) if "." in name}:
                assert PACKAGES.index(other) <= PACKAGES.index(package(path)), (path.name, other)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """A package's `__init__` collects names for those below: modules beside it do not import from it."""
    graph = {name: imports(path) - {name} for name, path in modules().items() if name not in ("diglot", "diglot.cli")}
    assert circles(graph) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]


def test_the_trainers_stay_small() -> None:
    files = [path for path in SOURCES if package(path) == "trainers"]
    assert len(files) <= 8 and sum(path.read_text(encoding="utf-8").count("\n") for path in files) <= 1500


def test_files_and_functions_stay_readable() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 600, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno <= 120, (path.name, node.name)


def names_of_things(tree: ast.AST) -> list[str]:
    """Of all variables, parameters, attributes, functions and classes of a file, without their outer underscores."""
    kinds = {ast.Name: "id", ast.arg: "arg", ast.keyword: "arg", ast.Attribute: "attr"}
    kinds |= dict.fromkeys((ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef), "name")
    return [(getattr(node, kinds[type(node)]) or "").strip("_") for node in ast.walk(tree) if type(node) in kinds]


def test_names_say_what_a_thing_is_and_not_how_it_came_about() -> None:
    """Whoever reads `found` in the middle of a function has to look up what it holds."""
    participles = {"found", "told", "asked", "given", "kept", "said"}
    own = [path for folder in ("benchmarks", "demo", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in [*SOURCES, *own]:
        text = path.read_text(encoding="utf-8")
        used = participles.intersection(names_of_things(ast.parse(text)))
        if re.search(r"^from hypothesis import .*\bgiven\b", text, re.M):
            used.discard("given")  # its name is not ours
        assert not used, (path.name, used)
    example = "def asked(given, *, _kept=0):\n    told.found = f(said=1)"
    assert participles <= set(names_of_things(ast.parse(example)))
