"""The structure of the package, read from its source: who may import whom."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import run_python

import came8bit

PACKAGE = Path(came8bit.__file__).parent

#: What each part of the package may import from the others. A new part has to find its place here.
#: Where "state" stands for a folder, its modules may import each other.
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "atomic_file": set(),
    "reference": set(),
    "state": {"reference"},
    "overlap": {"state"},
    "validation": {"overlap", "state"},
    "paging": {"errors", "reference", "state"},
    "misfit": {"errors", "overlap", "paging", "state", "validation"},
    "ops": {"errors", "reference", "state", "validation"},
    "state_dict": {"errors", "ops", "reference", "state", "validation"},
    "param_groups": {"validation"},
    "optim": {
        "errors",
        "misfit",
        "ops",
        "overlap",
        "paging",
        "param_groups",
        "state",
        "state_dict",
        "validation",
    },
    "variants": {"optim"},
    "integrations": {"optim", "step_in_backward", "variants"},
    "step_in_backward": {"errors", "optim", "validation"},
    "checkpoint": {
        "_version",
        "atomic_file",
        "errors",
        "ops",
        "optim",
        "reference",
        "state",
        "state_dict",
        "validation",
    },
    "planner": {"atomic_file", "errors", "paging", "state"},
    "__init__": {
        "_version",
        "checkpoint",
        "errors",
        "ops",
        "optim",
        "param_groups",
        "step_in_backward",
        "variants",
    },
    "environment": set(),  # the public API only, see below
    "tradeoff": {"atomic_file", "environment", "errors", "param_groups"},
    "cli": {"atomic_file", "environment", "errors", "planner", "tradeoff"},
    "__main__": {"cli"},
}

#: Parts that may use nothing but torch and the standard library, even inside functions.
TORCH_ONLY = set(ALLOWED) - {
    "cli",
    "environment",
    "integrations",
    "planner",
    "tradeoff",
    "__main__",
    "__init__",
}

#: What a program that only wants the optimizer must not have to load, or have installed.
HEAVY = (
    "accelerate",
    "bitsandbytes",
    "came_pytorch",
    "diffusers",
    "matplotlib",
    "rich",
    "safetensors",
    "scipy",
    "tqdm",
    "transformers",
    "triton",
)

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """Return the part that ``module`` (dotted, without the package's name) belongs to."""
    return module.split(".")[0] or "__init__"


def module_name(path: Path) -> str:
    """Return the dotted name of the file, without the package's name; '' for its __init__."""
    names = [*path.relative_to(PACKAGE).parent.parts, path.stem]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute dotted name of everything the file imports, wherever in it."""
    package = ["came8bit", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def inner_imports(path: Path) -> set[str]:
    """Return the parts of the package that the file imports, without its own."""
    found = set()
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "came8bit":
            known = rest and (rest[0] in ALLOWED)
            found.add(rest[0] if known else "__init__")
    return found - {part_of(module_name(path))}


def test_every_part_has_its_place() -> None:
    assert {part_of(module_name(path)) for path in FILES} <= set(ALLOWED)


def test_the_table_has_no_cycle() -> None:
    remaining = dict(ALLOWED)
    while remaining:
        free = {part for part, uses in remaining.items() if not uses & set(remaining)}
        assert free, f"these import each other: {sorted(remaining)}"
        remaining = {part: uses for part, uses in remaining.items() if part not in free}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(module_name(path))
    # Importing the package itself is for those outside it: the command line.
    outside = {"__init__"} if part in ("cli", "environment", "__main__") else set()
    assert inner_imports(path) <= ALLOWED[part] | outside


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_core_uses_torch_and_the_standard_library_only(path: Path) -> None:
    if part_of(module_name(path)) in TORCH_ONLY:
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert foreign <= {"torch", "came8bit"}


def test_the_command_line_uses_the_public_names_only() -> None:
    inner = {"cli", "environment", "errors", "planner", "tradeoff", "atomic_file", "__file__"}
    inner |= {"param_groups"}
    for path in FILES:
        if part_of(module_name(path)) not in ("cli", "environment", "tradeoff"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "came8bit"
        }
        used |= {name.split(".")[1] for name in imports(path) if name.startswith("came8bit.")}
        assert used <= {*came8bit.__all__, *inner}, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_within_the_package_are_relative(path: Path) -> None:
    """All but ``import came8bit``, by which the command line uses the public names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in absolute if name.split(".")[0] == "came8bit"]


def test_public_names_are_all_there() -> None:
    assert sorted(came8bit.__all__, key=str.lower) == sorted(set(came8bit.__all__), key=str.lower)
    for name in came8bit.__all__:
        assert getattr(came8bit, name) is not None


BLOCKED = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

import torch  # may look for some of them itself
sys.meta_path.insert(0, Block())
loaded = set(sys.modules)
"""


def run(code: str) -> str:
    """Run ``code`` in a new Python where none of HEAVY can be imported; return what it prints."""
    done = run_python("-c", BLOCKED + code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import came8bit\nprint(*{name.split('.')[0] for name in set(sys.modules) - loaded})"
    loaded = set(run(code).split())
    assert "came8bit" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["tradeoff", "--help"]])
def test_the_command_line_starts_without_the_extras(arguments: list[str]) -> None:
    code = f"from came8bit.cli import main\nsys.exit(main({arguments!r}))"
    assert "came8bit" in run(code)
