"""`cohort doctor`: whether this machine can run Cohort, and what to mend. A check is a function that yields findings."""
