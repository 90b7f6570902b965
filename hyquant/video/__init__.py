"""The parts of `python -m hyquant.sample_video`: the command line of msModelSlim's HunyuanVideo example.

flags      the command line as argparse knows it
arguments  what was asked for, as frozen values
prompts    prompts and seeds: which videos are made
loading    a model from the paths that the flags give
recipe     the quantization that the flags ask for
ranks      what ranks agree on, and how they share one video
render     videos and calibration records from the model
dump       calibration records on disk, used again where they fit
saving     videos as files
weights    plan, quantize, export
run        all of it in order, on all ranks
"""
