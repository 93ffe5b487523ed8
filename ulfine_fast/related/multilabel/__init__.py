"""Images of several classes at once: label tables, heads with a sigmoid for each class, COMIC and its baselines."""
