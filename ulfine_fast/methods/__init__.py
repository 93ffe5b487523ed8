"""The methods, one file each: `base` is what a method is, `registry` finds methods by name."""
