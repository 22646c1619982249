"""Names → lazy factories of library optimizers and learning-rate schedules, and their exact state."""
