"""The tree keeps its shape: layers, sizes, names and docstrings."""

import ast
import inspect
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A file imports only from lower numbers or its own folder.
LAYERS = {
    "types": 0,
    "losses": 1,
    "micro_batches": 1,
    "fused": 2,
    "objectives": 3,
    "teachers": 3,
    "models": 3,
    "metrics": 3,
    "train": 4,
    "io": 5,
    "tools": 6,
    "__init__": 7,
}

# Libraries that only one folder may know, so that the rest runs without them.
OWNERS = {"flax": "models", "orbax": "io", "grain": "io", "safetensors": "io"}

KDJAX = sorted((ROOT / "kdjax").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

every_file = pytest.mark.parametrize("path", KDJAX + EXPERIMENTS, ids=lambda p: name(p))
every_module = pytest.mark.parametrize("path", KDJAX, ids=lambda p: name(p))


def name(path):
    return path.relative_to(ROOT).as_posix()


def part(path):
    """The entry of LAYERS that a file of kdjax belongs to."""
    return path.relative_to(ROOT / "kdjax").parts[0].removesuffix(".py")


def imported(path):
    """Yields (line, dotted name) of every import, inside functions too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}"


@every_module
def test_imports_only_from_lower_layers(path):
    own = part(path)
    assert own in LAYERS, f"{own} has no layer"
    for line, module in imported(path):
        top, *rest = module.split(".")
        if top != "kdjax":
            continue
        # What is no layer is a name of kdjax/__init__.py itself, the public face.
        other = rest[0] if rest and rest[0] in LAYERS else "__init__"
        assert other == own or LAYERS[other] < LAYERS[own], (
            f"{name(path)}:{line}: {own} (layer {LAYERS[own]}) imports {module} "
            f"(layer {LAYERS[other]})"
        )


@every_module
def test_only_their_folder_knows_a_library_that_has_an_owner(path):
    for line, module in imported(path):
        owner = OWNERS.get(module.split(".")[0])
        assert owner in (None, part(path)), (
            f"{name(path)}:{line}: {module} belongs into kdjax/{owner}"
        )


@every_file
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) < 400
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        # A docstring is as long as it has to be.
        doc = node.body[0] if ast.get_docstring(node) else None
        lines = node.end_lineno - node.lineno + 1
        lines -= doc.end_lineno - doc.lineno + 1 if doc else 0
        assert lines < 60, f"{name(path)}:{node.lineno}: {node.name}, {lines} lines"


def test_files_are_named_for_what_they_hold():
    assert not [
        name(path)
        for path in KDJAX + EXPERIMENTS + TESTS
        if path.stem.strip("_") in ("utils", "helpers")
    ]


@every_module
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    scopes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]
    bare = [
        f"{name(path)}:{node.lineno}: {node.name}"
        for scope in scopes
        for node in scope.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.unparse(node.body) != "..."  # the stub of a protocol
        and not ast.get_docstring(node)
    ]
    assert not bare


def public_losses():
    from kdjax import losses

    return {
        key: value
        for key, value in vars(losses).items()
        if not key.startswith("_")
        and callable(value)
        and not inspect.isclass(value)
        and not isinstance(value, types.ModuleType)
    }


def test_losses_are_documented():
    for key, loss in public_losses().items():
        doc = inspect.getdoc(loss) or ""
        for section in ("Args:", "Returns:", ">>> "):
            assert section in doc, f"losses.{key}: no {section!r} in its docstring"
