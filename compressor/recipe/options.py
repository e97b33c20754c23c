"""The options of a recipe, checked when they are read and frozen from then on."""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    PrivateAttr,
    SerializeAsAny,
    field_serializer,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML

from compressor.calibration.tokens import DEMO_TEXT, Calibration
from compressor.exporters.onnx import OnnxSettings, Rounding
from compressor.gates import Policy
from compressor.metrics.behaviour.options import Bias, Generation, Ood, Refusals, Robustness
from compressor.metrics.tasks.options import Task
from compressor.passes import PASSES
from compressor.recipe.sizes import Size


class Options(BaseModel):
    """Frozen, and an unknown key is an error; `NOT_YET` names keys of the design that this version does not have."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    NOT_YET: ClassVar[frozenset[str]] = frozenset()


class Latency(Options):
    """Which speeds are measured: reading `prompt` tokens and generating `generate` more, at each batch size."""

    batch: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8)
    prompt: PositiveInt = Field(128, description="Tokens in each prompt.")
    generate: PositiveInt = Field(32, description="Tokens generated after the prompt.")
    loading: bool = Field(False, description="Also the time to load the files, and the peak memory of a fresh process.")
    energy: str | None = Field(
        None,
        pattern="^[A-Z]{3}$",
        description="Joules and CO2 a token, by codecarbon; the grid's country, such as DEU.",
    )


def _off(value: Any) -> Any:
    return None if value is False else value


class Evaluate(Options):
    """What is measured, and after which passes; memory is always measured."""

    when: Literal["each", "end"] = Field("each", description="After each pass, or only after the last one.")
    text: str | dict[str, str] = Field(DEMO_TEXT, description="demo/text, one file, or files by name.")
    windows: PositiveInt = Field(16, description="Windows taken from each text.")
    length: Annotated[int, Field(ge=2)] = Field(256, description="Tokens in a window.")
    latency: Annotated[
        Latency | None, BeforeValidator(_off, json_schema_input_type=Latency | Literal[False] | None)
    ] = Field(Latency(), description="false leaves the speed out.")

    tasks: tuple[Task, ...] = Field((), description="Questions with known answers, from local files or `datasets`.")
    robustness: Robustness | None = Field(None, description="The tasks again, with perturbed prompts.")
    ood: Ood | None = Field(None, description="Texts unlike evaluate.text: does compression hurt more there?")
    bias: Bias | None = Field(None, description="Sentences with different people in them.")
    generation: Generation | None = Field(None, description="Health of what the model writes.")
    refusals: Refusals | None = Field(None, description="Which prompts the model refuses.")

    @field_validator("tasks")
    @classmethod
    def _own_names(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        for name, count in Counter(task.name for task in tasks).items():
            if count > 1:
                raise ValueError(f"{count} tasks are called {name!r}; each needs a name of its own")
        return tasks

    @field_serializer("latency", mode="wrap")
    def _latency_off(self, latency: Latency | None, to_plain: Any) -> Any:
        return False if latency is None else to_plain(latency)


class Safetensors(Options):
    """A folder of safetensors shards in the compressed-tensors layout, which stock transformers loads."""

    shard: Size = Field(5 * 10**9, description="Largest size of one file, such as 5GB.")


class Onnx(Options):
    """A folder with `model.onnx`, which onnxruntime, onnxruntime-genai and optimum run; codes as they are."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="Of inputs, outputs, arithmetic.")
    accuracy_level: Literal[0, 1, 4] = Field(
        4, description="4 lets onnxruntime round activations to int8 where weights are quantized; 0 and 1 do not."
    )
    embedding: Literal["auto", "float32", "float16", "bfloat16", "int8"] = Field(
        "auto", description="How embedding and head are stored; auto: int8 in a quantized model, else as dtype."
    )

    weights: Literal["int4", "int8"] | None = Field(
        None, description="Rounds a model of a family that passes do not know; others have their codes from a pass."
    )
    group_size: Literal[32, 64, 128] | None = Field(
        None, description="With weights: how many neighbours share a scale; 32."
    )
    head: Literal["int8"] | None = Field(None, description="With weights: also the output head; else it stays float.")

    @model_validator(mode="after")
    def _with_weights(self) -> Self:
        for name in ("group_size", "head"):
            if self.weights is None and getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to `weights: int4` or `weights: int8`")
        return self

    def settings(self) -> OnnxSettings:
        """As the writer takes them."""
        return OnnxSettings(dtype=self.dtype, accuracy_level=self.accuracy_level, embedding=self.embedding)

    def rounding(self) -> Rounding | None:
        """How weights of a family that passes do not know are rounded; None for not at all."""
        if self.weights is None:
            return None
        bits = {"int4": 4, "int8": 8}[self.weights]
        return Rounding(bits, self.group_size or 32, self.accuracy_level, head=self.head is not None)


class Gguf(Options):
    """One file for llama.cpp and what builds on it."""

    type: Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q4_k_m", "q6_k"] = Field(
        "auto", description="auto carries codes over and rounds nothing; the others are what llama.cpp means by them."
    )


EXPORTS: dict[str, type[Options]] = {"safetensors": Safetensors, "onnx": Onnx, "gguf": Gguf}


class Recipe(Options):
    """A model, the passes it goes through, and how the result is measured, gated and written."""

    model: str = Field(min_length=1, description="org/name[@revision], a folder, a .gguf file, or demo/tiny-moe.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    memory: Size | None = Field(None, description="Limit on the run's memory, such as 16GB.")
    calibration: Calibration = Calibration()
    passes: tuple[SerializeAsAny[BaseModel], ...] = Field(min_length=1)
    evaluate: Evaluate = Evaluate()
    gate: Policy | None = None
    export: tuple[SerializeAsAny[BaseModel], ...] = (Safetensors(),)

    _name: str = PrivateAttr("recipe")

    @property
    def name(self) -> str:
        """The recipe's file name without its suffix; default output folders are called after it."""
        return self._name

    @property
    def sha256(self) -> str:
        """Digest of the resolved recipe: two files that ask for the same thing have the same one."""
        return hashlib.sha256(self.dumped().encode()).hexdigest()

    def dumped(self) -> str:
        """The resolved recipe as YAML, every default written out; `load_recipe` reads it back to an equal recipe."""
        plain = _plain(self)
        plain["passes"] = [{kind_of(step, PASSES): _plain(step)} for step in self.passes]
        plain["export"] = [{kind_of(target, EXPORTS): _plain(target)} for target in self.export]
        yaml, stream = YAML(), io.StringIO()
        yaml.width = 120
        yaml.dump(plain, stream)
        return stream.getvalue()

    @field_validator("passes")
    @classmethod
    def _known_passes(cls, passes: tuple[BaseModel, ...]) -> tuple[BaseModel, ...]:
        for step in passes:
            kind_of(step, PASSES)
        ids = [name for step in passes if (name := getattr(step, "id", None)) is not None]
        for name, count in Counter(ids).items():
            if count > 1:
                raise ValueError(f"{count} passes have the id {name!r}; an id names one pass")
            # An id is the first part of a --set path, where these words mean something else already.
            if name in PASSES or name in cls.model_fields or not re.fullmatch(r"[A-Za-z_][\w-]*", name):
                raise ValueError(f"the id {name!r} is not possible: an id is a word that is no pass and no recipe key")
        return passes

    @field_validator("export")
    @classmethod
    def _known_exports(cls, export: tuple[BaseModel, ...]) -> tuple[BaseModel, ...]:
        names = [kind_of(target, EXPORTS) for target in export]
        if len(set(names)) < len(names):
            raise ValueError(f"a format is exported once, not twice: {', '.join(names)}")
        return export


def kind_of(options: BaseModel, kinds: Mapping[str, type]) -> str:
    """The word that stands for a pass or an export in a recipe: `quantize` for a Quantize."""
    for name, kind in kinds.items():
        if type(options) is kind:
            return name
    raise ValueError(f"{type(options).__name__} is none of {', '.join(kinds)}")


def _plain(options: BaseModel) -> dict[str, Any]:
    """The fields as YAML knows them, without those that are empty and empty by default."""
    dumped = options.model_dump(mode="json")
    plain = {}
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if value is None and field.default is None:
            continue
        plain[name] = _plain(value) if isinstance(value, BaseModel) else dumped[name]
    return plain
