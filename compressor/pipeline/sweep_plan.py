"""What a sweep is going to run: every variant of a recipe, with the folder of each of its runs."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError
from compressor.passes import PASSES
from compressor.recipe import Recipe, load_recipe
from compressor.recipe.options import kind_of

SCHEMA = "compressor.sweep_plan/1"
WHOLE = "recipe"  # name of the variant in which nothing was varied
SLUG = 80  # letters of a folder's name

Grid = list[tuple[tuple[str, ...], tuple[str, ...]]]  # each combination as names show it, and as settings


@dataclass(frozen=True)
class Wanted:
    """A variant to run: its name, what was set, the pass that it lacks, and the recipe and folder of each seed."""

    name: str
    settings: tuple[str, ...]
    without: str | None
    runs: tuple[tuple[Recipe, str], ...]


@dataclass(frozen=True)
class Variation:
    """A variant before it has folders: a recipe for each seed."""

    name: str
    settings: tuple[str, ...]
    without: str | None
    recipes: tuple[Recipe, ...]

    @property
    def sha256(self) -> str:
        return self.recipes[0].sha256


@dataclass(frozen=True)
class SweepPlan:
    """All variants, and which pairs of them (whole recipe, pass, variant without it) answer what a pass contributes."""

    variants: tuple[Wanted, ...]
    pairs: tuple[tuple[str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        runs = {
            folder: {"variant": variant.name, "seed": recipe.seed, "recipe_sha256": recipe.sha256}
            for variant in self.variants
            for recipe, folder in variant.runs
        }
        return {"schema": SCHEMA, "runs": runs}


def plan_sweep(
    recipe: str | Path,
    *,
    vary: Sequence[str] = (),
    seeds: Sequence[int] = (),
    ablate: bool = False,
    settings: Sequence[str] = (),
) -> SweepPlan:
    """Every variant with its checked recipes; RecipeError for all that is wrong at once."""
    grid = _grid(vary)
    if not (vary or ablate or len(seeds) > 1):
        raise RecipeError("sweep: nothing varies; give --vary PATH=VALUE,VALUE, --seeds or --ablate")
    if len(set(seeds)) < len(seeds):
        raise RecipeError(f"--seeds {','.join(map(str, seeds))}: a seed is given twice")
    if seeds and any(one.startswith("seed=") for one in grid[0][1]):
        raise RecipeError("--vary seed and --seeds both set the seed; give one of them")
    variants: list[Variation] = []
    pairs = []
    for whole in _load(recipe, settings, grid, seeds):
        variants.append(whole)
        for reduced in _without_each(whole) if ablate else ():
            # A setting of the pass that is left out makes no difference: such variants are one.
            same = next((v for v in variants if v.without and v.sha256 == reduced.sha256), None)
            pairs.append((whole.name, str(reduced.without), (same or reduced).name))
            if same is None:
                variants.append(reduced)
    _check_different(variants)
    taken: set[str] = set()
    wanted = []
    for variant in variants:
        folders = [_slug(variant.name, one.seed if seeds else None, taken) for one in variant.recipes]
        runs = tuple(zip(variant.recipes, folders, strict=True))
        wanted.append(Wanted(variant.name, variant.settings, variant.without, runs))
    return SweepPlan(tuple(wanted), tuple(pairs))


def split_values(text: str) -> list[str]:
    """The parts of `2,[1, 8],"a,b"` between commas that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and (depth or not parts[-1].strip()):  # elsewhere it is an apostrophe
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def _grid(vary: Sequence[str]) -> Grid:
    """Every combination of values."""
    axes: list[tuple[str, list[str]]] = []
    for one in vary:
        path, sign, text = one.partition("=")
        path, values = path.strip(), split_values(text)
        if not sign or not path or not all(values):
            raise RecipeError(f"--vary {one}: write a path, = and values, as in --vary quantize.bits=2,3,4")
        if len(set(values)) < len(values):
            raise RecipeError(f"--vary {one}: a value is given twice")
        if path in [known for known, _ in axes]:
            raise RecipeError(f"--vary {path}: given twice; write all values after one {path}=")
        axes.append((path, values))
    leaves = [path.rpartition(".")[2] for path, _ in axes]
    short = [leaf if leaves.count(leaf) == 1 else path for leaf, (path, _) in zip(leaves, axes, strict=True)]
    combinations = itertools.product(*(values for _, values in axes))
    return [
        (
            tuple(f"{name}={value}" for name, value in zip(short, combination, strict=True)),
            tuple(f"{path}={value}" for (path, _), value in zip(axes, combination, strict=True)),
        )
        for combination in combinations
    ]


def _load(recipe: str | Path, settings: Sequence[str], grid: Grid, seeds: Sequence[int]) -> list[Variation]:
    """The whole recipe in every combination; all that is wrong in any of them is said at once, as the user wrote it."""
    loaded: list[Variation] = []
    problems: dict[str, None] = {}
    for shown, varied in grid:
        recipes = []
        for of_seed in [[f"seed={seed}"] for seed in seeds] or [[]]:
            try:
                recipes.append(load_recipe(recipe, [*settings, *varied, *of_seed]))
            except RecipeError as error:
                message = str(error)
                for option, written in (("--vary", varied), ("--seeds", of_seed)):
                    for one in written:
                        message = message.replace(f"--set {one}", f"{option} {one}")
                problems |= dict.fromkeys(message.splitlines())
        loaded.append(Variation(" ".join(shown) or WHOLE, varied, None, tuple(recipes)))
    if problems:
        raise RecipeError("\n".join(problems))
    return loaded


def _without_each(whole: Variation) -> Iterator[Variation]:
    """The recipe without its first pass, without its second, and so on."""
    steps = whole.recipes[0].passes
    if len(steps) < 2:
        raise RecipeError(
            "--ablate: the recipe has a single pass; its own report compares it with the model without any pass"
        )
    kinds = [kind_of(step, PASSES) for step in steps]
    for i, kind in enumerate(kinds):
        label = getattr(steps[i], "id", None) or (kind if kinds.count(kind) == 1 else f"{kind}-{i + 1}")
        reduced = tuple(
            one.model_copy(update={"passes": (*one.passes[:i], *one.passes[i + 1 :])}) for one in whole.recipes
        )
        prefix = "" if whole.name == WHOLE else f"{whole.name} "
        yield Variation(f"{prefix}without {label}", whole.settings, label, reduced)


def _check_different(variants: Sequence[Variation]) -> None:
    first: dict[str, str] = {}
    for variant in variants:
        if variant.sha256 in first:
            raise RecipeError(f"--vary: {first[variant.sha256]!r} and {variant.name!r} are the same recipe")
        first[variant.sha256] = variant.name


def _slug(name: str, seed: int | None, taken: set[str]) -> str:
    """A folder name that says which variant it holds, safe on every file system and not taken yet."""
    words = re.sub(r"[^A-Za-z0-9._+-]+", "-", name.replace(" ", "_")).strip("-._")[:SLUG] or "variant"
    slug = words = words + ("" if seed is None else f"_seed-{seed}")
    number = 1
    while slug.lower() in taken:  # some file systems do not tell cases apart
        number += 1
        slug = f"{words}-{number}"
    taken.add(slug.lower())
    return slug
