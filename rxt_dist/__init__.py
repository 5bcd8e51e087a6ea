"""rxt_dist: distributed mixture-of-experts pre-training of Reactive Transformers."""

__version__ = "0.1.0"
