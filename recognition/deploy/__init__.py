"""Export to ONNX and the embedder that runs the file."""
