"""A reward model on solutions of others: learned, judged on questions it has not seen, beside what the surface gives away."""
