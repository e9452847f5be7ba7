"""What every step shares: artefacts, randomness, models and the one training loop."""
