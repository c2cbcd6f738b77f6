NAME = "generic"


def recognises(model):
    return False
