"""Metrics, tables, plots and pages for people."""
