"""Rule rewards: the answer of an output against the gold answer, and the form the output has."""
