"""Pixel and object metrics, intervals and contrasts: numpy in, numbers out.

It knows how good a mask is, how sure that is, and whether two sets of scores differ. It knows no
torch, no files, no study.
"""
