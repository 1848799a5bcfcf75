"""PyTorch -> ONNX, TFLite and Core ML. Installed and imported as `mvit_export.converters`."""

if __name__ != "mvit_export.converters":
    raise ImportError("import mvit_export.converters: this folder is not a package of its own (pip install -e .)")
