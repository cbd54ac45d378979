"""A reward model on solutions of others: learned, judged on questions it has not seen, next to what the surface gives away."""
