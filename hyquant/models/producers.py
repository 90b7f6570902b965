"""Which rows of which layers produce what a layer reads: the part of HunyuanVideo's data flow that is linear, as data.

    x_mod = norm(x) * (1 + scale) + shift     scale and shift are rows of the block's modulation layer
    attention output = weights @ v            v: the last rows of qkv; video and text are attended together

So dividing the input of the layers on the right by a vector can be done in the rows on the left. What reads the output
of an activation function (`fc2`, and all but the first columns of a single block's `linear2`) has no such rows.
Sources: Tencent's hyvideo/modules/models.py; diffusers' AdaLayerNormZero has the rows in the same order.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProducerRows:
    """A run of C output rows of a layer, C being the number of channels they produce.

    Attributes:
        name: Canonical name of the layer.
        part: Which run: rows `part * C` to `(part + 1) * C`.
        is_gain: Whether 1 + y is what multiplies, y being the rows' output; else y enters as it is.
    """

    name: str
    part: int
    is_gain: bool = False


@dataclass(frozen=True)
class Junction:
    """Layers that read one activation, by canonical name, and the rows that produce it."""

    consumers: tuple[str, ...]
    producers: tuple[ProducerRows, ...]


def junction_of(name: str) -> Junction | None:
    """Return where the input of a layer is produced by rows of other layers, None if nowhere.

    Args:
        name: Canonical name, such as `double_blocks.3.img_mlp.fc1`.
    """
    kind, _, rest = name.partition(".")
    index, _, layer = rest.partition(".")
    for junction in _JUNCTIONS.get(kind, ()):
        if layer in junction.consumers:
            prefix = f"{kind}.{index}."
            return Junction(
                consumers=tuple(prefix + consumer for consumer in junction.consumers),
                producers=tuple(ProducerRows(prefix + one.name, one.part, one.is_gain) for one in junction.producers),
            )
    return None


def _modulated(consumer: str, modulation: str, shift_part: int) -> Junction:
    return Junction(
        (consumer,), (ProducerRows(modulation, shift_part), ProducerRows(modulation, shift_part + 1, is_gain=True))
    )


_JUNCTIONS = {
    "double_blocks": (
        _modulated("img_attn_qkv", "img_mod.linear", 0),
        _modulated("txt_attn_qkv", "txt_mod.linear", 0),
        _modulated("img_mlp.fc1", "img_mod.linear", 3),
        _modulated("txt_mlp.fc1", "txt_mod.linear", 3),
        Junction(
            ("img_attn_proj", "txt_attn_proj"), (ProducerRows("img_attn_qkv", 2), ProducerRows("txt_attn_qkv", 2))
        ),
    ),
    "single_blocks": (_modulated("linear1", "modulation.linear", 0),),
}
