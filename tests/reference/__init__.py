"""Independent oracles: float64 numpy, written from the definitions of the method.

Nothing here imports torch or `trb`, and nothing here is fast: where the package uses a closed form,
a derivative or a root finder, the reference enumerates, bisects or takes finite differences.
"""
