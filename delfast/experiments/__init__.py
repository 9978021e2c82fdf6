"""Experiments on image classifiers: data sets, networks, the steps of a run, grids, reports.

Needs the extra of the same name.
"""
