"""Winning features back: label-free distillation of a model from itself at its native geometry.

``running`` is the verb, ``asked`` its checked arguments; ``crops`` cuts images, ``data`` splits and feeds them;
``pool`` keeps the crops with what the teacher ``said``; ``distance`` compares student and teacher; ``adapters`` puts
LoRA in and merges it; ``schedule`` holds the constants of the optimisation, ``learning_rate`` finds its height;
``weights`` averages and mixes; ``training`` is the loop, ``checkpoint`` its memory; ``result`` comes out.
"""
