"""The session API: scripts written for msModelSlim's HunyuanVideo example run with their import lines changed.

A script dumps the calls of a denoiser (`DumperManager`), says in a `SessionConfig` what is to be done, and calls
`quant_model`. All names are importable from `hyquant`. It is a thin face over the library: a session config becomes a
`QuantConfig`, and what happens then is what `build_plan`, `calibrate`, `quantize_` and `save_quantized` do.
What is different from msModelSlim, and why: `docs/migrating.md`.
"""
