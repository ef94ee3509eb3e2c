"""What is trained on, made offline from one picture and the words of the untouched model."""
