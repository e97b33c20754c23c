"""A decoder that onnxruntime's attention computes: what is known of it, and what that kernel does not take."""

from compressor.errors import UnsupportedModel
from compressor.models import Decoder, Model, attention_scale, describe_decoder, norm_weight

__all__ = ["Decoder", "attention_scale", "decoder_of", "norm_weight"]

ROTARY_MULTIPLE = 8  # of GroupQueryAttention, for the number of frequencies


def decoder_of(model: Model) -> Decoder:
    """What a model's config and modules say; UnsupportedModel for what is not described or cannot be in a graph."""
    decoder = describe_decoder(model)
    for rotary in decoder.rotary.values():
        if len(rotary.frequencies_R) % ROTARY_MULTIPLE:
            raise UnsupportedModel(
                f"{model.name}: {2 * len(rotary.frequencies_R)} of a head's dimensions are rotated; onnxruntime takes "
                f"multiples of {2 * ROTARY_MULTIPLE}"
            )
    return decoder
