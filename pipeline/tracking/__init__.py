"""MLflow: its database, its runs and its registry of models. What is sent to them is up to `flows/tracking/`."""
