"""Comparisons with the libraries one would otherwise use, and measurements of a shared machine."""
