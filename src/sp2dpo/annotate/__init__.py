"""Pairs × annotators × prompt variants into the call log."""
