"""Attacks on an unlearned model that need more than questions: its weights, its states, its gradients, and training it again."""
