"""Continuous diffusion: teachers, consistency distillation, memorization and its theory."""
