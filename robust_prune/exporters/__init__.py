"""Export of torch models to ONNX files, with a parity check against the model."""
