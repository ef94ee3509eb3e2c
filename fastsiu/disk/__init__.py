"""What lies on disk: directories in the making, a file of requests, what several requests left, and
the upkeep of all that was written."""
