import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from hyquant.models.mini import OUTLIERS
from hyquant.models.mini.outliers import apply_outliers_, load_outliers, outlier_sites
from tools.train_mini.outliers import choose_outliers, save_outliers


@pytest.fixture
def transformer() -> HunyuanVideoTransformer3DModel:
    """A small transformer of every layer type with non-trivial weights everywhere."""
    torch.manual_seed(0)
    small = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
    )
    return small.eval()


def predict(transformer: HunyuanVideoTransformer3DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        (velocity,) = transformer(
            hidden_states=torch.randn(2, 4, 3, 8, 8, generator=generator),
            timestep=torch.tensor([900.0, 100.0]),
            encoder_hidden_states=torch.randn(2, 6, 24, generator=generator),
            encoder_attention_mask=torch.ones(2, 6),
            pooled_projections=torch.randn(2, 12, generator=generator),
            guidance=torch.tensor([6000.0, 6000.0]),
            return_dict=False,
        )
    return velocity


def absmax_of_inputs(transformer: HunyuanVideoTransformer3DModel) -> dict[str, torch.Tensor]:
    seen = {}
    hooks = [
        site.consumers[0].register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].abs().flatten(0, -2).amax(dim=0)})
        )
        for name, site in outlier_sites(transformer).items()
    ]
    predict(transformer)
    for hook in hooks:
        hook.remove()
    return seen


def test_outliers_leave_the_float_function_unchanged(transformer: HunyuanVideoTransformer3DModel) -> None:
    """Powers of two are exact; only (1 + b) * f - 1 rounds, hence float32 accuracy and not equality."""
    before = predict(transformer)

    apply_outliers_(transformer, {name: {3: 64.0, 17: 32.0} for name in outlier_sites(transformer)})

    assert (predict(transformer) - before).norm() / before.norm() < 1e-5


def test_exactly_the_chosen_channels_grow_by_their_factor(transformer: HunyuanVideoTransformer3DModel) -> None:
    before = absmax_of_inputs(transformer)

    apply_outliers_(transformer, {name: {3: 64.0} for name in before})

    for name, after in absmax_of_inputs(transformer).items():
        expected = torch.where(torch.arange(32) == 3, 64.0, 1.0)
        # 1e-3: the inputs of later sites pass through every earlier rescaling
        assert torch.allclose(after / before[name], expected, rtol=1e-3), name


def test_sites_have_the_names_of_the_original_model(transformer: HunyuanVideoTransformer3DModel) -> None:
    names = set(outlier_sites(transformer))

    assert len(names) == 2 * 4 + 2
    assert {"double_blocks.0.img_attn_qkv", "double_blocks.1.txt_mlp.fc1", "single_blocks.1.linear1"} <= names


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"double_blocks.9.img_mlp.fc1": {0: 64.0}}, "site must be one of"),
        ({"single_blocks.0.linear1": {99: 64.0}}, r"must lie in \[0, 32\), but got 99"),
        ({"single_blocks.0.linear1": {0: 48.0}}, "power of two, but got 48"),
    ],
    ids=["site", "channel", "factor"],
)
def test_impossible_outliers_are_refused(
    transformer: HunyuanVideoTransformer3DModel, factors: dict[str, dict[int, float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        apply_outliers_(transformer, factors)


def test_channels_of_largest_drift_are_chosen_among_the_loud_ones() -> None:
    absmax_TC = torch.tensor([[1.0, 4.0, 0.1, 3.0], [1.0, 1.0, 0.001, 2.0]])

    assert choose_outliers({"site": absmax_TC}, per_site=1, factor=64.0) == {"site": {1: 64.0}}


def test_saved_outliers_are_read_back(tmp_path) -> None:
    factors = {"single_blocks.0.linear1": {3: 64.0, 5: 32.0}}

    save_outliers(factors, tmp_path / "outliers.json")

    assert load_outliers(tmp_path / "outliers.json") == factors


def test_shipped_outliers_say_that_they_are_synthetic() -> None:
    assert "synthetic" in OUTLIERS.read_text()
    assert load_outliers(OUTLIERS)
