"""Find a recipe, read it, and check all of it before any model is touched."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from compressor.errors import RecipeError
from compressor.gates import Policy
from compressor.passes import PASSES
from compressor.recipe.complaints import complaints
from compressor.recipe.document import Address, Document, nearest, plain_value, read_document
from compressor.recipe.options import EXPORTS, Evaluate, Recipe
from compressor.recipe.overrides import override

SUFFIXES = (".yaml", ".yml")
WORDS = {"passes": "pass", "export": "export format"}
NEAR_FILES = 5  # as many names are offered for a file that is not there

OptionsType = TypeVar("OptionsType", bound=BaseModel)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or a bundled one by name, with `--set` overrides applied.

    All that is wrong is said at once, in a RecipeError with file, line, key and the nearest possible word.
    """
    file = _find(Path(path))
    document = read_document(file)
    _spell_out(document.data, "passes")
    _spell_out(document.data, "export")
    document = override(document, overrides, Recipe.model_fields, PASSES)
    # --set may have replaced a list as a whole.
    _spell_out(document.data, "passes")
    _spell_out(document.data, "export")
    recipe = _build(document, file)
    recipe._name = file.stem
    return recipe


def load_policy(path: Path | str) -> Policy:
    """Read a policy (the `gate` section of a recipe, in a file of its own)."""
    return load_gate(path)[0]


def load_gate(path: Path | str) -> tuple[Policy, Evaluate | None]:
    """Read a policy and, if the file has one, the `evaluate` section by which models without records are measured."""
    path = Path(path)
    if not path.is_file():
        raise RecipeError(_no_such_file(path, "policy"))
    document = read_document(path)
    problems: list[str] = []
    rules = {key: value for key, value in document.data.items() if key != "evaluate"}
    policy = _options(Policy, rules, document, (), problems)
    evaluate = None
    if "evaluate" in document.data:
        evaluate = _options(Evaluate, document.data["evaluate"], document, ("evaluate",), problems)
    if problems:
        raise RecipeError("\n".join(problems))
    assert policy is not None
    return policy, evaluate


def load_evaluate(path: Path | str | None, changes: Mapping[str, Any], *, speed: bool = True) -> Evaluate:
    """An `evaluate` section, alone in a file, with these of its keys changed; `speed=False` leaves the latency out."""
    data: dict[str, Any] = {}
    document = Document("--evaluate", data, {(): "evaluate"})
    if path is not None:
        if not Path(path).is_file():
            raise RecipeError(_no_such_file(Path(path), "evaluate"))
        document = read_document(Path(path))
        if unknown := [key for key in document.data if key != "evaluate"]:
            place = document.place((unknown[0],))
            raise RecipeError(f"{place}: the file has {unknown[0]!r}; it takes one key, evaluate")
        data = dict(document.data.get("evaluate") or {})
    data |= dict(changes) | ({} if speed else {"latency": False})
    problems: list[str] = []
    evaluate = _options(Evaluate, data, document, ("evaluate",), problems)
    if evaluate is None:
        raise RecipeError("\n".join(problems))
    return evaluate


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Options written as `name=value` on the command line; values are read as YAML."""
    found = {}
    for setting in settings:
        name, sign, text = setting.partition("=")
        if not sign or not name:
            raise RecipeError(f"--set {setting}: write an option, = and a value, as in --set type=q4_k_m")
        found[name] = plain_value(text, f"--set {setting}")
    return found


def parse_export(format: str, options: Mapping[str, Any]) -> BaseModel:
    """The checked options of one export format, as a recipe's `export` would have them."""
    document = Document("--to", {}, {(): f"--to {format}"})
    problems: list[str] = []
    entries = _entries([{format: dict(options)}], EXPORTS, "export", document, problems)
    if problems:
        raise RecipeError("\n".join(problems))
    return entries[0]


def is_recipe(name: str) -> bool:
    """Whether an argument that may be a recipe or a model means a recipe: a YAML file, or a bundled recipe's name."""
    return name.lower().endswith(SUFFIXES) or (not Path(name).exists() and _bundled(Path(name)) is not None)


def bundled_recipes() -> list[Path]:
    """The recipes that ship with the package: beside it in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    folders = (package.parent / "recipes", package / "_recipes")
    return sorted(file for folder in folders if folder.is_dir() for file in folder.glob("*.yaml"))


def _build(document: Document, file: Path) -> Recipe:
    """Check the sections whose shape depends on a name or a file, then the recipe around them; say all at once."""
    problems: list[str] = []
    data: dict[str, Any] = dict(document.data)
    refused: set[str | int] = set()
    for key, build in (("passes", _passes), ("export", _exports), ("gate", _gate)):
        if key in data:
            found: list[str] = []
            data[key] = build(data[key], document, file, found)
            refused |= {key} if found else set()
            problems += found
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        # A section that was refused is incomplete here; what its remains lack is not the user's doing.
        details = [detail for detail in error.errors() if not refused.intersection(detail["loc"][:1])]
        problems += complaints(details, Recipe, data, document, ())
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def _passes(section: Any, document: Document, file: Path, problems: list[str]) -> Any:
    return _entries(section, PASSES, "passes", document, problems)


def _exports(section: Any, document: Document, file: Path, problems: list[str]) -> Any:
    return _entries(section, EXPORTS, "export", document, problems)


def _gate(section: Any, document: Document, file: Path, problems: list[str]) -> Any:
    """A policy, inline or in a file of its own: beside the recipe, or where the command runs."""
    if section is None:
        return None
    if not isinstance(section, str):
        return _options(Policy, section, document, ("gate",), problems)
    beside = file.parent / section
    try:
        return load_policy(beside if beside.is_file() else section)
    except RecipeError as error:
        problems.append(f"{document.place(('gate',))}: {error}")
        return None


def _entries(
    section: Any,
    kinds: Mapping[str, type[BaseModel]],
    key: str,
    document: Document,
    problems: list[str],
) -> Any:
    """The objects that a list of one-key mappings stands for."""
    if not isinstance(section, list):
        problems.append(f"{document.place((key,))}: {key} is a list, one line for each: - {next(iter(kinds))}: {{...}}")
        return None
    entries, there = [], ", ".join(kinds)
    for position, item in enumerate(section):
        place = document.place((key, position))
        if not isinstance(item, dict) or len(item) != 1:
            written = ", ".join(map(str, item)) if isinstance(item, dict) else item
            problems.append(f"{place}: {key} takes one name with its options a line; this one has {written!r}")
            continue
        [(name, options)] = item.items()
        if name not in kinds:
            problems.append(f"{place}: there is no {WORDS[key]} {name!r}{nearest(name, kinds)} (there is {there})")
        else:
            entries.append(_options(kinds[name], options, document, (key, position, name), problems))
    return tuple(entries)


def _options(
    kind: type[OptionsType], data: Any, document: Document, address: Address, problems: list[str]
) -> OptionsType | None:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems += complaints(error.errors(), kind, data, document, address)
        return None


def _spell_out(data: dict[str, Any], key: str) -> None:
    """Write `- quantize` and `- quantize:` as `- quantize: {}`, so that options can be set in it."""
    section = data.get(key)
    if isinstance(section, list):
        items = [{item: {}} if isinstance(item, str) else item for item in section]
        data[key] = [
            {name: {} if options is None else options for name, options in item.items()}
            if isinstance(item, dict)
            else item
            for item in items
        ]


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    bundled = _bundled(path)
    if bundled is None:
        raise RecipeError(_no_such_file(path, "recipe"))
    return bundled


def _bundled(path: Path) -> Path | None:
    # A path into some other folder means that folder: a bundled recipe of the same name would be a surprise.
    if path.parent not in (Path(), Path("recipes")):
        return None
    return next((file for file in bundled_recipes() if path.name in (file.name, file.stem)), None)


def _no_such_file(path: Path, word: str) -> str:
    if path.is_dir():
        return f"{path} is a folder, not a {word}"
    if not path.parent.is_dir():
        return f"{path}: there is no such {word}, and no folder {path.parent}"
    beside = sorted(file.name for file in path.parent.iterdir() if file.suffix in SUFFIXES)
    near = difflib.get_close_matches(path.name, beside, n=NEAR_FILES, cutoff=0.3) or beside[:NEAR_FILES]
    there = f"{path.parent} has {', '.join(near)}" if near else f"{path.parent} has no YAML files"
    bundled = ", ".join(file.stem for file in bundled_recipes())
    return f"{path}: there is no such {word}; {there}" + (f"; bundled are {bundled}" if word == "recipe" else "")
