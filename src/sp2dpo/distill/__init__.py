"""A local predictor of the effective gap, fitted to what the panel of a run said. Sec. G, J.5."""
