"""What makes a volume fit a card: combinations of techniques, simulated and put in order."""
