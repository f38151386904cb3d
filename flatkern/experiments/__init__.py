"""The paper's experiments, ready to run: data, training, measuring, statistics."""
