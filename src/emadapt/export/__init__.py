"""Models for others: one ONNX graph, a package for bioimage.io, MLflow's registry."""
