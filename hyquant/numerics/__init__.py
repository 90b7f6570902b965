"""Pure tensor functions: granularity, scale and zero point, quantize and dequantize, error measures."""
