"""What every method must share to be compared fairly: data, feedback, evaluation, results."""
