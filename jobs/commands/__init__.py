"""Commands of the command line. Heavy imports stay inside them."""
