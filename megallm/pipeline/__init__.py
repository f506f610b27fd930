"""Runs a schedule: one executor for all of them."""
