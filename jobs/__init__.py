"""Where and when: the command line, the driver, and the actors on a Ray cluster."""
