"""The paper's experiments: ``python -m bench.paper --help``."""
