"""Latency of ONNX files: interleaved, with a measured noise floor and a proven execution provider."""
