"""Deployments: a recipe as something that Prefect runs on its workers, by hand, from its form, or on a schedule."""
