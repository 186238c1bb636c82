"""Measures of how good samples are."""
