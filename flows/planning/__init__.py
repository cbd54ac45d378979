"""`cohort plan`: what a run needs and takes, from its configuration and the model's config.json; pure formulas, no torch."""
