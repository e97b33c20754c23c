"""Who may import whom: the diagram of docs/design, held against the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import compressor

PACKAGE = Path(compressor.__file__).parent

# Lowest first. A part imports from lower levels only; parts on one level do not know each other.
LEVELS = [
    {"errors"},
    {"quant", "checkpoint", "distributed"},
    {"kernels", "algorithms"},
    {"layers", "runtimes"},
    {"models"},
    {"calibration", "reports"},
    {"training"},
    {"passes", "metrics", "exporters", "gates"},
    {"recipe"},
    {"pipeline"},
    {"cli"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")  # the lazy door is exempt


def part_of(path: Path) -> str:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if name == "__main__" else name


def imported_names(tree: ast.AST, package: list[str]) -> set[str]:
    """Dotted names of all imports, inside functions and under TYPE_CHECKING too; relative ones resolved."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imported_parts(path: Path) -> set[str]:
    package = ["compressor", *path.relative_to(PACKAGE).parts[:-1]]
    names = imported_names(ast.parse(path.read_text()), package)
    inside = {name.split(".")[1] for name in names if name.startswith("compressor.")}
    return {part for part in inside if part in LEVEL_OF} - {part_of(path)}


def test_every_part_has_a_level():
    """A new part has to be put into the diagram."""
    assert {part_of(path) for path in FILES} - LEVEL_OF.keys() == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    """A part imports only from levels below its own."""
    upwards = {part for part in imported_parts(path) if LEVEL_OF[part] >= LEVEL_OF[part_of(path)]}
    assert not upwards, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(upwards))}"


def test_every_way_to_import_is_seen():
    """Absolute, from the package itself, relative, inside a function."""
    source = "import compressor.cli\nfrom compressor import gates\ndef f():\n    from ..passes import base\n"
    names = imported_names(ast.parse(source), ["compressor", "quant"])
    assert names == {"compressor.cli", "compressor.gates", "compressor.passes.base"}


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    script = f"import sys\n{statement}\nprint(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize("part", ["quant", "kernels", "kernels.ops"])
def test_quant_and_kernels_need_torch_only(part):
    """They run on a bare GPU image: none of our other dependencies is imported."""
    others = {
        "transformers",
        "safetensors",
        "accelerate",
        "pydantic",
        "typer",
        "rich",
        "ruamel",
        "scipy",
        "compressed_tensors",
    }
    assert modules_after(f"import compressor.{part}") & others == set()


def test_importing_the_package_is_light():
    """`import compressor` loads neither torch nor transformers."""
    assert modules_after("import compressor") & {"torch", "transformers", "pydantic", "numpy"} == set()
