"""What MLflow shows of runs and studies: a fold of their logs, kept up to date by a process of its own."""
