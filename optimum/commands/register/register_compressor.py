"""`optimum-cli compress`: optimum looks for its commands in files like this one, in a namespace that packages share."""

from compressor.cli.optimum import CompressCommand

REGISTER_COMMANDS = [CompressCommand]
