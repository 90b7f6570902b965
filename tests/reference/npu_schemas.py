"""The schemas of the torch_npu operators that we have called, and the check that a call fits one.

They are those of torch_npu 2.13.0 and 2.14.0 (`npu_native_functions_by_codegen.yaml` in its wheel); where that package
or its wheel is at hand, a test compares them.
"""

from typing import Any

import torch

SCHEMAS = {
    schema.partition("(")[0]: schema
    for schema in (
        "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
        'str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor)',
        "npu_quantize(Tensor self, Tensor scales, Tensor? zero_points, int dtype, int axis=1, bool div_mode=True) "
        "-> Tensor",
        "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
        "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
        "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) "
        "-> Tensor",
        "npu_trans_quant_param(Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor",
        "npu_format_cast(Tensor self, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor",
        "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
        "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
        "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
        "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
        'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, '
        "int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    )
}


def bound(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, defaults filled in.

    Raises:
        TypeError: If the operator does not take them.
    """
    arguments = torch._C.parse_schema(f"npu::{SCHEMAS[name]}").arguments
    positional = [argument.name for argument in arguments if not argument.kwarg_only]
    if len(args) > len(positional):
        raise TypeError(f"{name} takes {len(positional)} positional arguments, but got {len(args)}")
    given = dict(zip(positional, args, strict=False))
    if twice := given.keys() & kwargs.keys():
        raise TypeError(f"{name} got {sorted(twice)} twice")
    given |= kwargs
    if unknown := given.keys() - {argument.name for argument in arguments}:
        raise TypeError(f"{name} takes no {sorted(unknown)}")
    for argument in arguments:
        if argument.name in given:
            _require_type(name, argument, given[argument.name])
        elif argument.has_default_value():
            given[argument.name] = argument.default_value
        else:
            raise TypeError(f"{name} needs {argument.name}")
    return given


def _require_type(name: str, argument: Any, value: object) -> None:
    kind = str(argument.type)
    is_optional = kind.startswith("Optional[")
    expected = {"Tensor": torch.Tensor, "int": (int, torch.dtype), "bool": bool, "float": float, "str": str}
    inner = kind.removeprefix("Optional[").removesuffix("]") if is_optional else kind
    if (value is None and is_optional) or (inner in expected and isinstance(value, expected[inner])):
        return
    raise TypeError(f"{name} takes {argument.name} as {kind}, but got {type(value).__name__}")
