"""The parts of `recall.py`."""
