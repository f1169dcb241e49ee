"""Errors, settings, log, files, processes and random states."""
