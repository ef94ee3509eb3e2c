"""Many concepts on one model: a suite's files, the exam of each concept, the runs and their
table."""
