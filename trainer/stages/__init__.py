"""What happens beside the loss: initialisations before the first step, and regularisers in every step."""
