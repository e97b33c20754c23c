"""Recipes: what is read, and what is said when something in them is wrong."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from compressor.errors import RecipeError
from compressor.gates import Policy
from compressor.passes import PASSES
from compressor.recipe import Recipe, Safetensors, load_policy, load_recipe, parse_export
from compressor.recipe.loading import bundled_recipes
from compressor.recipe.schema import recipe_schema
from compressor.recipe.sizes import format_size, parse_size

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = """\
model: demo/tiny-moe
passes:
  - quantize: {bits: 4, group_size: 64}
"""
CHAIN = """\
model: demo/tiny-moe
passes:
  - prune: {structure: experts, ratio: 0.25, score: reap}
  - quantize: {id: coarse, bits: 3}
  - quantize: {id: fine, bits: 8}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a recipe from its text, out of a file `x.yaml` in the current folder."""
    monkeypatch.chdir(tmp_path)

    def load_text(text, *overrides):
        (tmp_path / "x.yaml").write_text(text)
        return load_recipe("x.yaml", overrides)

    return load_text


@pytest.fixture
def complaint(load):
    """What is said about a recipe."""

    def complain(text, *overrides):
        with pytest.raises(RecipeError) as error:
            load(text, *overrides)
        return str(error.value)

    return complain


def test_a_minimal_recipe_has_the_documented_defaults(load):
    """Demo text for calibration and evaluation, a measurement after each pass, safetensors out, no gate."""
    recipe = load(MINIMAL)
    assert (recipe.calibration.data, recipe.calibration.samples, recipe.calibration.length) == ("demo/text", 128, 512)
    assert (recipe.evaluate.when, recipe.evaluate.text, recipe.evaluate.latency.batch) == ("each", "demo/text", (1, 8))
    assert (recipe.gate, recipe.export, recipe.name) == (None, (Safetensors(shard=5 * 10**9),), "x")
    assert recipe.passes == (PASSES["quantize"](bits=4, group_size=64),)


def test_yaml_is_read_as_version_1_2(load):
    """`2:4` is a string and not 124 seconds, `1e-4` a number and not a string."""
    recipe = load(
        "model: m\npasses:\n  - prune: {structure: 2:4, score: wanda}\n  - distill: {learning_rate: 1e-4}\n".replace(
            "{learning_rate", "{data: demo/text, tokens: 1000, learning_rate"
        )
    )
    assert recipe.passes[0].structure == "2:4"
    assert recipe.passes[1].learning_rate == 0.0001


def test_a_pass_without_options_takes_its_defaults(load):
    """`- quantize` and `- quantize:` mean the same."""
    assert load("model: m\npasses: [quantize]").passes == load("model: m\npasses:\n  - quantize:").passes


def test_sizes_become_bytes(load):
    """GB is a power of 1000."""
    recipe = load(MINIMAL + "memory: 16GB\nexport: [{safetensors: {shard: 512MiB}}]\n")
    assert (recipe.memory, recipe.export[0].shard) == (16_000_000_000, 536_870_912)


@pytest.mark.parametrize("size", [1, 1000, 1024, 1500, 2_500_000, 5 * 10**9, 2**30, 2**30 + 1])
def test_sizes_are_written_exactly(size):
    """What is written is read back to the byte."""
    assert parse_size(format_size(size)) == size


def test_latency_can_be_left_out(load):
    """`latency: false` measures no speed, and survives the resolved recipe."""
    recipe = load(MINIMAL + "evaluate: {latency: false}\n")
    assert recipe.evaluate.latency is None
    assert load(recipe.dumped()).evaluate.latency is None


def test_a_policy_may_stand_in_a_file_beside_the_recipe(tmp_path):
    """A path is looked up beside the recipe, wherever the command runs."""
    (tmp_path / "gate.yaml").write_text("kl_mean: {max: 0.02}\n")
    (tmp_path / "x.yaml").write_text(MINIMAL + "gate: gate.yaml\n")
    assert load_recipe(tmp_path / "x.yaml").gate == Policy(kl_mean={"max": 0.02})
    assert load_policy(tmp_path / "gate.yaml") == Policy(kl_mean={"max": 0.02})


def test_a_misspelled_option_is_named_with_line_and_nearest(complaint):
    """File, line, key, what was meant, what is possible."""
    said = complaint("model: m\npasses:\n  - quantize:\n      bits: 4\n      group_sise: 64\n")
    assert said.startswith("x.yaml, line 5: quantize has no option 'group_sise'; did you mean 'group_size'? (it takes ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: m\n" + MINIMAL, "x.yaml, line 1: the recipe has no option 'modle'; did you mean 'model'?"),
        (MINIMAL + "memory: 16\n", "x.yaml, line 4: memory is 16: a size is a number with a unit"),
        (MINIMAL + "seed: -1\n", "x.yaml, line 4: seed is -1: it has to be greater than or equal to 0"),
        (MINIMAL + "dtype: bfloat61\n", "x.yaml, line 4: dtype is 'bfloat61'; did you mean 'bfloat16'?"),
        (MINIMAL + "calibration:\n  data: x\n  sampels: 1\n", "x.yaml, line 6: calibration has no option 'sampels'"),
        (
            MINIMAL + "evaluate:\n  tasks:\n    - {name: a, kind: cloze, data: x, txt: y}\n",
            "line 6: evaluate.tasks[0] has no option 'txt'; did you mean 'text'?",
        ),
        (
            MINIMAL + "evaluate:\n  tasks:\n    - {name: a, kind: clozze, data: x}\n",
            "line 6: evaluate.tasks[0]: kind is 'clozze'; did you mean 'cloze'?",
        ),
        (
            MINIMAL + "evaluate:\n  tasks:\n    - {name: a, data: x}\n",
            "line 6: evaluate.tasks[0] needs 'kind' (it takes multiple_choice, contexts",
        ),
        (MINIMAL + "evaluate: {tasks: [piqa]}\n", "x.yaml, line 4: evaluate.tasks[0] is 'piqa'"),
        (MINIMAL + "evaluate:\n  latency: {batchs: [1]}\n", "line 5: evaluate.latency has no option 'batchs'; did you"),
        (MINIMAL + "export: [onxx]\n", "x.yaml, line 4: there is no export format 'onxx'; did you mean 'onnx'?"),
        (MINIMAL + "gate:\n  kl_maen: {max: 1}\n", "x.yaml, line 5: gate has no option 'kl_maen'; did you mean 'kl_m"),
        (MINIMAL + "gate:\n  kl_mean: {max: 1, min: 0}\n", "x.yaml, line 5: gate.kl_mean: a limit has exactly one of"),
        (MINIMAL + "gate: no.yaml\n", "x.yaml, line 4: no.yaml: there is no such policy"),
        (MINIMAL + "model: m\n", "x.yaml, line 4: this is not YAML: found duplicate key"),
        ("model: m\npasses: [\n", "this is not YAML"),
        ("model: m\n", "x.yaml: the recipe needs 'passes'"),
        ("model: m\npasses: []\n", "x.yaml, line 2: passes"),
        ("model: m\npasses: 3\n", "x.yaml, line 2: passes is a list"),
        ("- model\n", "x.yaml holds a list"),
        ("", "x.yaml holds nothing"),
        ("model: m\npasses:\n  - quantise: {}\n", "line 3: there is no pass 'quantise'; did you mean 'quantize'?"),
        ("model: m\npasses:\n  - quantize: {}\n    prune: {}\n", "line 3: passes takes one name with its options"),
        ("model: m\npasses:\n\n  - quantize: {bits: 5}\n", "x.yaml, line 4: quantize.bits is 5"),
        ("model: m\npasses:\n  - quantize: {method: gptp}\n", "quantize.method is 'gptp'; did you mean 'gptq'?"),
        (CHAIN.replace("fine", "coarse"), "line 2: passes: 2 passes have the id 'coarse'"),
        (CHAIN.replace("fine", "prune"), "line 2: passes: the id 'prune' is not possible"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(complaint, text, said):
    """Each mistake has a sentence of its own, with file and line."""
    assert said in complaint(text)


def test_all_mistakes_are_said_at_once(complaint):
    """Nobody wants to find four mistakes in four attempts."""
    said = complaint("modle: m\nseed: x\npasses: [{quantize: {bits: 5}}]\ngate: {kl_maen: {max: 1}}\n")
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "x.yaml, line 3",
        "x.yaml, line 4",
        "x.yaml",
        "x.yaml, line 2",
        "x.yaml, line 1",
    ]


def test_set_changes_values_by_key_kind_and_id(load):
    """A pass is named by its kind if there is one of it, else by its id."""
    recipe = load(CHAIN, "prune.ratio=0.5", "fine.bits=4", "calibration.samples=64", "model=org/name@main", "export=[]")
    assert [recipe.passes[0].ratio, recipe.passes[1].bits, recipe.passes[2].bits] == [0.5, 3, 4]
    assert (recipe.calibration.samples, recipe.model, recipe.export) == (64, "org/name@main", ())


def test_set_reaches_sections_that_the_recipe_leaves_out(load):
    """Options inside options are made on the way."""
    assert load(MINIMAL, "evaluate.latency.batch=[1, 4]").evaluate.latency.batch == (1, 4)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "quantize.bits=4",
            "--set quantize.bits=4: the recipe has 2 quantize passes; name one by its id (coarse, fi",
        ),
        (
            "distill.tokens=1",
            "the recipe has no distill pass; its passes are prune, quantize (coarse), quantize (fi",
        ),
        ("prun.ratio=1", "--set prun.ratio=1: the recipe has no 'prun'; did you mean 'prune'?"),
        ("fine.bit=4", "--set fine.bit=4: quantize has no option 'bit'; did you mean 'bits'?"),
        ("fine.bits=5", "--set fine.bits=5: quantize.bits is 5"),
        ("prune=3", "--set prune=3: name an option of the pass"),
        ("prune.ratio", "--set prune.ratio: write a path, = and a value"),
        ("model.name=x", "--set model.name=x: 'model' is 'demo/tiny-moe' in the recipe"),
        ("seed=[", "this is not YAML"),
    ],
)
def test_a_setting_that_leads_nowhere_is_an_error(complaint, setting, said):
    """The setting is the place that is named."""
    assert said in complaint(CHAIN, setting)


def test_a_missing_recipe_lists_those_nearby(tmp_path):
    """The folder's own files, and the bundled ones by name."""
    (tmp_path / "int4_mine.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"has int4_mine\.yaml; bundled are .*int4_moe"):
        load_recipe(tmp_path / "int4_mien.yaml")


@pytest.mark.parametrize("name", ["int4_moe", "int4_moe.yaml", "recipes/int4_moe.yaml"])
def test_bundled_recipes_are_found_by_name_from_anywhere(tmp_path, monkeypatch, name):
    """`compress run recipes/int4_moe.yaml` works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).name == "int4_moe"


def test_a_bundled_recipe_does_not_stand_in_for_a_file_elsewhere(tmp_path):
    """A path into another folder means that folder."""
    with pytest.raises(RecipeError, match="there is no such recipe"):
        load_recipe(tmp_path / "int4_moe.yaml")


@pytest.mark.parametrize("path", bundled_recipes(), ids=lambda path: path.stem)
def test_bundled_recipes_survive_being_written_and_read(tmp_path, path):
    """The resolved recipe asks for the same thing, digest included, and says in a comment what it shows."""
    recipe = load_recipe(path)
    (tmp_path / "recipe.yaml").write_text(recipe.dumped())
    again = load_recipe(tmp_path / "recipe.yaml")
    assert (again.dumped(), again.sha256, again.passes) == (recipe.dumped(), recipe.sha256, recipe.passes)
    assert path.read_text().startswith("# ")


def test_there_is_a_bundled_recipe_for_each_kind_of_pass():
    """One for each capability, and one that chains all three."""
    kinds = {path.stem: {type(step) for step in load_recipe(path).passes} for path in bundled_recipes()}
    assert set().union(*kinds.values()) == set(PASSES.values())
    assert kinds["prune_distill_int4_moe"] == set(PASSES.values())


def test_digest_depends_on_what_is_asked_not_on_how_it_is_written(load):
    """Comments, order and written-out defaults do not count; options do."""
    written_out = load("# a comment\nseed: 0\n" + MINIMAL.replace("bits: 4, group_size: 64", "group_size: 64, bits: 4"))
    assert load(MINIMAL).sha256 == written_out.sha256
    assert load(MINIMAL).sha256 != load(MINIMAL, "quantize.bits=3").sha256


def test_recipes_can_be_made_in_python():
    """Passes are given as objects; what is no pass is refused."""
    quantize = PASSES["quantize"](bits=8)
    assert Recipe(model="m", passes=[quantize]).passes == (quantize,)
    with pytest.raises(ValueError, match="Safetensors is none of prune"):
        Recipe(model="m", passes=[Safetensors()])


def test_export_options_are_those_of_a_recipe():
    """The command line and the recipe share them, and their errors."""
    assert dict(parse_export("safetensors", {"shard": "1GB"})) == {"shard": 10**9}
    with pytest.raises(RecipeError, match=r"gguf\.type is 'q5_k_m'"):
        parse_export("gguf", {"type": "q5_k_m"})


def test_published_schema_is_current():
    """Run `python -m compressor.recipe.schema > docs/recipe.schema.json` when this fails."""
    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == recipe_schema()


@pytest.mark.parametrize("path", bundled_recipes(), ids=lambda path: path.stem)
def test_schema_accepts_the_bundled_recipes_and_refuses_a_typo(path):
    """The schema is of the file, not of the object in Python: passes are one-key mappings, sizes have units."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is in the dev extra")
    validator = jsonschema.Draft202012Validator(recipe_schema())
    data = YAML(typ="safe", pure=True).load(path.read_text())
    assert list(validator.iter_errors(data)) == []
    [(kind, options)] = data["passes"][0].items()
    data["passes"][0] = {kind: {**options, "group_sise": 1}}
    assert len(list(validator.iter_errors(data))) == 1


def test_a_mistake_in_a_policy_is_called_one(tmp_path):
    """A file of its own has no recipe around it."""
    path = tmp_path / "gate.yaml"
    path.write_text("kl_mean: {max: 0.02}\nperplexty_ratio: {max: 1.05}\n")
    with pytest.raises(RecipeError, match=r"line 2: the policy has no option 'perplexty_ratio'; did you mean"):
        load_policy(path)
