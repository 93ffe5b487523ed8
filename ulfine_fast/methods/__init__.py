"""The methods, one file each with its options; `base` has the abstract method, `registry` finds methods by name."""
