"""Errors, settings, logging, files, processes and random states."""
