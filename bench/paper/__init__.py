"""``python -m bench.paper``: the AdaBayes paper's experiments, from data to figures."""
