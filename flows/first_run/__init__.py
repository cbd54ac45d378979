"""`cohort init`: from a model and a file of questions to a configuration that runs."""
