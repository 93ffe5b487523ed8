"""Learning from bags of images of which only the class proportions are known."""
