"""Which Linears a session leaves in float, by exact names instead of patterns.

Names are canonical ones (`hyquant.models.names`): the original names for HunyuanVideo in either layout, and module
paths for every other module.
"""

import glob
from collections.abc import Iterable, Sequence

from torch import nn

from hyquant.config import LayerSelection
from hyquant.errors import ConfigError, LayerMatchError
from hyquant.layers import select_layers
from hyquant.models.names import LayerGroup, layer_groups
from hyquant.session.values import hint


def get_disable_layer_names(
    model: nn.Module, layer_include: str | Sequence[str] = (), layer_exclude: str | Sequence[str] = ()
) -> list[str]:
    """Return the Linears that are not to be quantized: all that are not included, or are excluded.

    Args:
        model: The denoiser.
        layer_include: Glob patterns over canonical names; none includes all.
        layer_exclude: Glob patterns; exclude wins.

    Returns:
        Canonical names in model order, for `disable_names`.

    Raises:
        LayerMatchError: If a pattern matches no Linear; the message has its closest match.
    """
    names = [group.name for group in layer_groups(model)]
    selection = LayerSelection(include=_patterns(layer_include) or ("*",), exclude=_patterns(layer_exclude))
    selected = set(select_layers(names, selection, model=type(model).__name__))
    return [name for name in names if name not in selected]


def selection_without(groups: Sequence[LayerGroup], disable_names: Iterable[str], *, model: str) -> LayerSelection:
    """Return the selection of all layers but those that are named.

    Args:
        groups: The layer groups of the model.
        disable_names: Exact names: canonical ones, or module paths of Linears.
        model: Name of the model, for messages.

    Raises:
        LayerMatchError: If a name is no Linear of the model; the message has the closest one.
        ConfigError: If some, not all, of the Linears that form one layer are named.
    """
    wanted = set(disable_names)
    known = {name for group in groups for name in (group.name, *group.modules)}
    if unknown := sorted(wanted - known):
        raise LayerMatchError(
            f"disable_names must be Linears of {model}, but {unknown[0]!r} ({len(unknown)} in all) is none; "
            f"{_closest(unknown[0], sorted(known))}"
        )
    disabled = [group for group in groups if group.name in wanted or wanted.issuperset(group.modules)]
    for group in groups:
        if group not in disabled and (named := sorted(wanted & set(group.modules))):
            raise ConfigError(
                f"the Linears of {group.name} ({', '.join(group.modules)}) form one layer of HunyuanVideo and must be "
                f"disabled together, but disable_names has {', '.join(named)} only; name {group.name} or none of them."
            )
    return LayerSelection(include=("*",), exclude=tuple(glob.escape(group.name) for group in disabled))


def last_linear(model: nn.Module, groups: Sequence[LayerGroup]) -> str:
    """Return the name of the layer that holds the Linear which a model registers last."""
    owners = {path: group.name for group in groups for path in group.modules}
    return owners[[path for path, _ in model.named_modules() if path in owners][-1]]


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _closest(name: str, known: list[str]) -> str:
    suggestion = hint(name, known)
    return (
        suggestion if suggestion.startswith("did") else f"names are such as {known[0]!r}, and patterns are not names."
    )
