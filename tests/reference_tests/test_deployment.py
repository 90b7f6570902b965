"""What an engine gets out of every kind of export, in every layout, by a loader that shares no code with hyquant."""

import copy

import pytest
import torch
from torch import Tensor

from hyquant.export import default_names, for_rank
from tests.reference.loader import load
from tests.reference_tests.configs import CONFIGS
from tests.reference_tests.judging import deploy, judge, relative_l2
from tests.reference_tests.routes import denoised, loaded_by_hyquant, planned, rounding, write_export

ROUTES = ("original", "diffusers", "converted")
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
SAME_INTEGERS = ("static", "static of the seed's layers", "timestep all static", "float16 static")
"""Integers and products of two float32 only: nothing that two sides may round in another order.

The float layers around them must be the same code too.
"""
FOUR_BITS = ("w4a16", "float16 w4a16")
"""A row of 64 weights of 4 bits may well lie nearer to the few inputs of one step, or further away."""
UNSMOOTHED = [name for name, (config, _) in CONFIGS.items() if config.smoothing is None and config.linear is not None]


@pytest.fixture(params=ROUTES)
def deployment(request, route_of, float_run_of, export_of):
    """Return route, folder and float run of a configuration by its name."""

    def prepare(name):
        dtype = CONFIGS[name][0].deploy_dtype
        return route_of(request.param, dtype), export_of(request.param, name), float_run_of(request.param, dtype)

    return prepare


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_deploys_whole_and_meets_the_bars(deployment, name):
    """And hyquant's own loaded run is nearer to the engine than independent noise, which would be 1.4 times as far.

    The two differ in the last bits of a float sum; a bit that flips a code is as good as noise a few layers on.
    """
    (config, lowest), (route, folder, expected) = CONFIGS[name], deployment(name)

    scores, loaded, latents = judge(route, folder, expected, line="2.3")
    modules = [path for _, paths in planned(folder) for path in paths]
    with loaded_by_hyquant(route, folder) as ours, rounding(ours, modules, route.dtype):
        simulated = denoised(ours, route.inputs, dtype=route.dtype, set_step=route.clock.set)

    assert scores.missed(lowest, largest_gain_error=0.1 if name in FOUR_BITS else 0.02) == set(), scores
    assert scores.cosine < 1
    assert len(loaded.attentions) == (0 if config.attention is None else 4)
    assert loaded.changed_by_casts == ()
    assert relative_l2(simulated, latents) < 1.2 * relative_l2(latents, expected.latents)
    if name in SAME_INTEGERS and type(route.source) is type(route.deployed):
        assert relative_l2(simulated, latents) < 1e-6


@pytest.mark.parametrize("name", UNSMOOTHED)
def test_hyquant_computes_every_layer_as_the_engine_does(deployment, name):
    """On equal inputs the integers are equal; the engine rounds output and bias to its dtype, which bounds the rest."""
    route, folder, expected = deployment(name)
    loaded, _ = deploy(route, folder, line="2.3")
    unit = UNIT_ROUNDOFF[route.dtype]

    with loaded_by_hyquant(route, folder) as ours:
        for names, paths in planned(folder):
            bias = torch.cat([route.deployed.get_submodule(layer).bias for layer in names])
            for step, x in expected.linears[names[0]]:
                loaded.steps.set(step)
                route.clock.set(step)
                engine, simulated = outputs(loaded.model, names, x), outputs(ours, paths, x)
                allowed = unit * (simulated.abs() + 2 * bias.abs()) + 1e-6

                assert bool(((engine - simulated).abs() <= allowed).all()), (names, step)


@torch.no_grad()
def outputs(model, names: list[str], x: Tensor) -> Tensor:
    return torch.cat([model.get_submodule(name)(x) for name in names], dim=-1)


def test_the_engine_of_today_ignores_int8_attention_and_runs_its_linears(deployment):
    route, folder, _ = deployment("int8 attention, dynamic")

    loaded, latents = deploy(route, folder)
    plain, plain_latents = deploy(route, folder, line="2.3")

    assert loaded.attentions == {}
    assert loaded.linears == plain.linears != {}
    assert not torch.equal(latents, plain_latents)


def test_every_rank_finds_its_own_pair_of_files_from_any_path(route_of, tmp_path):
    route = route_of("original", "bfloat16")
    names = [for_rank(default_names("W8A8_TIMESTEP"), rank) for rank in range(2)]

    folder = write_export(route, CONFIGS["timestep"][0], tmp_path / "export", target="mindie-sd-3.1/910b", names=names)
    given = folder / "quant_model_description_w8a8_timestep_0.json"
    both = [load(copy.deepcopy(route.deployed), given, rank=rank) for rank in range(2)]

    assert {path.name for path in folder.iterdir()} == {
        "quant_model_description_w8a8_timestep_0.json",
        "quant_model_description_w8a8_timestep_1.json",
        "quant_model_weight_w8a8_timestep_0.safetensors",
        "quant_model_weight_w8a8_timestep_1.safetensors",
        "hyq_manifest.json",
    }
    assert both[0].linears == both[1].linears
    assert len(both[0].linears) == sum(len(names) for names, _ in planned(folder)) == 26


def test_an_export_for_a_target_meets_the_bars_on_it(route_of, float_run_of, tmp_path):
    """As a search exports for today's engine on a 910B: no attention, multipliers only, original names."""
    route, expected = route_of("converted", "bfloat16"), float_run_of("converted", "bfloat16")

    folder = write_export(route, CONFIGS["m4 timestep"][0], tmp_path / "export", target="mindie-sd-3.1/910b")
    scores, _, _ = judge(route, folder, expected)

    assert scores.missed(CONFIGS["m4 timestep"][1]) == set()


def test_tables_are_used_at_the_steps_of_the_policy_only(deployment):
    """The engine's default is dynamic at every step: an export alone would never run a static one."""
    route, folder, _ = deployment("timestep")
    _, dynamic_folder, _ = deployment("dynamic")

    _, told = deploy(route, folder)
    _, untold = deploy(route, folder, static_steps=())
    _, dynamic = deploy(route, dynamic_folder)

    assert torch.equal(untold, dynamic)
    assert not torch.equal(told, dynamic)
