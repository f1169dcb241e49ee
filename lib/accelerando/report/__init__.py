"""Metrics, tables, plots and HTML reports."""
