"""int8 attention by the calls of msModelSlim's document: LAYOUT and a folder to work in are the arguments."""

import os
import sys

from hyquant import (
    DumperManager,
    FA3ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    W8A8DynamicProcessorConfig,
    W8A8DynamicQuantConfig,
    get_disable_layer_names,
    get_rank,
    get_rank_suffix_file,
    quant_model,
    safe_torch_load,
)
from tests.toys.pipelines import load_pipeline

layout, folder = sys.argv[1:]
dump_folder, weight_folder = os.path.join(folder, "cache"), os.path.join(folder, "safe_tensor")

pipeline = load_pipeline(layout)
model = pipeline.transformer
rank = get_rank()
is_distributed = rank >= 0

dump_data_path = os.path.join(
    dump_folder, get_rank_suffix_file(base_name="calib_data", ext="pth", is_distributed=is_distributed, rank=rank)
)
if not os.path.exists(dump_data_path):
    dumper_manager = DumperManager(model, capture_mode="args")
    pipeline(prompt="a paper boat crosses a puddle", num_inference_steps=3)
    dumper_manager.save(dump_data_path)

calib_dataset = safe_torch_load(dump_data_path, map_location="cpu")
safetensors_name = get_rank_suffix_file(
    base_name="quant_model_weight_w8a8_dynamic", ext="safetensors", is_distributed=is_distributed, rank=rank
)
json_name = get_rank_suffix_file(
    base_name="quant_model_description_w8a8_dynamic", ext="json", is_distributed=is_distributed, rank=rank
)
session_cfg = SessionConfig(
    processor_cfg_map={
        "fa3": FA3ProcessorConfig(),
        "w8a8_dynamic": W8A8DynamicProcessorConfig(
            cfg=W8A8DynamicQuantConfig(act_method="minmax"),
            disable_names=get_disable_layer_names(
                model,
                layer_include=("*double_blocks*", "*single_blocks*"),
                layer_exclude=("*img_mod*", "*modulation*"),
            ),
        ),
        "save": SaveProcessorConfig(
            output_path=weight_folder,
            safetensors_name=safetensors_name,
            json_name=json_name,
            save_type=["safe_tensor"],
            part_file_size=None,
        ),
    },
    calib_data=calib_dataset[:20],
    device="cpu",
)
session_cfg.model_validate(session_cfg)

quant_model(model, session_cfg)
