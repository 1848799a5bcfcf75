"""Measurements. Installed and imported as `mvit_export.benchmarks`."""

if __name__ != "mvit_export.benchmarks":
    raise ImportError("import mvit_export.benchmarks: this folder is not a package of its own (pip install -e .)")
