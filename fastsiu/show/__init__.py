"""What the terminal shows: progress, tables, samples, sentences; and the curves for a tracker."""
