"""The JSON schema of a recipe, for editors: `python -m compressor.recipe.schema > docs/recipe.schema.json`."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from compressor.passes import PASSES
from compressor.recipe.options import EXPORTS, Recipe

TITLE = "Recipe of compressor"


def recipe_schema() -> dict[str, Any]:
    """What a recipe file may hold, as JSON Schema 2020-12."""
    kinds: list[type[BaseModel]] = [Recipe, *PASSES.values(), *EXPORTS.values()]
    references, shared = models_json_schema([(kind, "validation") for kind in kinds])
    definitions = shared["$defs"]
    recipe = definitions.pop(references[Recipe, "validation"]["$ref"].rpartition("/")[2])
    # In Python a recipe holds objects; in the file each is a one-key mapping, or a bare name for the defaults.
    sections: list[tuple[str, Mapping[str, type[BaseModel]]]] = [("passes", PASSES), ("export", EXPORTS)]
    for key, named in sections:
        recipe["properties"][key] |= {"type": "array", "items": {"anyOf": _one_key_mappings(named, references)}}
        recipe["properties"][key].pop("default", None)
    policy = recipe["properties"]["gate"]
    policy["anyOf"].append({"type": "string", "description": "A file that holds the policy."})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe, "title": TITLE, "$defs": definitions}


def _one_key_mappings(named: Mapping[str, type[BaseModel]], references: Mapping[Any, Any]) -> list[dict[str, Any]]:
    mappings: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {name: {"anyOf": [references[kind, "validation"], {"type": "null"}]}},
            "required": [name],
            "additionalProperties": False,
        }
        for name, kind in named.items()
    ]
    return [*mappings, {"enum": list(named)}]


if __name__ == "__main__":
    print(json.dumps(recipe_schema(), indent=2))
