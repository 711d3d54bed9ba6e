"""What is around the stages: check, the stages side by side, a new project.

It computes nothing itself.
"""
