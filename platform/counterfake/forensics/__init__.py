"""Detectors that are not trained by gradient."""
