"""The shipped spaces against HunyuanVideo's layer names, written down here from the original model's modules."""

from fnmatch import fnmatchcase
from itertools import combinations, pairwise

import pytest
from optuna.trial import FixedTrial

from hyquant.models.attentions import AttentionBlock
from hyquant.models.names import LayerGroup
from hyquant.plan import build_plan
from spaces.space import load_space
from spaces.suggest import suggest

DOUBLE = [
    f"{stream}_{layer}"
    for stream in ("img", "txt")
    for layer in ("mod.linear", "attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2")
]
SINGLE = ["linear1", "linear2", "modulation.linear"]
OUTSIDE = [
    "txt_in.input_embedder",
    "txt_in.individual_token_refiner.blocks.0.mlp.fc2",
    "final_layer.adaLN_modulation.1",
]
BLOCKS = {"mini": (1, 4), "hunyuan_video": (20, 40)}


def layer_names(space_name: str) -> list[str]:
    doubles, singles = BLOCKS[space_name]
    return [
        *(f"double_blocks.{i}.{layer}" for i in range(doubles) for layer in DOUBLE),
        *(f"single_blocks.{i}.{layer}" for i in range(singles) for layer in SINGLE),
        *OUTSIDE,
    ]


def quantized_names(space_name: str, exclusion: str) -> frozenset[str]:
    space = load_space(space_name)
    return frozenset(
        name
        for name in layer_names(space_name)
        if any(fnmatchcase(name, pattern) for pattern in space.include)
        and not any(fnmatchcase(name, pattern) for pattern in space.exclusions[exclusion])
    )


@pytest.mark.parametrize(("exclusion", "count"), [("none", 320), ("seed", 220), ("seed_fa3", 260), ("all_mod", 240)])
def test_sets_select_as_many_of_the_320_linears_as_in_the_original(exclusion, count):
    """The seed keeps img_mod (20), modulation (40) and, without attention quantization, fc2 (40)."""
    assert len(quantized_names("hunyuan_video", exclusion)) == count


@pytest.mark.parametrize("space_name", BLOCKS)
def test_the_seeds_set_leaves_txt_mod_and_linear2_quantized(space_name):
    seed, post_gelu = quantized_names(space_name, "seed"), quantized_names(space_name, "post_gelu")

    assert {"double_blocks.0.txt_mod.linear", "single_blocks.0.linear2"} <= seed - post_gelu
    assert post_gelu < seed


@pytest.mark.parametrize("space_name", BLOCKS)
def test_all_exclusion_sets_differ_in_the_layers_they_leave(space_name):
    """Two names for one selection would evaluate one quantization twice."""
    selections = {name: quantized_names(space_name, name) for name in load_space(space_name).exclusions}
    same = [(a, b) for a, b in combinations(selections, 2) if selections[a] == selections[b]]

    assert same == []
    assert all(selections.values())


@pytest.mark.parametrize("space_name", BLOCKS)
def test_nothing_outside_the_blocks_is_ever_quantized(space_name):
    assert quantized_names(space_name, "none").isdisjoint(OUTSIDE)


@pytest.mark.parametrize("space_name", BLOCKS)
def test_every_strategy_and_set_makes_a_plan(space_name):
    """So no pattern matches nothing, smoothing always finds a layer, and attention is quantized in every block."""
    space = load_space(space_name)
    groups = [LayerGroup(name, (name,), in_features=8, out_features=(8,)) for name in layer_names(space_name)]
    names = dict.fromkeys(".".join(name.split(".")[:2]) for name in layer_names(space_name) if "_blocks" in name)
    blocks = [AttentionBlock(name, name, heads=2, head_dim=8) for name in names]
    for strategy in space.strategies:
        for exclusion in space.exclusions:
            params = {"strategy": strategy, "exclusion": exclusion, "act_method": "minmax", "timestep_sep_share": 0.5}
            params |= {"placement": "multiplier", "attention_statistic": "absmax"}
            config = suggest(FixedTrial(params), space, num_steps=20)
            plan = build_plan(groups, config, num_steps=20, attentions=blocks)

            assert len(plan.quantized_attentions) == (0 if config.attention is None else sum(BLOCKS[space_name]))
            assert {layer.name for layer in plan.quantized} == quantized_names(space_name, exclusion)


def test_the_mini_space_has_a_ladder_from_all_int8_to_mostly_float():
    """The front needs points that trade latency against likeness; nested sets give them."""
    ladder = ["none", "all_mod", "single_0", "single_0_1", "single_blocks"]
    selections = [quantized_names("mini", name) for name in ladder]

    assert all(smaller < larger for larger, smaller in pairwise(selections))
