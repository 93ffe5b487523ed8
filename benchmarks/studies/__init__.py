"""One study for each table of the documentation."""
