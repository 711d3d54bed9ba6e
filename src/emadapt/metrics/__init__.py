"""Pixel and object metrics, intervals and contrasts: numpy in, numbers out.

It knows neither torch nor a study.
"""
