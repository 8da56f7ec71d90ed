"""The audit: how far the panel agrees, and which labels it doubts. Reads a run, changes nothing in it. A, C."""
