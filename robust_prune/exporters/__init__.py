"""From a torch model to an ONNX file that has been proven equal to it."""
