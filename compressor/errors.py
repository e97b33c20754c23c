"""What can go wrong, by what the user can do about it; `exit_code` is what the command returns (design, section 5)."""


class CompressorError(Exception):
    """Something the user can act on: printed without a traceback."""

    exit_code = 3


class RecipeError(CompressorError):
    """The recipe or the command line says something that cannot be done; the message names file, line and key."""


class UnsupportedModel(CompressorError):
    """This model, or a part of it, is not understood, or would not load again after what was asked."""


class EnvironmentProblem(CompressorError):
    """The machine lacks something: disk, memory, a package, a file."""


class IntegrityError(CompressorError):
    """Files do not hold what they say: a hash, a shape, a truncated shard, an export unlike the live model."""

    exit_code = 4
