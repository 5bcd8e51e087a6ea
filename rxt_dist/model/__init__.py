"""The Reactive Transformer in plain torch: no ranks, no process groups, no memory buffers.

Shape suffixes of tensor names are those of docs/glossary.md.
"""
