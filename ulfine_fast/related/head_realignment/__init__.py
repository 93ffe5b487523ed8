"""Heads of fitted runs, trained again on class Gaussians or replaced in closed form (SLCA, SLCA++)."""
