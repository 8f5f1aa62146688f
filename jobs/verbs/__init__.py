"""The command line's verbs, by what they are about. Heavy imports stay inside them."""
