"""Deployments and workers: the form, the schedule, kills, versions."""
