"""Calibration of quantized weights by GPTQ, with the inputs that they receive in texts.

The texts are written by the model itself or given by the user. An 8-bit package of the same checkpoint, built beside
the one that is calibrated, writes the texts and is run on them.
"""
