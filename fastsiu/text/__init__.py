"""Names and answers as text: forms and masks of a name, how it may be written, what an answer
is."""
