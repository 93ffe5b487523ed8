"""How far a classifier favours the classes that its encoder and its labels favour."""
