"""Flows inline or through Prefect, and the servers of this machine."""
