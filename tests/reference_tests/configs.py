"""Every kind of export, with the cosine that it owes end to end.

They owe 0.999 with stored activation scales and 0.9997 with those of each token, or if smoothed by m4, 0.9999 with
int8 weights alone and 0.99 with int4 ones; quantized attention has to fit in.
"""

from hyquant.config import (
    M3,
    M4,
    M6,
    W4A16,
    W8A16,
    FA3Fp8,
    FA3Int8,
    LayerSelection,
    QuantConfig,
    W8A8Dynamic,
    W8A8Static,
    W8A8Timestep,
)

DYNAMIC, STATIC, TIMESTEP = W8A8Dynamic(), W8A8Static(), W8A8Timestep(timestep_sep=2)
SEED_LAYERS = LayerSelection(exclude=("*img_mod*", "*modulation*", "*fc2*"))
INT8, FP8 = FA3Int8(statistic="absmax"), FA3Fp8()

CONFIGS: dict[str, tuple[QuantConfig, float]] = {
    "static": (QuantConfig(linear=STATIC), 0.999),
    "static of the seed's layers": (QuantConfig(linear=STATIC, layers=SEED_LAYERS), 0.999),
    "dynamic": (QuantConfig(linear=DYNAMIC), 0.9997),
    "dynamic of the seed's layers": (QuantConfig(linear=DYNAMIC, layers=SEED_LAYERS), 0.9997),
    "timestep": (QuantConfig(linear=TIMESTEP), 0.999),
    "timestep all static": (QuantConfig(linear=W8A8Timestep(timestep_sep=0)), 0.999),
    "timestep all dynamic": (QuantConfig(linear=W8A8Timestep(timestep_sep=4)), 0.9997),
    "w8a16": (QuantConfig(linear=W8A16()), 0.9999),
    "w4a16": (QuantConfig(linear=W4A16(group_size=0)), 0.99),
    "m3 static": (QuantConfig(linear=STATIC, smoothing=M3()), 0.999),
    "m4 static": (QuantConfig(linear=STATIC, smoothing=M4()), 0.9997),
    "m6 static": (QuantConfig(linear=STATIC, smoothing=M6()), 0.999),
    "m3 dynamic": (QuantConfig(linear=DYNAMIC, smoothing=M3()), 0.9997),
    "m4 dynamic": (QuantConfig(linear=DYNAMIC, smoothing=M4()), 0.9997),
    "m6 dynamic": (QuantConfig(linear=DYNAMIC, smoothing=M6()), 0.9997),
    "m4 timestep": (QuantConfig(linear=TIMESTEP, smoothing=M4()), 0.9997),
    "m6 timestep": (QuantConfig(linear=TIMESTEP, smoothing=M6(alpha=0.8, beta=0.2)), 0.999),
    "int8 attention, dynamic": (QuantConfig(linear=DYNAMIC, attention=INT8), 0.9997),
    "int8 attention, m4 timestep": (QuantConfig(linear=TIMESTEP, smoothing=M4(), attention=INT8), 0.9997),
    "fp8 attention, dynamic": (QuantConfig(linear=DYNAMIC, attention=FP8), 0.9997),
    "fp8 attention, m4 static": (QuantConfig(linear=STATIC, smoothing=M4(), attention=FP8), 0.9997),
    "unrotated fp8 attention, dynamic": (QuantConfig(linear=DYNAMIC, attention=FA3Fp8(rotate=False)), 0.9997),
    "fp8 attention alone": (QuantConfig(linear=None, attention=FP8), 0.9997),
}
CONFIGS |= {
    f"float16 {name}": (CONFIGS[name][0].model_copy(update={"deploy_dtype": "float16"}), CONFIGS[name][1])
    for name in (
        "static",
        "dynamic",
        "timestep",
        "w8a16",
        "w4a16",
        "m4 static",
        "m4 dynamic",
        "int8 attention, dynamic",
        "fp8 attention, dynamic",
    )
}
