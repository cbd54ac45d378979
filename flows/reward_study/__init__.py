"""Study of a reward model on given solutions: trained, measured on unseen questions, compared with surface baselines."""
