"""Calibration: capture the denoiser's inputs, observe activations, keep both in a content-addressed store."""
