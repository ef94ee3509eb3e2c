"""What comes from outside is read within bounds or tried under limits; a terminal gets no control
character."""
