"""What the verdict judges by: families of questions, and what has to be kept. Pure."""
