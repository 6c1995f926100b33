"""Latency of ONNX files: interleaved measurement, noise floor, and a verified execution provider."""
