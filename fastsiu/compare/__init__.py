"""SIU beside other methods, each at its best setting."""
