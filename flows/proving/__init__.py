"""`cohort prove`: what this machine does with each engine that is installed, in minutes and without a hub."""
