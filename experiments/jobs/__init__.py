"""What experiments of many trainings share: start, stop, continue, measure."""
