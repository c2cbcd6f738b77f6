"""Winning features back: label-free distillation of a model from itself at its native geometry.

``running`` is the verb, ``asked`` its checked arguments; ``data`` splits and feeds images, ``crops`` reads them,
``mixing`` cuts and mixes them; ``batches`` joins crops with what the teacher ``said`` of them; ``distance`` compares
student and teacher; ``adapters`` puts LoRA in and merges it; ``schedule`` holds the constants of the optimisation,
``learning_rate`` finds its height; ``weights`` averages and mixes; ``training`` is the loop, ``checkpoint`` its memory;
``result`` comes out.
"""
